"""Rows and batches of every family against what its own processor makes of a whole batch; labels against hand-made ids."""

from __future__ import annotations

import pickle
from contextlib import nullcontext

import pytest
import torch
from PIL import Image

from rode.vlm import IGNORE, GenerationCollator, PixelSource, PromptEncoder, TrainingCollator, load_vlm
from rode.vlm.families import family_of
from rode.vlm.image_features import feature_source
from rode.vlm.load import get_projector, language_model, projector_name
from rode.vlm.loss import answer_loss
from rode.vlm.packing import pack_by_picture, packed_attention
from rode.vlm.prompts import StoredPicture
from rode_food import Example
from tiny_vlms import TINY_VLMS, save_tiny_vlm

SIZES = {"a": (20, 20), "b": (60, 25), "c": (17, 40)}
SEVERAL = [("a",), (), ("b", "c")]


def source(path):
    """A picture of a size of its own for each name."""
    image = Image.new("RGB", SIZES[path], (20, 200, 30))
    image.paste((200, 10, 90), (3, 3, 12, 15))
    return image


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def load(name):
        if name not in made:
            folder = save_tiny_vlm(name, tmp_path_factory.mktemp(name))
            made[name] = load_vlm(folder, dtype="float32", device="cpu")
        return made[name]

    return load


def texts(processor, questions, pictures):
    """Prompts as the families' cards write them."""
    if processor.chat_template is None:
        return ["<image>" * len(paths) + q for q, paths in zip(questions, pictures, strict=True)]
    return [
        processor.apply_chat_template(
            [{"role": "user", "content": [*[{"type": "image"}] * len(paths), {"type": "text", "text": q}]}],
            add_generation_prompt=True,
        )
        for q, paths in zip(questions, pictures, strict=True)
    ]


@pytest.mark.parametrize("name", TINY_VLMS)
def test_a_batch_is_what_the_processor_makes_of_it(name, checkpoints):
    """Rows are made one by one and joined here; the processor makes them all at once."""
    model, processor = checkpoints(name)
    encoder = PromptEncoder(processor, family=family_of(model))
    questions, pictures = ["What is it?", "How much of what is it?"], [("a",), ("b",)]
    batch = GenerationCollator(encoder, source)(pictures, questions)
    prompts = texts(processor, questions, pictures)
    bos = processor.tokenizer.bos_token
    expected = processor(
        text=prompts,
        images=[[source(path) for path in paths] for paths in pictures],
        padding=True,
        padding_side="left",
        add_special_tokens=bos is None or not prompts[0].startswith(bos),
        return_tensors="pt",
    )
    expected = {key: value for key, value in expected.items() if key != "labels"}
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(batch[key], value), key
    again = pickle.loads(pickle.dumps(encoder))  # as a data-loader worker gets it
    assert (
        again.encode_prompt(questions[0], [source("a")]).input_ids
        == batch["input_ids"][0, -int(batch["attention_mask"][0].sum()) :].tolist()
    )


@pytest.mark.parametrize("name", TINY_VLMS)
def test_rows_do_not_depend_on_their_neighbours(name, checkpoints):
    """Logits of an answer alone and in a padded batch, with no picture, one and two, in one batch."""
    model, processor = checkpoints(name)
    collate = TrainingCollator(PromptEncoder(processor, family=family_of(model)), source)
    pictures = SEVERAL
    if name == "paligemma":
        with pytest.raises(
            ValueError, match="record r: a question without a picture: its processor takes no"
        ):
            collate([Example("r", "", "question", "How many?", "3", "", "s", "train")])
        pictures = [("a",), ("b",), ("b", "c")]
    rows = [
        Example(f"r{i}", paths[0] if paths else "", "question", "How many?", "a few" * (i + 1), "", "s", "train", paths[1:])
        for i, paths in enumerate(pictures)
    ]  # fmt: skip
    together = collate(rows)
    labels = together.pop("labels")
    together.pop("truncated")
    with torch.no_grad():
        logits = model(**together).logits
        for i, example in enumerate(rows):
            alone = collate([example])
            del alone["truncated"], alone["labels"]
            length = alone["input_ids"].shape[1]
            torch.testing.assert_close(logits[i, :length], model(**alone).logits[0], rtol=1e-4, atol=1e-4)
    token = model.config.image_token_id
    counts = [int((together["input_ids"][i] == token).sum()) for i in range(3)]
    assert counts[0] > 0
    assert (counts[1] == 0) == (pictures is SEVERAL)
    assert counts[2] > counts[1]
    assert not (labels == token).any()


def text_ids(processor, text):
    return [
        processor.tokenizer.convert_tokens_to_ids("Ġ" if c == " " else "Ċ" if c == "\n" else c) for c in text
    ]


BY_HAND = [
    ("qwen2.5-vl", "", "<|im_end|>"),
    ("idefics3", " ", "<end_of_utterance>"),
    ("gemma3", "", "<end_of_turn>"),
    ("paligemma", "", "<eos>"),
    ("llava", " ", "</s>"),
]


