"""Python files beside a checkpoint are never run, and nobody is asked whether they may be."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import rode
from rode.cli import main
from rode.training.clusters import Embedder
from rode.vlm import load_vlm

CODE = """
open({marker!r}, "w").close()
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedConfig, PreTrainedModel
class Config(PreTrainedConfig):
    model_type = "odd"
class Model(PreTrainedModel): pass
class Processor(LlavaProcessor): pass
class ImageProcessor(CLIPImageProcessor): pass
"""
ODD_CONFIG = {"model_type": "odd", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
ODD_PROCESSOR = {"processor_class": "Odd", "auto_map": {"AutoProcessor": "own.Processor"}}
ODD_IMAGES = {
    "image_processor": {
        "image_processor_type": "Odd",
        "auto_map": {"AutoImageProcessor": "own.ImageProcessor"},
    }
}


class Yes(io.StringIO):
    """A stdin that says yes to everything, and knows whether it was asked."""

    asked = False

    def readline(self, *_):
        self.asked = True
        return "y\n"


@pytest.fixture
def stdin(monkeypatch):
    yes = Yes()
    monkeypatch.setattr(sys, "stdin", yes)
    return yes


@pytest.fixture
def with_code(llava_dir, tmp_path):
    """A function that copies the checkpoint, changes one of its files and lays code beside it."""

    def make(file, fields):
        folder = tmp_path / "model"
        shutil.copytree(llava_dir, folder)
        (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **fields}))
        return folder

    return make


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", ODD_CONFIG),
        ("processor_config.json", ODD_PROCESSOR),
        ("processor_config.json", ODD_IMAGES),
    ],
    ids=("config", "processor", "image processor"),
)
def test_a_checkpoint_that_needs_code_is_refused(with_code, tmp_path, stdin, file, fields):
    folder = with_code(file, fields)
    with pytest.raises(ValueError, match=r"model: Auto\w+ would run Python code that lies there"):
        load_vlm(folder, dtype="float32", device="cpu")
    assert not stdin.asked
    assert not (tmp_path / "marker").exists()


def test_code_that_is_not_needed_is_left_alone(with_code, tmp_path, stdin):
    folder = with_code("config.json", {"auto_map": ODD_CONFIG["auto_map"]})
    model, _ = load_vlm(folder, dtype="float32", device="cpu")
    assert type(model).__module__.startswith("transformers.")
    assert not stdin.asked
    assert not (tmp_path / "marker").exists()


def test_an_encoder_of_clusters_that_needs_code_is_refused(with_code, tmp_path, stdin):
    folder = with_code("config.json", ODD_CONFIG)
    with pytest.raises(ValueError, match="would run Python code that lies there"):
        Embedder(None, torch.zeros(1, 1), str(folder))
    assert not stdin.asked
    assert not (tmp_path / "marker").exists()


def test_the_command_says_so_in_one_line(with_code, tmp_path, food, stdin, capsys):
    folder = with_code("config.json", ODD_CONFIG)
    command = [
        "generate",
        "--model",
        str(folder),
        "--image",
        str(food / "0.png"),
        "--question",
        "What is it?",
    ]
    assert main([*command, "--quiet"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"rode: {folder}: AutoConfig would run Python code")
    assert not stdin.asked
    assert not (tmp_path / "marker").exists()


def test_everything_is_loaded_that_way():
    """PEFT's configurations and adapters are JSON and tensors; whatever transformers loads goes through one function."""
    calls = re.compile(r"(\w+)\.from_pretrained\(")
    found = {
        (path.name, name)
        for path in Path(rode.__file__).parent.rglob("*.py")
        for line in path.read_text().splitlines()
        for name in calls.findall(line)
        if not name.startswith(("Peft", "Rode"))
    }
    assert found == {("pretrained.py", "cls")}
