"""Features computed once give the bits that pictures give."""

from __future__ import annotations

import copy
import pickle
import shutil

import pytest
import torch

from rode.vlm import FeatureSource, PixelSource, PromptEncoder, TrainingCollator, accept_features
from rode.vlm.families.llava import fit_processor
from rode.vlm.features import pooled
from tiny_llava import draw, tiny_model, tiny_processor

TOWERS = [("clip", -2), ("clip", [-3, -1]), ("dinov2", -1), ("dinov2", 2), ("siglip", -1)]


def logits(model, batch):
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k not in ("labels", "truncated")}).logits


@pytest.mark.parametrize(("tower", "layer"), TOWERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_for_bit(tower, layer, dtype, examples):
    model, processor = tiny_model(tower, vision_feature_layer=layer).to(dtype), tiny_processor()
    fit_processor(processor, model.config)
    encoder = PromptEncoder(processor, "vicuna")
    live = TrainingCollator(encoder, PixelSource(processor))(examples[:1])
    expected = logits(model, live)
    source = FeatureSource(model, processor)
    cached = TrainingCollator(encoder, source)(examples[:1])
    tokens = 4 if tower == "siglip" else 5
    assert cached["pixel_values"].shape == (1, tokens, 16 * (len(layer) if isinstance(layer, list) else 1))
    if (
        tower == "siglip"
    ):  # its output is laid out by columns, and some processors multiply that in another order
        torch.testing.assert_close(logits(model, cached), expected)
    else:
        assert torch.equal(logits(model, cached), expected)
    assert torch.equal(logits(model, live), expected)  # pictures still go through
    other = TrainingCollator(encoder, source)([examples[1]])
    assert not torch.equal(logits(model, other), expected)


def test_a_batch_of_features_equals_a_batch_of_pictures(examples):
    model, processor = tiny_model(), tiny_processor()
    encoder = PromptEncoder(processor, "vicuna")
    expected = logits(model, TrainingCollator(encoder, PixelSource(processor))(examples[:4]))
    actual = logits(model, TrainingCollator(encoder, FeatureSource(model, processor))(examples[:4]))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_picture_is_computed_once_and_told_by_its_content(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    picture = draw(tmp_path / "a.png", (200, 30, 30))
    shutil.copy(picture, tmp_path / "copy.png")
    store = tmp_path / "features"
    for directory, again in ((None, 1), (store, 0)):
        source = FeatureSource(model, processor, directory)
        assert (
            source.precompute([str(picture), str(tmp_path / "copy.png"), str(picture)], progress=False) == 1
        )
        second = FeatureSource(model, processor, directory)
        assert second.precompute([str(picture)], progress=False) == again
        assert torch.equal(second(str(picture)).states, source(str(tmp_path / "copy.png")).states)
    before = source(str(picture)).states
    draw(picture, (10, 200, 30))
    fresh = FeatureSource(model, processor, store)
    assert fresh.precompute([str(picture)], progress=False) == 1
    assert not torch.equal(fresh(str(picture)).states, before)
    # another tower, another preprocessing: neither may find the first one's states
    assert FeatureSource(tiny_model(seed=1), processor, store).precompute([str(picture)], progress=False) == 1
    processor.image_processor.do_normalize = False
    assert FeatureSource(model, processor, store).precompute([str(picture)], progress=False) == 1
    assert not list(store.rglob("*.tmp"))


def test_the_model_stays_what_it_was(tmp_path):
    model = tiny_model()
    names, text = list(model.state_dict()), repr(model)
    accept_features(model)
    accept_features(model)  # once is enough
    assert list(model.state_dict()) == names
    assert repr(model) == text
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    features = torch.randn(1, 5, 16)
    ids = torch.tensor([[1, 4, 4, 4, 4, 9]])
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=features).logits
        assert torch.equal(copy.deepcopy(model)(input_ids=ids, pixel_values=features).logits, expected)


def test_a_worker_reads_and_does_not_compute(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    known, unknown = (str(draw(tmp_path / f"{c}.png", (c, c, c))) for c in (10, 20))
    source = FeatureSource(model, processor)
    source.precompute([known], progress=False)
    worker = pickle.loads(pickle.dumps(source))
    assert torch.equal(worker(known).states, source(known).states)
    with pytest.raises(KeyError, match="not computed before"):
        worker(unknown)


def test_pooled_patches_are_the_means_of_squares():
    states = torch.randn(1 + 36, 5)
    found = pooled(states, 3, 1)
    expected = torch.nn.functional.avg_pool2d(states[1:].T.reshape(5, 6, 6), 3).flatten(1).T
    torch.testing.assert_close(found, torch.cat([states[:1], expected]))
    assert pooled(states, 1, 1) is states
    assert pooled(states.bfloat16(), 2, 1).dtype == torch.bfloat16
    for size, tokens in ((4, 37), (2, 9)):
        with pytest.raises(
            ValueError, match=r"model\.picture_pool: expected a divisor of the patches on a side"
        ):
            pooled(states[:tokens], size, 1)


def test_a_pooled_picture_takes_fewer_tokens(examples, tmp_path):
    model, processor = tiny_model(), tiny_processor()
    encoder = PromptEncoder(processor, "vicuna")
    whole = FeatureSource(model, processor, tmp_path)
    source = FeatureSource(model, processor, tmp_path, pool=2)
    assert whole.directory != source.directory
    assert (whole(examples[0].image).tokens, source(examples[0].image).tokens) == (4, 1)
    batch = TrainingCollator(encoder, source)(examples[:2])
    assert int((batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum()) == 2
    assert logits(model, batch).isfinite().all()
