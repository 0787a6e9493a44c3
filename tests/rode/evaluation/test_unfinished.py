"""An evaluation that is killed goes on where it was, with the answers, scores and gates of one that ran through."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rode.evaluation import PARTIAL
from rode.evaluation import unfinished as module
from rode.evaluation.evaluate import evaluate
from rode.evaluation.unfinished import GATES, unfinished, weights_digest
from rode.tuner import GateStatistics
from rode.vlm import load_adapter, load_vlm

RUN = {"questions": "abc", "weights": "def", "prompt": "auto", "batch_size": 2, "max_new_tokens": 8}
RESULTS = ("predictions.jsonl", "metrics.json", "gates.json")


class Killed(BaseException):
    pass


@pytest.fixture
def asked(taught, llava_dir):
    """Model, processor and nine questions."""
    result, examples = taught
    base, processor = load_vlm(str(llava_dir), dtype="float32", device="cpu")
    model = load_adapter(base, result.output_dir)
    return model, processor, [*examples, *examples[:3]]


def run(asked, folder, **options):
    model, processor, examples = asked
    options = {"prompt": "vicuna", "batch_size": 2, "max_new_tokens": 4, "progress": False} | options
    return evaluate(model, processor, examples, folder, **options)


def stop_after(monkeypatch, batches):
    """The process ends after so many batches, as if it were killed."""
    add = module.Unfinished.add

    def then_stop(self, answers, gates):
        add(self, answers, gates)
        if self._batches == batches:
            raise Killed

    monkeypatch.setattr(module.Unfinished, "add", then_stop)


@pytest.mark.parametrize("batches", [1, 3, 5])
def test_it_goes_on_with_the_same_results(asked, tmp_path, monkeypatch, batches):
    scores = run(asked, tmp_path / "whole")
    with monkeypatch.context() as patched, suppress(Killed):
        stop_after(patched, batches)
        run(asked, tmp_path / "part")
    assert {p.name for p in (tmp_path / "part").iterdir()} - {".lock"} == {PARTIAL, GATES}
    asked_again = []
    generate = type(asked[0].get_base_model()).generate
    with monkeypatch.context() as patched:
        patched.setattr(
            type(asked[0].get_base_model()),
            "generate",
            lambda self, *a, **k: asked_again.append(len(k["input_ids"])) or generate(self, *a, **k),
        )
        assert run(asked, tmp_path / "part", resume=True) == scores
    assert sum(asked_again) == 9 - min(9, 2 * batches)
    for name in RESULTS:
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "part" / PARTIAL).exists()
    assert not (tmp_path / "part" / GATES).exists()


def test_without_resume_nothing_is_lost(asked, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, suppress(Killed):
        stop_after(patched, 2)
        run(asked, tmp_path)
    before = (tmp_path / PARTIAL).read_bytes()
    with pytest.raises(FileExistsError, match="stopped here before its end; --resume goes on"):
        run(asked, tmp_path)
    assert (tmp_path / PARTIAL).read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 3}, "batch_size"),
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"prompt": "auto"}, "prompt"),
    ],
)
def test_another_run_is_refused(asked, tmp_path, monkeypatch, change, named):
    with monkeypatch.context() as patched, suppress(Killed):
        stop_after(patched, 2)
        run(asked, tmp_path)
    with pytest.raises(ValueError, match=f"had other {named};"):
        run(asked, tmp_path, resume=True, **change)


def test_other_weights_and_questions_are_refused(asked, tmp_path, monkeypatch):
    model, processor, examples = asked
    with monkeypatch.context() as patched, suppress(Killed):
        stop_after(patched, 2)
        run(asked, tmp_path)
    with pytest.raises(ValueError, match="had other questions;"):
        run((model, processor, examples[1:]), tmp_path, resume=True)
    trained = next(p for n, p in model.named_parameters() if n.endswith("B.default") or n.endswith(".B"))
    with torch.no_grad():
        trained.add_(1e-3)
    try:
        with pytest.raises(ValueError, match="had other weights;"):
            run(asked, tmp_path, resume=True)
    finally:
        with torch.no_grad():
            trained.sub_(1e-3)


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(st.lists(st.text(), min_size=1, max_size=3), max_size=5),
    cut=st.integers(0, 400),
    counted=st.none() | st.integers(0, 5),
)
def test_whatever_was_written_is_taken_up_to_the_last_whole_batch(tmp_path_factory, batches, cut, counted):
    """Torn anywhere, and with the gates any number of batches behind."""
    folder = tmp_path_factory.mktemp("torn")
    with suppress(Killed), unfinished(folder, RUN, resume=False, with_gates=False) as kept:
        for batch in batches:
            kept.add(batch, None)
        raise Killed
    whole = (folder / PARTIAL).read_bytes()
    (folder / PARTIAL).write_bytes(whole[:cut])
    lines = whole[:cut].count(b"\n") - 1
    if counted is not None:
        (folder / GATES).write_text(json.dumps({"batches": counted, "sums": {}}))
    for with_gates in (True, False):  # what is cut off for the gates' sake is cut off
        want = min(max(lines, 0), (counted or 0) if with_gates else len(batches))
        copy = folder / str(with_gates)
        copy.mkdir()
        for name in (PARTIAL, GATES):
            if (folder / name).exists():
                shutil.copy(folder / name, copy)
        with suppress(Killed), unfinished(copy, RUN, resume=True, with_gates=with_gates) as kept:
            assert kept.answers == [text for batch in batches[:want] for text in batch]
            kept.add(["more"], None)
            raise Killed
        with suppress(Killed), unfinished(copy, RUN, resume=True, with_gates=False) as kept:
            assert kept.answers == [*(text for batch in batches[:want] for text in batch), "more"]
            raise Killed


def test_one_evaluation_at_a_time(tmp_path):
    refused = []

    def second():
        try:
            with unfinished(tmp_path, RUN, resume=True, with_gates=False):
                pass
        except BlockingIOError as error:
            refused.append(error)

    with unfinished(tmp_path, RUN, resume=False, with_gates=False):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1


def test_the_digest_sees_each_parameter(asked):
    model, *_ = asked
    before = weights_digest(model)
    assert weights_digest(model) == before
    for p in list(model.parameters())[::7]:
        with torch.no_grad():
            old = p.flatten()[0].clone()
            p.view(-1)[0] += 1
            assert weights_digest(model) != before
            p.view(-1)[0] = old
    assert weights_digest(model) == before


def test_counts_go_through_json_exactly(asked):
    model, *_ = asked
    with GateStatistics().attach(model) as statistics:
        ids = torch.randint(5, 50, (1, 7))
        with torch.no_grad():
            model(input_ids=ids)
        report, state = statistics.report(), json.loads(json.dumps(statistics.state()))
        statistics.reset()
        statistics.restore(state)
        assert statistics.report() == report
        with torch.no_grad():
            model(input_ids=ids)
        twice = statistics.report()
    assert [layer.tokens["all"] for layer in twice.layers] == [
        2 * layer.tokens["all"] for layer in report.layers
    ]
    with (
        GateStatistics().attach(model) as statistics,
        pytest.raises(ValueError, match="it has no layer elsewhere"),
    ):
        statistics.restore({"elsewhere": {}})


@pytest.mark.slow
def test_a_killed_command_goes_on(taught, llava_dir, food, tmp_path):
    result, _ = taught
    argv = [
        sys.executable,
        "-m",
        "rode",
        "evaluate",
        "--adapter",
        str(result.output_dir),
        "--data",
        str(food / "records.jsonl"),
    ]
    argv += [
        "--split",
        "train",
        "--max-new-tokens",
        "24",
        "--batch-size",
        "1",
        "--quiet",
        "--prompt",
        "vicuna",
    ]
    whole, part = tmp_path / "whole", tmp_path / "part"
    subprocess.run([*argv, "--out", str(whole)], check=True, capture_output=True, timeout=300)
    process = subprocess.Popen(
        [*argv, "--out", str(part)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (
        (part / PARTIAL).exists() and (part / PARTIAL).read_bytes().count(b"\n") > 2
    ):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (part / "predictions.jsonl").exists(), "it ended before it was killed"
    again = subprocess.run([*argv, "--out", str(part)], capture_output=True, text=True, timeout=300)
    assert again.returncode == 1
    assert "--resume goes on with it" in again.stderr
    subprocess.run([*argv, "--out", str(part), "--resume"], check=True, capture_output=True, timeout=300)
    for name in RESULTS:
        assert (part / name).read_bytes() == (whole / name).read_bytes()
