"""`rode analyze`: from an adapter on disk to its page."""

from __future__ import annotations

import base64
import json
import re
import sys
from xml.etree import ElementTree

import pytest

from rode.cli import main
from rode.training.config import dump_experiment
from rode.training.train import train

pytest.importorskip("matplotlib")


@pytest.fixture
def adapter(make_experiment):
    """An adapter of two steps, with the config beside it."""
    train(make_experiment(training={"max_steps": 2}), progress=False)
    return make_experiment().run_dir


def fails(capsys, argv, message):
    assert main(argv) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("rode: ")
    assert message in said


def test_the_saved_config_says_what_to_run_on(capsys, adapter):
    assert main(["analyze", str(adapter), "--quiet"]) == 0
    said = capsys.readouterr().out
    found = json.loads((adapter / "analysis" / "analysis.json").read_text())
    assert found["examples"] == {"ingredients": 4, "recipe": 4, "nutrition": 4, "category": 4}
    assert (found["gate"], found["split"], found["answers"], found["against"]) == (
        "relu",
        "test",
        "truth",
        None,
    )
    assert len(found["sharing"]) == 6 * 4 * 2
    assert f"{adapter}: relu gates, 8 experts" in said
    assert "ingredients & recipe" in said
    assert said.strip().endswith(str(adapter / "analysis" / "report.html"))
    page = (adapter / "analysis" / "report.html").read_text()
    # nothing is fetched from elsewhere, and each figure is well-formed
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    figures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(figures) == 5
    for figure in figures:
        assert ElementTree.fromstring(base64.b64decode(figure)).tag.endswith("svg")
    main(["analyze", str(adapter), "--quiet"])
    assert (adapter / "analysis" / "report.html").read_text() == page
    assert not list(adapter.rglob("*.tmp"))


def test_options_and_another_adapter(capsys, adapter, make_experiment, tmp_path, food, llava_dir):
    softmax = make_experiment(
        adapter={"gate": "softmax"}, output_dir=str(tmp_path / "softmax"), training={"max_steps": 1}
    )
    train(softmax, progress=False)
    out = tmp_path / "out"
    argv = ["analyze", str(adapter), "--against", str(tmp_path / "softmax"), "--out", str(out), "--quiet"]
    argv += ["--split", "train", "--limit", "6", "--tasks", "category", "nutrition", "--batch-size", "4"]
    assert main(argv) == 0
    found = json.loads((out / "analysis.json").read_text())
    assert found["examples"] == {"nutrition": 3, "category": 3}
    assert found["against"]["gate"] == "softmax"
    zeros = [one["sparsity"]["all tasks"]["all"]["zeros"] for one in (found, found["against"])]
    assert 0 < zeros[0] < 1
    assert zeros[1] == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'softmax'} (softmax)" in said
    assert "(gate share; 1 is the same)" in said  # softmax's open rates say nothing
    assert (out / "report.html").read_text().count("data:image/svg") == 6
    # the adapter before training: a random router over the bare model
    assert main(["analyze", str(adapter), "--against", "untrained", "--out", str(out), "--quiet"]) == 0
    found = json.loads((out / "analysis.json").read_text())
    assert found["against"]["adapter"] == "untrained"
    assert found["against"]["gate"] == "relu"
    assert found["against"]["open_rate"] != found["open_rate"]
    assert "of untrained" in capsys.readouterr().out
    # without a config beside the adapter: the model and the records are named
    (adapter / "config.yaml").unlink()
    bare = [
        "analyze",
        str(adapter),
        "--model",
        str(llava_dir),
        "--prompt",
        "vicuna",
        "--device",
        "cpu",
        "--quiet",
    ]
    bare += ["--dtype", "float32", "--data", str(food / "records.jsonl"), "--out", str(tmp_path / "bare")]
    assert main([*bare, "--answers", "generated", "--max-new-tokens", "3", "--tasks", "category"]) == 0
    found = json.loads((tmp_path / "bare" / "analysis.json").read_text())
    assert (found["answers"], found["tasks"], found["sharing"]) == ("generated", ["category"], [])
    page = (tmp_path / "bare" / "report.html").read_text()
    assert "the model's own answers" in page
    assert "Which experts tasks share" not in page


def test_what_is_said_when_it_cannot_run(capsys, adapter, monkeypatch, make_experiment, tmp_path, llava_dir):
    fails(capsys, ["analyze", str(tmp_path)], "no config.yaml that names records: give --data records.jsonl")
    plain = make_experiment(
        adapter={"gate": "none"}, output_dir=str(tmp_path / "plain"), training={"max_steps": 1}
    )
    train(plain, progress=False)
    fails(capsys, ["analyze", str(tmp_path / "plain"), "--quiet"], "gate='none': without a router")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text(dump_experiment(make_experiment()))
    fails(capsys, ["analyze", str(empty), "--quiet"], "no adapter here")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(capsys, ["analyze", "/nowhere"], "figures need matplotlib: pip install 'rode[plots]'")


@pytest.mark.parametrize("option", [["--answers", "none"], ["--limit", "0"], []])
def test_wrong_usage_is_2(option):
    with pytest.raises(SystemExit) as exit:
        main(["analyze", *option])
    assert exit.value.code == 2
