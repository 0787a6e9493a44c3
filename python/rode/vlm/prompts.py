"""Prompts: what stands before an answer, in text and in token ids, the same for training and generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image

from rode.vlm.families import Family

if TYPE_CHECKING:
    from transformers import ProcessorMixin

PROMPT_STYLES = ("vicuna", "chat_template", "auto")
# Vicuna v1.1's sentence, which LLaVA-1.5 (conversation "v1") trains with.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_QUESTION, _ANSWER = "\u241fquestion\u241f", "\u241fanswer\u241f"


class Features(NamedTuple):
    """A picture as the hidden states of a LLaVA's tower: (tower tokens, hidden x layers), and how many tokens it takes."""

    states: torch.Tensor
    tokens: int


class StoredPicture(NamedTuple):
    """A picture as what a model's `get_image_features` made of it, and its (width, height), by which its tokens are counted."""

    features: torch.Tensor
    size: tuple[int, int]


Picture = Image.Image | Features | StoredPicture


@dataclass(frozen=True)
class Prompt:
    """A question put into words for the model.

    Attributes:
        before, question, after: the text up to where the answer begins; the pictures' placeholders are not in `question`.
        separator: stands between that and the answer, and is learned with the answer.
        closing: the text that the template puts behind an answer.
    """

    before: str
    question: str
    after: str
    separator: str
    closing: str = ""

    @property
    def prefix(self) -> str:
        return self.before + self.question + self.after


def render_prompt(
    processor: ProcessorMixin,
    question: str,
    style: str = "auto",
    pictures: int = 1,
    family: Family | None = None,
) -> Prompt:
    """Word a question about pictures.

    Args:
        processor: of the model (tokenizer, perhaps image_token and chat_template).
        question: without placeholders for pictures.
        style: "vicuna" (Vicuna v1: USER:/ASSISTANT:), "chat_template" (the processor's own template, else the
            tokenizer's) or "auto" (a template where there is one, else the family's way, else Vicuna).
        pictures: how many the question is about.
        family: of the model; None for the common way.

    Raises:
        ValueError: unknown style, no template, or one that does not repeat the question.
    """
    if style not in PROMPT_STYLES:
        raise ValueError(f"prompt: expected one of {', '.join(PROMPT_STYLES)}, got {style!r}")
    tokenizer: Any = processor.tokenizer
    has_template = bool(getattr(processor, "chat_template", None) or tokenizer.chat_template)
    own = None if family is None else family.template
    image = str(getattr(processor, "image_token", ""))
    if style == "auto" and not has_template and own is not None:
        before, after = own(processor, _QUESTION, pictures).split(_QUESTION)
        return Prompt(before, question, after, "")
    if style == "vicuna" or (style == "auto" and not has_template):
        return Prompt(f"{VICUNA_SYSTEM} USER: " + f"{image}\n" * pictures, question, " ASSISTANT:", " ")
    if not has_template:
        raise ValueError(
            "prompt 'chat_template': neither processor nor tokenizer has a chat template; use 'vicuna'"
        )

    def render(answer: str | None) -> str:
        if getattr(processor, "chat_template", None):
            content = [*[{"type": "image"}] * pictures, {"type": "text", "text": _QUESTION}]
            messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
            if answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            apply: Any = processor.apply_chat_template
        else:
            messages = [{"role": "user", "content": f"{image}\n" * pictures + _QUESTION}]
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
            apply = tokenizer.apply_chat_template
        return str(apply(messages, tokenize=False, add_generation_prompt=answer is None))

    prefix = render(None)
    if prefix.count(_QUESTION) != 1:
        raise ValueError("the chat template leaves out the question; use prompt 'vicuna'")
    before, after = prefix.split(_QUESTION)
    # "ASSISTANT:" then " answer" in llava-hf's template, "assistant\n" then "answer" in ChatML: ask the template.
    full = render(_ANSWER)
    if not full.startswith(prefix) or _ANSWER not in full:
        return Prompt(before, question, after, "")
    separator, _, closing = full[len(prefix) :].partition(_ANSWER)
    return Prompt(before, question, after, separator, closing)


