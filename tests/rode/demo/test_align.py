"""Word alignment: patches of a food come near its word, and nothing but the projector changes."""

import pytest
import torch

from rode.demo.align import align_words, ingredient_words, word_vectors
from rode.vlm import Features as Stored
from rode.vlm import load_vlm
from rode.vlm.load import get_projector
from rode_food import Example

WORDS = ("rice", "soup", "beans")


class Features:
    """Pictures whose four patches show the foods in their name, in channels of their own, and noise."""

    crop_cls = True

    def __init__(self, width):
        generator = torch.Generator().manual_seed(0)
        self.food = {word: 3 * torch.randn(width, generator=generator) for word in WORDS}
        self.width = width

    def __call__(self, path):
        generator = torch.Generator().manual_seed(sum(map(ord, path)))
        states = 0.1 * torch.randn(5, self.width, generator=generator)
        for row, word in enumerate(path.split("-")[1:], start=1):
            states[row] += self.food[word]
        return Stored(states, 4)


def example(number, *words):
    path = "-".join([str(number), *words])
    return Example(path, path, "ingredients", "?", ", ".join(words), list(words), "s", "train")


def test_words_are_frequent_ingredients():
    examples = [example(i, "rice") for i in range(5)] + [example(9, "soup")]
    assert ingredient_words(examples) == ["rice"]
    assert ingredient_words(examples, at_least=1) == ["rice", "soup"]
    assert ingredient_words(examples, at_least=1, most=1) == ["rice"]


def test_patches_learn_their_words(llava_dir):
    model, processor = load_vlm(llava_dir, dtype="float32", device="cpu")
    before = {n: p.clone() for n, p in model.named_parameters()}
    source = Features(get_projector(model).linear_1.in_features)
    pairs = [("rice",), ("soup",), ("beans",), ("rice", "soup"), ("beans", "rice"), ("soup", "beans")]
    examples = [example(i, *pairs[i % 6]) for i in range(36)]
    found = align_words(model, processor, examples, source, steps=400, seed=0, progress=False)
    assert found.words == sorted(WORDS)
    assert found.losses[-1] < found.losses[0] / 3
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("multi_modal_projector" in name for name in changed)
    centre = model.get_input_embeddings().weight.mean(0)
    directions = torch.nn.functional.normalize(
        word_vectors(model, processor.tokenizer, found.words) - centre, dim=1
    )
    with torch.no_grad():
        patches = get_projector(model)(source("77-beans-rice").states[1:]) - centre
    nearest = (torch.nn.functional.normalize(patches, dim=1) @ directions.T).argmax(1)
    assert [found.words[i] for i in nearest[:2]] == ["beans", "rice"]


def test_one_seed_one_projector(llava_dir):
    """Whatever state the global generator is in."""
    found = []
    for state in (1, 2):
        model, processor = load_vlm(llava_dir, dtype="float32", device="cpu")
        projector = get_projector(model)
        examples = [example(i, WORDS[i % 3], WORDS[(i + 1) % 3]) for i in range(36)]
        torch.manual_seed(state)
        source = Features(projector.linear_1.in_features)
        losses = align_words(model, processor, examples, source, steps=20, seed=0, progress=False).losses
        found.append((losses, {n: p.clone() for n, p in projector.named_parameters()}))
    (losses, weights), (again, other) = found
    assert losses == again
    assert all(torch.equal(weights[n], other[n]) for n in weights)


def test_too_few_records(llava_dir):
    model, processor = load_vlm(llava_dir, dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="too few records"):
        align_words(model, processor, [example(0, "rice")], Features(8), steps=1, seed=0)
