"""Prompts: what stands before an answer, in text and in token ids, the same for training and generation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlavaProcessor

PROMPT_STYLES = ("vicuna", "chat_template", "auto")
# Vicuna v1.1's sentence, which LLaVA-1.5 (conversation "v1") trains with.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Prompt:
    """A question put into words for the model: `prefix` holds the image token once; `separator` stands between the
    prefix and the answer and is learned with the answer."""

    prefix: str
    separator: str


def render_prompt(processor: LlavaProcessor, question: str, style: str = "auto") -> Prompt:
    """Word a question about one picture.

    Args:
        processor: a LLaVA processor (tokenizer, image_token, perhaps chat_template).
        question: the question, without an image token.
        style: "vicuna" (Vicuna v1: USER:/ASSISTANT:), "chat_template" (the processor's own template, else the
            tokenizer's) or "auto" (a template where there is one, else Vicuna).

    Raises:
        ValueError: unknown style, no template, or the question contains the image token.
    """
    if style not in PROMPT_STYLES:
        raise ValueError(f"prompt: expected one of {', '.join(PROMPT_STYLES)}, got {style!r}")
    image_token = processor.image_token
    if image_token in question:
        raise ValueError(
            f"the question contains the image token {image_token!r}, which stands for the picture: {question!r}"
        )
    tokenizer = processor.tokenizer
    has_template = bool(getattr(processor, "chat_template", None) or tokenizer.chat_template)
    if style == "vicuna" or (style == "auto" and not has_template):
        return Prompt(f"{VICUNA_SYSTEM} USER: {image_token}\n{question} ASSISTANT:", " ")
    if not has_template:
        raise ValueError(
            "prompt 'chat_template': neither processor nor tokenizer has a chat template; use 'vicuna'"
        )

    def render(answer: str | None) -> str:
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
            if answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            apply = processor.apply_chat_template
        else:
            messages = [{"role": "user", "content": f"{image_token}\n{question}"}]
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
            apply = tokenizer.apply_chat_template
        return apply(messages, tokenize=False, add_generation_prompt=answer is None)

    prefix = render(None)
    if prefix.count(image_token) != 1:
        # Templates written for text alone drop list content, or the image entry of it.
        raise ValueError(
            f"the chat template leaves {prefix.count(image_token)} image tokens {image_token!r} for one picture; "
            "use prompt 'vicuna'"
        )
    # "ASSISTANT:" then " answer" in llava-hf's template, "assistant\n" then "answer" in ChatML: ask the template.
    marker = "\u241fanswer\u241f"
    full = render(marker)
    separator = full[len(prefix) :].split(marker)[0] if full.startswith(prefix) and marker in full else ""
    return Prompt(prefix, separator)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and its answer; `input_ids[prompt_length:]` is the answer, its EOS included."""

    input_ids: list[int]
    prompt_length: int
    truncated: bool


class PromptEncoder:
    """Questions and answers to token ids. The ids before an answer do not depend on the answer.

    Args:
        processor: a LLaVA processor.
        style: see `render_prompt`.
        max_length: the most tokens of prompt, picture and answer together; None for no limit.
        on_long_answer: "truncate" cuts the answer (its EOS too: the answer does not end there) and counts it,
            "error" raises. The prompt and the picture's tokens are never cut.
    """

    def __init__(
        self,
        processor: LlavaProcessor,
        style: str = "auto",
        max_length: int | None = None,
        on_long_answer: str = "truncate",
    ) -> None:
        if on_long_answer not in ("truncate", "error"):
            raise ValueError(f"on_long_answer: expected 'truncate' or 'error', got {on_long_answer!r}")
        if processor.tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-sequence token, so no answer could be taught to end"
            )
        self.processor, self.style = processor, style
        self.max_length, self.on_long_answer = max_length, on_long_answer
        self.image_token_id: int = processor.image_token_id
        self._prompt = lru_cache(maxsize=4096)(self._tokenize_prompt)

    def __reduce__(self) -> tuple[type[PromptEncoder], tuple[LlavaProcessor, str, int | None, str]]:
        # An lru_cache cannot be pickled; data-loader workers need the rest.
        return PromptEncoder, (self.processor, self.style, self.max_length, self.on_long_answer)

    def _ids(self, text: str) -> list[int]:
        # A template that writes the BOS itself must not get a second one.
        bos = self.processor.tokenizer.bos_token
        special = bos is None or not text.startswith(bos)
        return self.processor.tokenizer(text, add_special_tokens=special).input_ids

    def _tokenize_prompt(self, question: str) -> tuple[Prompt, tuple[int, ...]]:
        prompt = render_prompt(self.processor, question, self.style)
        ids = tuple(self._ids(prompt.prefix))
        if ids.count(self.image_token_id) != 1:
            raise ValueError(
                f"the tokenizer makes {ids.count(self.image_token_id)} tokens with id {self.image_token_id} of one "
                f"{self.processor.image_token!r}; add it to the tokenizer as a special token"
            )
        return prompt, ids

    def _expand(self, ids: tuple[int, ...], image_tokens: int) -> list[int]:
        at = ids.index(self.image_token_id)
        return [*ids[:at], *[self.image_token_id] * image_tokens, *ids[at + 1 :]]

    def encode_prompt(self, question: str, image_tokens: int) -> list[int]:
        """Token ids up to where the answer begins, the image token repeated `image_tokens` times."""
        return self._expand(self._prompt(question)[1], image_tokens)

    def encode(self, question: str, answer: str, image_tokens: int, record_id: str = "") -> Encoded:
        """Token ids of prompt, answer and EOS.

        Raises:
            ValueError: the prompt alone does not fit `max_length`; the answer does not and `on_long_answer` is
                "error"; or the answer contains the image token.
        """
        where = f"record {record_id}: " if record_id else ""
        if self.processor.image_token in answer:
            raise ValueError(f"{where}the answer contains the image token {self.processor.image_token!r}")
        prompt, short_ids = self._prompt(question)
        full = self._ids(prompt.prefix + prompt.separator + answer)
        if tuple(full[: len(short_ids)]) == short_ids:
            answer_ids = full[len(short_ids) :]
        else:  # the tokenizer merged over the boundary: keep the prefix as generation has it
            answer_ids = self.processor.tokenizer(
                prompt.separator + answer, add_special_tokens=False
            ).input_ids
        answer_ids = [*answer_ids, self.processor.tokenizer.eos_token_id]
        prompt_ids = self._expand(short_ids, image_tokens)
        total = len(prompt_ids) + len(answer_ids)
        truncated = False
        if self.max_length is not None and total > self.max_length:
            truncated = True
            room = self.max_length - len(prompt_ids)
            if room < 1:
                raise ValueError(
                    f"{where}prompt and picture take {len(prompt_ids)} tokens ({image_tokens} of them the picture's), "
                    f"which leaves no room for an answer in max_length={self.max_length}; raise max_length"
                )
            if self.on_long_answer == "error":
                raise ValueError(
                    f"{where}{total} tokens do not fit max_length={self.max_length}; raise it, or set "
                    "on_long_answer=truncate"
                )
            answer_ids = answer_ids[:room]
        return Encoded([*prompt_ids, *answer_ids], len(prompt_ids), truncated)