@dataclass(frozen=True, eq=False)
class Encoded:
    """One row.

    Attributes:
        input_ids: prompt, then (in training) the answer, its end included.
        prompt_length: how many of them are the prompt's.
        truncated: whether the answer was cut.
        by_token: the processor's further inputs with a value for each token, such as token_type_ids: (T, ...).
        vision: the pictures' tensors, as the processor gives them for one row.
    """

    input_ids: list[int]
    prompt_length: int
    truncated: bool = False
    by_token: dict[str, torch.Tensor] = field(default_factory=dict)
    vision: dict[str, torch.Tensor] = field(default_factory=dict)


class PromptEncoder:
    """Questions and answers to token ids. The ids before an answer do not depend on the answer.

    Text of a record that looks like a control token (`<s>`, `<image>`, `<|im_end|>`) is tokenized as the text that it is.

    Args:
        processor: of the model.
        style: see `render_prompt`.
        max_length: the most tokens of prompt, pictures and answer together; None for no limit.
        on_long_answer: "truncate" cuts the answer (its end too: the answer does not end there) and counts it,
            "error" raises. The prompt and the pictures' tokens are never cut.
        family: of the model, see `rode.vlm.families.family_of`; None for the common way.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        style: str = "auto",
        max_length: int | None = None,
        on_long_answer: str = "truncate",
        family: Family | None = None,
    ) -> None:
        if on_long_answer not in ("truncate", "error"):
            raise ValueError(f"on_long_answer: expected 'truncate' or 'error', got {on_long_answer!r}")
        self.processor, self.style, self.family = processor, style, family or Family()
        self.tokenizer: Any = processor.tokenizer
        self.max_length, self.on_long_answer = max_length, on_long_answer
        token = getattr(processor, "image_token", None)
        found = getattr(processor, "image_token_id", None)
        if found is None and token is not None:
            found = self.tokenizer.convert_tokens_to_ids(token)
        self.image_token_id: int | None = found
        self._controls = _control_texts(processor)
        self._template = lru_cache(maxsize=64)(self._render)
        self._blank = lru_cache(maxsize=4096)(self._blank_row)
        self._length = lru_cache(maxsize=4096)(self._length_of)
        self.end_id = self._end()

    def __reduce__(self) -> tuple[type[PromptEncoder], tuple[Any, ...]]:
        # An lru_cache cannot be pickled; data-loader workers need the rest.
        return PromptEncoder, (self.processor, self.style, self.max_length, self.on_long_answer, self.family)

    def _end(self) -> int:
        """The token that ends an answer: the template's, if it closes an answer with a control token, else the tokenizer's EOS."""
        closing = self._prompt("?", 1).closing
        ids = self._raw(closing)
        if ids and ids[0] in set(self.tokenizer.all_special_ids) | _special_ids(self.tokenizer):
            return int(ids[0])
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-sequence token, so no answer could be taught to end"
            )
        return int(self.tokenizer.eos_token_id)

    def _render(self, pictures: int) -> Prompt:
        return render_prompt(self.processor, "", self.style, pictures, self.family)

    def _prompt(self, question: str, pictures: int) -> Prompt:
        # the words around a question do not depend on it, and a server is asked questions without end
        return replace(self._template(pictures), question=question)

    def _is_text(self, text: str) -> bool:
        """Whether no control token would be found in a record's text."""
        return not any(control in text for control in self._controls)

    def _plain(self, text: str) -> list[int]:
        """Ids of text in which nothing is a control token."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    def _raw(self, text: str) -> list[int]:
        """Ids of a part of a prompt, without BOS."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids) if text else []

    def _adds_bos(self, text: str) -> bool:
        # A template that writes the BOS itself must not get a second one.
        bos = self.tokenizer.bos_token
        return bos is None or not text.startswith(bos)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=self._adds_bos(text)).input_ids)

    def _prompt_row(self, question: str, pictures: Sequence[Picture]) -> Encoded:
        if not pictures and self.family.no_picture is not None:
            raise ValueError(f"a question without a picture: {self.family.no_picture}")
        prompt = self._prompt(question, len(pictures))
        whole = self._is_text(question)
        text = prompt.prefix if whole else prompt.before
        states = [picture for picture in pictures if isinstance(picture, Features)]
        stored = [picture for picture in pictures if isinstance(picture, StoredPicture)]
        if states:
            row = self._stored_row(text, states)
        elif stored:
            if len(pictures) > 1:  # some processors cut several pictures otherwise than one
                raise ValueError(
                    f"model.vision_features: expected live for a question about several pictures, got {len(pictures)} of them"
                )
            blank = self._blank(text, stored[0].size)
            vision = {**blank.vision, "pixel_values": stored[0].features}
            row = Encoded(blank.input_ids, blank.prompt_length, False, blank.by_token, vision)
        else:
            row = self._processed(text, [picture for picture in pictures if isinstance(picture, Image.Image)])
        ids = row.input_ids
        if not whole:
            end = self._raw(self.family.appended)
            ids = [*ids[: len(ids) - len(end)], *self._plain(question), *self._raw(prompt.after), *end]
        if len(pictures) > (found := ids.count(-1 if self.image_token_id is None else self.image_token_id)):
            # Templates written for text alone drop list content, or the image entry of it.
            raise ValueError(
                f"the prompt has {found} image tokens {getattr(self.processor, 'image_token', None)!r} for {len(pictures)} "
                "picture(s); use prompt 'vicuna', or see to it that the token is a special token of the tokenizer"
            )
        added = len(ids) - len(row.input_ids)
        by_token = {name: _extended(values, added, 0) for name, values in row.by_token.items()}
        return Encoded(ids, len(ids), False, by_token, row.vision)

    def _processed(self, text: str, images: list[Image.Image]) -> Encoded:
        made = self.processor(
            text=[text],
            images=[images] if images else None,
            add_special_tokens=self._adds_bos(text),
            return_tensors="pt",
        )
        return self._split(dict(made))

    def _blank_row(self, text: str, size: tuple[int, int]) -> Encoded:
        """The row of a picture of this size, without its pixels: how many tokens it takes does not depend on them."""
        row = self._processed(text, [Image.new("RGB", size)])
        vision = {name: value for name, value in row.vision.items() if not name.startswith("pixel")}
        return Encoded(row.input_ids, row.prompt_length, False, row.by_token, vision)

    def _stored_row(self, text: str, stored: Sequence[Features]) -> Encoded:
        """LLaVA's way of counting: as many image tokens as the tower gives."""
        ids: list[int] = []
        counts = iter(stored)
        for token in self._ids(text):
            found = next(counts, None) if token == self.image_token_id else None
            ids += [token] if found is None else [token] * found.tokens
        return Encoded(
            ids, len(ids), vision={"pixel_values": torch.stack([picture.states for picture in stored])}
        )

    def _split(self, made: dict[str, Any]) -> Encoded:
        """The processor's tensors for one row: ids, inputs with a value for each token, and the pictures'."""
        ids = made.pop("input_ids")
        made.pop("attention_mask", None)
        made.pop("labels", None)
        tokens = ids.shape[1]
        by_token = {
            name: value[0]
            for name, value in made.items()
            if not name.startswith(("pixel", "image")) and value.shape[:2] == (1, tokens)
        }
        vision = {name: value for name, value in made.items() if name not in by_token}
        return Encoded(ids[0].tolist(), tokens, False, by_token, vision)

    def text_length(self, question: str) -> int:
        """Tokens of a prompt with one picture whose placeholder counts as it stands in the text."""
        return self._length(question)

    def _length_of(self, question: str) -> int:
        return len(self._ids(self._prompt(question, 1).prefix))

    def encode_prompt(self, question: str, pictures: Sequence[Picture]) -> Encoded:
        """The row up to where the answer begins."""
        return self._prompt_row(question, pictures)

    def _answer_ids(self, prompt: Prompt, answer: str) -> list[int]:
        if not self._is_text(answer):
            return [*self._raw(prompt.separator), *self._plain(answer)]
        if self._is_text(prompt.question):
            prefix = prompt.prefix + self.family.appended
            before, full = self._ids(prefix), self._ids(prefix + prompt.separator + answer)
            if full[: len(before)] == before:
                return full[len(before) :]
        # the tokenizer merged over the boundary: keep the prefix as generation has it
        return self._raw(prompt.separator + answer)

    def encode(self, question: str, answer: str, pictures: Sequence[Picture], record_id: str = "") -> Encoded:
        """The row of prompt, answer and end.

        Raises:
            ValueError: the prompt alone does not fit `max_length`, or the answer does not and `on_long_answer` is "error".
        """
        where = f"record {record_id}: " if record_id else ""
        try:
            refuse_half_characters(question, "question")
            refuse_half_characters(answer, "answer")
            row = self._prompt_row(question, pictures)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error
        answer_ids = [*self._answer_ids(self._prompt(question, len(pictures)), answer), self.end_id]
        total = row.prompt_length + len(answer_ids)
        truncated = False
        if self.max_length is not None and total > self.max_length:
            truncated = True
            room = self.max_length - row.prompt_length
            if room < 1:
                taken = row.input_ids.count(-1 if self.image_token_id is None else self.image_token_id)
                raise ValueError(
                    f"{where}prompt and picture take {row.prompt_length} tokens ({taken} of them the picture's), "
                    f"which leaves no room for an answer in max_length={self.max_length}; raise max_length"
                )
            if self.on_long_answer == "error":
                raise ValueError(
                    f"{where}{total} tokens do not fit max_length={self.max_length}; raise it, or set "
                    "on_long_answer=truncate"
                )
            answer_ids = answer_ids[:room]
        by_token = {
            name: _extended(values, len(answer_ids), self.family.answer_inputs.get(name, 0))
            for name, values in row.by_token.items()
        }
        return Encoded([*row.input_ids, *answer_ids], row.prompt_length, truncated, by_token, row.vision)


