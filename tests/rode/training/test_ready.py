"""What is missing is found before anything is loaded, and named by its key."""

from __future__ import annotations

import pytest
import torch

from rode.training import train as train_module
from rode.training.train import train
from rode.vlm.load import pick_device


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("too late")

    for name in ("load_examples", "read_processor", "load_vlm"):
        monkeypatch.setattr(train_module, name, fail)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"path": "/nowhere"}}, "model.path: /nowhere: no such model directory"),
        ({"model": {"projector": "/nowhere"}}, "model.projector: /nowhere: no such file or folder"),
        ({"model": {"clusters": "/nowhere"}}, "model.clusters: /nowhere: no such file or folder"),
        (
            {"data": {"sources": [{"path": "/nowhere"}]}},
            r"data.sources\[0\].path: /nowhere: no such file or folder",
        ),
    ],
)
def test_missing_files_name_the_key(make_experiment, nothing_is_loaded, changes, words):
    experiment = make_experiment(**changes)
    with pytest.raises(FileNotFoundError, match=words):
        train(experiment, progress=False)
    assert not experiment.run_dir.exists()


def test_a_folder_without_a_projector(make_experiment, nothing_is_loaded, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model.projector: \S+/projector.safetensors: no such file"):
        train(make_experiment(model={"projector": str(tmp_path)}), progress=False)


def test_a_vocabulary_is_read_at_the_start(make_experiment, nothing_is_loaded, tmp_path, caplog):
    with pytest.raises(AssertionError, match="too late"):  # it may be built until evaluation wants it
        train(make_experiment(evaluation={"vocabulary": "/nowhere"}), progress=False)
    assert "evaluation.vocabulary: /nowhere: no such file yet" in caplog.text
    (tmp_path / "v.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation.vocabulary: "):
        train(make_experiment(evaluation={"vocabulary": str(tmp_path / "v.json")}), progress=False)


@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_cuda_without_cuda_is_a_sentence(make_experiment, nothing_is_loaded, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match=rf"^model.device: got '{device}', and torch .* sees 0 GPUs; use auto or cpu"
    ):
        train(make_experiment(model={"device": device}), progress=False)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"device: got 'cuda:2', and torch .* sees 2 GPUs"):
        pick_device("cuda:2")


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_cannot_be_written(make_experiment, nothing_is_loaded, tmp_path, resume):
    (tmp_path / "file").touch()
    experiment = make_experiment(output_dir=str(tmp_path / "file" / "run"))
    with pytest.raises(OSError, match=r"^output_dir: \S+: no file can be written there \(Not a directory\)"):
        train(experiment, resume=resume, progress=False)
