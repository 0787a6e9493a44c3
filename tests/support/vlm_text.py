"""Special tokens, chat templates and a tiny tokenizer in the manner of the published vision-language families."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_TOKENS = (*CHATML_TOKENS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# what Idefics3 and SmolVLM write around and before a picture's parts
TILE_TOKENS = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *[f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)],
)
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
)


def write_template(before: str, image: str, after: str, start: str, system: str = "", model: str = "") -> str:
    """A Jinja template: each message is `before`, its parts, `after`; `start` opens the answer.

    `image` stands for a picture. `{role}` in `before` is the message's role, or `model` for the assistant's.
    """
    role = "m['role']" if not model else f"('{model}' if m['role'] == 'assistant' else m['role'])"
    before = before.replace("{role}", "{{ " + role + " }}").replace("{Role}", "{{ m['role'] | capitalize }}")
    return (
        system
        + "{% for m in messages %}"
        + before
        + "{% for part in ([{'type': 'text', 'text': m['content']}] if m['content'] is string else m['content']) %}"
        + "{% if part['type'] == 'image' %}"
        + image
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        + after
        + "{% endfor %}{% if add_generation_prompt %}"
        + start
        + "{% endif %}"
    )


def chatml(image: str, system: str = "") -> str:
    return write_template(
        "{{ '<|im_start|>' }}{role}{{ '\\n' }}",
        image,
        "{{ '<|im_end|>\\n' }}",
        "{{ '<|im_start|>assistant\\n' }}",
        system,
    )


def tiny_tokenizer(
    special: Sequence[str],
    *,
    eos: str,
    pad: str,
    bos: str | None = None,
    puts_bos: bool = False,
    **named: str,
) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer: the special tokens, then 256 bytes, no merges.

    Args:
        special: all special tokens; their places are their ids.
        eos, pad, bos: which of them have these parts.
        puts_bos: put `bos` in front of every text, as Llama and Gemma do.
        named: tokens that the family's processor asks its tokenizer for, by attribute (`image_token`, ...).
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos is not None and puts_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, vocabulary[bos])]
        )
    own = {eos, pad, bos, *named.values()}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=pad,
        bos_token=bos,
        padding_side="left",
        extra_special_tokens=named,
    )
    fast.add_special_tokens({"additional_special_tokens": [s for s in special if s not in own]})
    return fast