def refuse_half_characters(text: str, what: str) -> None:
    """Raise ValueError for a text with half of a surrogate pair, as JSON's `"\\ud83c"` makes one: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the {what} cannot be encoded: character {error.start + 1} is {text[error.start]!r}, half of a surrogate pair; "
            "write the whole character"
        ) from None


def _extended(values: torch.Tensor, count: int, value: int) -> torch.Tensor:
    """(T, ...) with `count` more tokens: a number for each token gets `value`, a row of a mask repeats the last."""
    if values.dim() == 1:
        return torch.cat([values, values.new_full((count,), value)])
    return torch.cat([values, values[-1:].expand(count, *values.shape[1:])])


def _special_ids(tokenizer: Any) -> set[int]:
    """Ids of every control token, also of those that have no name of their own in the tokenizer."""
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def _control_texts(processor: ProcessorMixin) -> tuple[str, ...]:
    """Texts that the tokenizer or the processor would take for control tokens."""
    tokenizer: Any = processor.tokenizer
    texts = {str(token) for token in tokenizer.all_special_tokens}
    texts |= {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
    for name in (
        "image_token",
        "video_token",
        "boi_token",
        "eoi_token",
        "fake_image_token",
        "global_image_token",
    ):
        texts.add(str(getattr(processor, name, None) or ""))
    return tuple(sorted(texts - {""}))