@pytest.mark.parametrize(("name", "separator", "end"), BY_HAND)
def test_labels_are_the_answer_and_the_token_that_ends_a_turn(name, separator, end, checkpoints):
    """By hand: a token for each letter of the answer, and the end; the prompt and the picture are not learned."""
    model, processor = checkpoints(name)
    encoder = PromptEncoder(processor, family=family_of(model))
    batch = TrainingCollator(encoder, source)(
        [Example("r", "a", "category", "What?", "a pie", "", "s", "train")]
    )
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    learned = [*text_ids(processor, f"{separator}a pie"), processor.tokenizer.convert_tokens_to_ids(end)]
    assert labels == [IGNORE] * (len(ids) - len(learned)) + learned
    assert ids[-len(learned) :] == learned
    if name == "paligemma":
        assert batch["token_type_ids"][0].tolist() == [0] * (len(ids) - len(learned)) + [1] * len(learned)
    elif name == "gemma3":
        token = model.config.image_token_id
        assert batch["token_type_ids"][0].tolist() == [int(t == token) for t in ids]


@pytest.mark.parametrize("name", TINY_VLMS)
@pytest.mark.parametrize("text", ["<image>", "<|im_end|> </s> <s>", "<end_of_turn> <image> <start_of_image>"])
def test_text_that_looks_like_a_control_token_is_text(name, text, checkpoints):
    model, processor = checkpoints(name)
    encoder = PromptEncoder(processor, family=family_of(model))
    plain = encoder.encode("Is it good?", "yes", [source("a")])
    row = encoder.encode(f"Is it {text}?", text, [source("a")])
    controls = set(processor.tokenizer.all_special_ids) | {
        i for i, token in processor.tokenizer.added_tokens_decoder.items() if token.special
    }

    def special(ids):
        return [i for i in ids if i in controls]

    assert special(row.input_ids) == special(plain.input_ids)
    letters = processor.tokenizer.decode([i for i in row.input_ids if i not in controls])
    assert letters.count(text) == 2
    for key, value in row.by_token.items():
        assert len(value) == len(row.input_ids), key


@pytest.mark.parametrize("name", TINY_VLMS)
def test_parts_are_found_by_what_they_are(name, checkpoints):
    model, _ = checkpoints(name)
    assert language_model(model).get_input_embeddings() is model.get_input_embeddings()
    projector = projector_name(model)
    assert projector is not None
    assert get_projector(model) is model.get_submodule(projector)
    assert sum(p.numel() for p in get_projector(model).parameters()) > 0


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("name", [name for name in TINY_VLMS if name != "llava"])
def test_stored_features_give_what_pictures_give(name, where, checkpoints, tmp_path):
    """Logits of rows with a picture, with one of another size, and without; from memory, and from the disk by a second store."""
    model, processor = checkpoints(name)
    paths = []
    for key in ("a", "b"):
        paths.append(str(tmp_path / f"{key}.png"))
        source(key).save(paths[-1])
    encoder = PromptEncoder(processor, family=family_of(model))
    pixels = PixelSource(processor)
    rows = [(paths[0],), (paths[1],)] + [()] * (name != "paligemma")
    questions = ["What is it?", "How much of it is <s>there</s>?", "Why?"][: len(rows)]
    live = GenerationCollator(encoder, pixels)(rows, questions)
    directory = tmp_path / "features" if where == "disk" else None
    with torch.no_grad():
        expected = model(**live).logits
        store = feature_source(model, processor, directory)
        assert store.precompute(paths, progress=False) == 2
        if where == "disk":
            store = feature_source(model, processor, directory)
            assert store.precompute(paths, progress=False) == 0
        stored = pickle.loads(pickle.dumps(store))  # as a data-loader worker has it
        batch = GenerationCollator(encoder, stored)(rows, questions)
        assert torch.equal(batch["input_ids"], live["input_ids"])
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(**live).logits, expected)  # pictures still go through


def test_features_behind_a_trained_projector_are_refused(checkpoints):
    model, processor = checkpoints("gemma3")
    with pytest.raises(ValueError, match="expected live for 'gemma3' with a trained projector"):
        feature_source(model, processor, projector_trained=True)
    store = feature_source(model, processor)
    picture = StoredPicture(torch.zeros(4, 8), (20, 20))
    with pytest.raises(ValueError, match="expected live for a question about several pictures, got 2"):
        store.encoder.encode_prompt("?", [picture, picture])


@pytest.mark.parametrize("name", TINY_VLMS)
def test_questions_about_a_picture_share_its_tokens_or_it_is_said_why_not(name, checkpoints, tmp_path):
    """Loss and gradient of packed rows are those of separate ones."""
    model, processor = checkpoints(name)
    family = family_of(model)
    if family.packing is not None:
        assert name in ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "gemma3", "paligemma")
        return
    collate = TrainingCollator(PromptEncoder(processor, family=family), source)
    rows = [
        Example(f"r{i}", "b", "question", "How?" * (i + 1), "so" * (3 - i), "", "s", "train")
        for i in range(3)
    ]
    weight = language_model(model).get_parameter("layers.0.self_attn.q_proj.weight")
    found = []
    for items in (rows, pack_by_picture(rows, 3)):
        batch = collate(items)
        labels, segments = batch.pop("labels"), batch.pop("segments", None)
        del batch["truncated"]
        assert (len(labels), segments is None) in ((3, True), (1, False))
        with nullcontext() if segments is None else packed_attention(language_model(model), segments):
            loss = answer_loss(model, model.get_output_embeddings(), batch, labels)
        loss.backward()
        found.append((loss.detach(), weight.grad))
        weight.grad = None
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5)
