"""Training from a file that is too large to be held: the same records, checks, order and bits as if it were."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import set_seed

from rode.training.train import train
from rode.training.usable import Encodable, usable
from rode.vlm import FeatureSource, PromptEncoder
from rode.vlm.families import family_of
from rode.vlm.load import read_processor
from rode_food import Source, data_mixture, load_examples
from rode_food.file_examples import FileExamples
from rode_food.record_scan import Scan
from tiny_llava import draw, tiny_processor
from tiny_vlms import save_tiny_vlm


@pytest.fixture
def read_when_taken(monkeypatch):
    monkeypatch.setattr(data_mixture, "INDEXED_FROM", 0)


def write(path, records):
    path.write_text("".join(json.dumps({"source": "s", "split": "train", **r}) + "\n" for r in records))
    return Source(str(path))


@pytest.fixture
def mixed(tmp_path):
    """A file of records of which some cannot be used."""
    for number in range(4):
        draw(tmp_path / f"{number}.png", (60 * number, 100, 200))
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    records = []
    for number in range(24):
        record = {"id": f"dish{number}", "image": f"{number % 4}.png", "category": f"dish {number}"}
        record["ingredients"] = [{"name": "rice"}, {"name": "ö" * (number % 5 + 1)}]
        records.append(record)
    records[3]["image"] = "broken.png"
    records[5]["image"] = ["1.png", "gone.png"]
    records[7]["category"] = "half \ud83c"
    records[9]["category"] = "long " * 60
    records[11]["conversation"] = [{"question": "And?", "answer": "Nothing, " * 40}]
    return write(tmp_path / "records.jsonl", records)


@pytest.mark.parametrize("max_length", [None, 220])
def test_what_cannot_be_used_is_the_same(mixed, monkeypatch, max_length):
    encoder = PromptEncoder(tiny_processor(), "vicuna", max_length, "error")
    found = []
    for limit in (10**9, 0):
        monkeypatch.setattr(data_mixture, "INDEXED_FROM", limit)
        mixture = load_examples([mixed], "train", wording="all")
        with pytest.raises(
            ValueError, match=r"more\); mend the record, or set data.on_bad_record=skip"
        ) as raised:
            usable(mixture, "error", [Encodable(encoder, positions=500)])
        kept, lines = usable(mixture, "skip", [Encodable(encoder, positions=500)])
        found.append((str(raised.value), list(kept.examples), lines))
    assert found[0] == found[1]
    assert any("half of a surrogate pair" in line for line in found[0][2])
    assert any("tokens" in line for line in found[0][2])
    assert any("broken.png" in line for line in found[0][2])


def test_checks_that_know_no_sizes_see_every_example(mixed, read_when_taken):
    seen = []
    usable(load_examples([mixed], "train"), "skip", [lambda example: seen.append(example.record_id)])
    assert len(set(seen)) == 22  # those with other problems are not asked further


@pytest.fixture(scope="module", params=["llava", "gemma3", "internvl"])
def processor_of(request, tmp_path_factory):
    """(kind, processor, its family)"""
    processor, config = read_processor(save_tiny_vlm(request.param, tmp_path_factory.mktemp("model")))
    return request.param, processor, family_of(config)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=6), st.integers(60, 400))
def test_what_fits_by_its_size_fits(processor_of, tmp_path_factory, answers, max_length):
    kind, processor, family = processor_of
    folder = tmp_path_factory.mktemp("file")
    draw(folder / "0.png", (10, 100, 200))
    records = [
        {
            "id": str(number),
            "conversation": [{"question": text, "answer": text}],
            **({"image": "0.png"} if number % 2 else {}),
        }
        for number, text in enumerate(answers)
        if text.strip()
    ]
    source = write(folder / "records.jsonl", records)
    encoder = PromptEncoder(processor, "auto", max_length, "error", family)
    check = Encodable(encoder)
    examples = FileExamples(Scan(source, "train"))
    fits = check.surely_fit(examples).tolist()
    assert all(check(example) is None for example, fit in zip(examples, fits, strict=True) if fit)
    short = all(len(text.encode("utf-8", "ignore")) < 20 and text.isprintable() for text in answers)
    if kind == "llava" and max_length > 300 and short:
        assert all(fits)


OPTIONS = [
    {},
    {"workers": 2, "group_by_length": True},
    {"questions_per_picture": 3, "group_by_length": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_training_has_the_same_bits(mixed, make_experiment, tmp_path, monkeypatch, options):
    weights = []
    for name, limit in (("held", 10**9), ("read", 0)):
        monkeypatch.setattr(data_mixture, "INDEXED_FROM", limit)
        experiment = make_experiment(
            output_dir=str(tmp_path / name),
            data={"sources": [{"path": mixed.path}], "on_bad_record": "skip"},
            training={"batch_size": 2, "max_steps": 5, "save_steps": 2, "save_total_limit": 5, **options},
        )
        set_seed(0)
        train(experiment, progress=False)
        weights.append(load_file(experiment.run_dir / "adapter_model.safetensors"))
        if name == "read" and not options:  # an interrupted run goes on at its place
            (experiment.run_dir / "training.json").unlink()
            train(experiment, progress=False, resume=experiment.run_dir / "checkpoint-2")
            again = load_file(experiment.run_dir / "adapter_model.safetensors")
            assert all(again[key].equal(value) for key, value in weights[0].items())
    assert all(weights[1][key].equal(value) for key, value in weights[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 10**9])
def test_a_thousand_broken_pictures_among_ten_thousand(tmp_path, monkeypatch, limit, caplog):
    monkeypatch.setattr(data_mixture, "INDEXED_FROM", limit)
    for number in range(10_000):
        path = tmp_path / f"{number}.png"
        if number == 0:
            Image.new("RGB", (8, 8)).save(path)
            sound = path.read_bytes()
        else:
            path.write_bytes(sound[:40] if number % 10 == 7 else sound)
    source = write(
        tmp_path / "records.jsonl",
        [{"id": f"dish{n}", "image": f"{n}.png", "category": "soup"} for n in range(10_000)],
    )
    mixture = load_examples([source], "train")
    with pytest.raises(
        ValueError, match=r"record dish7: .*7.png: .* \(and 999 more\); mend the record"
    ) as raised:
        usable(mixture, "error")
    assert len(str(raised.value)) < 500
    kept, lines = usable(mixture, "skip")
    assert [example.record_id for example in kept.examples] == [
        f"dish{n}" for n in range(10_000) if n % 10 != 7
    ]
    assert len(lines) == 1000


@pytest.mark.parametrize("limit", [0, 10**9])
@pytest.mark.parametrize("kept_in", ["memory", "disk"])
def test_one_picture_asked_ten_thousand_times_costs_its_features_once(
    llava_dir, tmp_path, make_experiment, monkeypatch, limit, kept_in
):
    monkeypatch.setattr(data_mixture, "INDEXED_FROM", limit)
    draw(tmp_path / "0.png", (10, 100, 200))
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    source = write(
        tmp_path / "records.jsonl",
        [
            {"id": f"dish{n}", "image": ("0.png", "copy.png")[n % 2], "category": "soup"}
            for n in range(10_000)
        ],
    )
    computed = []
    real = FeatureSource._compute
    monkeypatch.setattr(
        FeatureSource, "_compute", lambda self, path: computed.append(path) or real(self, path)
    )
    experiment = make_experiment(
        model={"vision_features": kept_in, "features_dir": str(tmp_path / "features")},
        data={"sources": [{"path": source.path}]},
        training={"max_steps": 2},
    )
    train(experiment, progress=False)
    assert len(computed) == 1
