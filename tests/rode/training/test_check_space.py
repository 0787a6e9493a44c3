"""`rode train --check-space`: the space that checkpoints take, before anything is trained."""

from __future__ import annotations

from types import SimpleNamespace

from rode.cli import main
from rode.training import disk
from rode.training.config import dump_experiment
from rode.training.train import train


def test_check_space(make_experiment, examples, tmp_path, capsys, monkeypatch):
    experiment = make_experiment(
        training={"max_steps": 2, "save_total_limit": 2}, output_dir=str(tmp_path / "a" / "run")
    )
    config = tmp_path / "config.yaml"
    config.write_text(dump_experiment(experiment))
    trained = 2 * (6 * 64 + 64 + 6 * 48 + 64)  # as in test_train: A, B and routers of q and v in two layers
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    assert main(["train", str(config), "--check-space"]) == 0
    told = capsys.readouterr().out
    assert f"{trained:,} trained weights" in told
    # three checkpoints of a weight and its two moments, and the weights at the end
    assert disk._size(trained * 4 * (3 * 3 + 1)) in told
    assert "1.0 GB are free" in told
    assert not experiment.run_dir.exists()
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert main(["train", str(config), "--check-space"]) == 1
    monkeypatch.undo()
    result = train(experiment, examples=examples, progress=False)
    space = disk.space_of(experiment.run_dir, trained, 2)
    weights = (result.checkpoint / "adapter_model.safetensors").stat().st_size
    moments = (result.checkpoint / "optimizer.pt").stat().st_size
    assert space.checkpoint <= weights + moments < space.checkpoint + 30_000
