"""No text has more tokens than the bound by its bytes says."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rode.vlm.token_bound import tokens_per_byte

CORPUS = ["rice with beans", "Ölige Äpfel", "İstanbul", "粥", "boil the rice until it is done"]


def trained(model, trainer, normalizer=None, pre_tokenizer=None):
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_level(normalizer=None):
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return trained(models.BPE(), trainer, normalizer, pre_tokenizers.ByteLevel())


def llama(space="▁"):
    """A vocabulary like Llama's: bytes for what it lacks, a sign for a space."""
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh"]
    model = models.BPE(
        {token: i for i, token in enumerate(vocabulary)},
        [],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    tokenizer.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {
    "byte level": (byte_level(), 1),
    "NFC": (byte_level(normalizers.NFC()), 3),
    "NFD in lower case": (byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])), 6),
    "llama": (llama(), 1),
    "word pieces": (
        trained(
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"]),
            normalizers.Lowercase(),
            pre_tokenizers.Whitespace(),
        ),
        2,
    ),
    "unigram": (
        trained(
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=40, unk_token="<unk>", special_tokens=["<unk>"]),
        ),
        1,
    ),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None)
@given(st.text(max_size=20))
@example("İİİ")
@example("\U0001d160" * 3)  # three times as many bytes in NFC
@example("\u0390" * 3)  # three times as many bytes in NFD
@example(" \n  a ")
@example("粥 🍲")
def test_the_bound_holds(kind, text):
    tokenizer, factor = TOKENIZERS[kind]
    assert tokens_per_byte(tokenizer) == factor
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return
    assert len(tokenizer(text, add_special_tokens=False).input_ids) <= factor * size + 1


def test_what_is_not_known_has_no_bound():
    assert tokens_per_byte(byte_level(normalizers.NFKC())) is None
    assert (
        tokens_per_byte(byte_level(normalizers.Sequence([normalizers.NFC(), normalizers.BertNormalizer()])))
        is None
    )
    assert tokens_per_byte(byte_level(normalizers.Replace("a", "aaaa"))) is None
    assert tokens_per_byte(llama(space="□")) is None  # a sign that becomes three bytes' tokens
    assert tokens_per_byte(object()) is None
