"""Two processes over gloo, as torchrun and Slurm start them, against one process with twice the batch."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rode.training.arguments import training_arguments
from rode.training.checkpoints import read_state, starting_point
from rode.training.config import ConfigError, load_experiment
from rode.training.finite import NotFiniteError, StepGuard
from rode.training.lost import LostProcessError, is_lost_process, lost_process
from rode.training.train import train

CONFIGS = Path(__file__).parents[3] / "configs" / "distributed"
SUPPORT = Path(__file__).parents[2] / "support"
ZERO = (
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "rode_with_gloo",
    "train",
)
LAUNCHERS = {
    "ddp": ["torchrun.sh"],
    "fsdp2": ["slurm.sh"],
    "zero2": [sys.executable, *ZERO],
    "zero3": [sys.executable, *ZERO],
}


@pytest.fixture
def tiny(llava_dir, food):
    """Overrides that make the paper's run a quick one."""
    return [
        f"model.path={llava_dir}",
        "model.device=cpu",
        f"data.sources=[{{path: {food / 'records.jsonl'}}}]",
        "data.wording=first",
        "adapter.dropout=0.0",
        "training.learning_rate=3e-3",
        "training.schedule=constant",
        "training.warmup_steps=0",
        "training.gradient_accumulation=2",
        "training.logging_steps=1",
        "training.save_steps=2",
        "training.max_steps=3",
        "training.workers=0",
    ]


@pytest.fixture
def environment(tmp_path):
    """Two processes of one thread; commands of Slurm that start everything here."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in {"srun": 'shift\nexec "$@"', "scontrol": "echo localhost"}.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    with socket.socket() as free:  # another run may hold the port that slurm.sh takes
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    path = [str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]
    slurm = {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": str(os.getpid())}
    python = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ,
        **slurm,
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": python,
        "PROCESSES": "2",
        "PORT": port,
        "OMP_NUM_THREADS": "1",
    }


def run(kind, overrides, environment, *options):
    """A run of two processes with a config of configs/distributed."""
    first, *rest = LAUNCHERS[kind]
    command = [str(CONFIGS / first) if first.endswith(".sh") else first, *rest, str(CONFIGS / f"{kind}.yaml")]
    done = subprocess.run(
        [*command, *overrides, "training.devices=2", "--quiet", *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("adapter in") == 1
    return done


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAUNCHERS)
def test_two_processes_are_one_with_twice_the_batch(kind, tiny, environment, tmp_path):
    """The same order, the same mean over tokens, the same gates, the same weights to rounding; one adapter on disk, and a
    checkpoint that is continued to the same bits."""
    tiny += ["model.dtype=float32"]
    alone = train(
        load_experiment(
            CONFIGS / "ddp.yaml",
            [*tiny, "training.batch_size=4", "training.devices=1", f"output_dir={tmp_path / 'one'}"],
        ),
        progress=False,
    )
    two = tmp_path / "two"
    tiny += ["training.batch_size=2"]
    done = run(kind, [*tiny, f"output_dir={two}"], environment)
    sharded = {"ddp": "", "fsdp2": "pytorch_model_fsdp.bin", "zero2": "latest", "zero3": "latest"}[kind]
    assert (two / "checkpoint-2" / (sharded or "optimizer.pt")).is_file(), done.stderr[-4000:]

    once, history = (json.loads((path / "history.json").read_text()) for path in (alone.output_dir, two))
    for mine, want in zip(history[:-1], once[:-1], strict=True):
        assert mine.keys() == want.keys()
        for name in ("loss", "grad_norm", *(name for name in want if "gates" in name)):
            assert mine[name] == pytest.approx(want[name], rel=1e-4), name
    weights = load_file(two / "adapter_model.safetensors")
    expected = load_file(alone.output_dir / "adapter_model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    counts = [json.loads((path / "training.json").read_text())["metrics"] for path in (alone.output_dir, two)]
    assert counts[0]["trainable_parameters"] == counts[1]["trainable_parameters"] > 0

    if kind in ("fsdp2", "zero3"):
        rest = tmp_path / "rest"
        rest.mkdir()
        shutil.copytree(two / "checkpoint-2", rest / "checkpoint-2")
        run(kind, [*tiny, f"output_dir={rest}"], environment, "--resume")
        assert json.loads((rest / "history.json").read_text())[2]["step"] == 3
        again = load_file(rest / "adapter_model.safetensors")
        assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


@pytest.mark.slow
def test_the_base_model_is_trained_by_two_processes_as_by_one(tiny, environment, tmp_path):
    tiny += ["model.dtype=float32", "training.train_base=all"]
    alone = train(
        load_experiment(
            CONFIGS / "ddp.yaml",
            [*tiny, "training.batch_size=4", "training.devices=1", f"output_dir={tmp_path / 'one'}"],
        ),
        progress=False,
    )
    two = tmp_path / "two"
    run("ddp", [*tiny, "training.batch_size=2", f"output_dir={two}"], environment)
    once, history = (json.loads((path / "history.json").read_text()) for path in (alone.output_dir, two))
    for mine, want in zip(history[:-1], once[:-1], strict=True):
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(want[name], rel=1e-4), name
    files = sorted(path.name for path in alone.output_dir.glob("*.safetensors"))
    assert "adapter_model.safetensors" in files
    assert len(files) > 1
    for file in files:
        weights, expected = load_file(two / file), load_file(alone.output_dir / file)
        assert weights.keys() == expected.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_a_batch_that_cannot_be_made_ends_both_processes_with_a_checkpoint(tiny, food, environment, tmp_path):
    """One process finds the picture gone; the other one hears of it, and both save the step before."""
    shutil.copytree(food, tmp_path / "food")
    overrides = [
        *tiny,
        f"data.sources=[{{path: {tmp_path / 'food' / 'records.jsonl'}}}]",
        "training.max_steps=100000",
        "training.save_steps=1000",
        f"output_dir={tmp_path / 'run'}",
    ]
    command = [str(CONFIGS / "torchrun.sh"), str(CONFIGS / "ddp.yaml"), *overrides, "--quiet"]
    torchrun = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list((tmp_path / "run" / "tensorboard").glob("*")):
        assert time.monotonic() < until
        assert torchrun.poll() is None, torchrun.communicate()[1]
        time.sleep(0.2)
    time.sleep(3)  # some steps
    (tmp_path / "food" / "5.png").unlink()
    _, errors = torchrun.communicate(timeout=120)
    assert torchrun.returncode != 0
    told = re.findall(
        r"5\.png: no such picture; this was in step (\d+), on the records (.*); go on with --resume \((.*)\)",
        errors,
    )
    assert len(told) == 1, errors[:3000]
    step, records, checkpoint = told[0]
    assert "dish5" in records
    assert Path(checkpoint).name == f"checkpoint-{int(step) - 1}"
    assert read_state(starting_point(tmp_path / "run", True, processes=2))["global_step"] == int(step) - 1


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_a_message(tiny, environment, tmp_path):
    overrides = [
        *tiny,
        "training.max_steps=100000",
        "training.save_steps=5",
        f"output_dir={tmp_path / 'run'}",
    ]
    command = [str(CONFIGS / "torchrun.sh"), str(CONFIGS / "ddp.yaml"), *overrides, "--quiet"]
    torchrun = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint-5" / "trainer_state.json").is_file():
        assert time.monotonic() < until
        assert torchrun.poll() is None, torchrun.communicate()[1]
        time.sleep(0.2)
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    victim = next(
        int(pid) for pid in children if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    )
    os.kill(victim, signal.SIGKILL)
    _, errors = torchrun.communicate(timeout=60)
    assert torchrun.returncode != 0
    assert "rode: process 0 of this run has lost another one" in errors
    assert f"go on with --resume ({tmp_path / 'run' / 'checkpoint-'}" in errors
    assert "rank      : 1" in errors  # torchrun's report of the first that failed


def test_what_a_lost_process_looks_like(tmp_path):
    gloo = RuntimeError(
        "[/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"
    )
    assert is_lost_process(gloo)
    assert is_lost_process(torch.distributed.DistBackendError("NCCL communicator was aborted"))
    assert not is_lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"))
    error = lost_process(tmp_path, 3)
    assert isinstance(error, LostProcessError)
    assert "process 3 of this run has lost another one" in str(error)
    assert "there is no checkpoint yet" in str(error)


ZERO_2 = {"zero_optimization": {"stage": 2}}
BAD = [
    ({"fsdp": {}, "deepspeed": ZERO_2}, {}, r"training.fsdp: expected null beside training.deepspeed"),
    ({"fsdp": {"version": 1}}, {}, r"training.fsdp.version: expected 2, got 1"),
    (
        {"fsdp": {"state_dict_type": "SHARDED_STATE_DICT"}},
        {},
        r"training.fsdp.state_dict_type: expected FULL",
    ),
    ({"deepspeed": {}}, {}, r"training.deepspeed.zero_optimization.stage: expected 1, 2 or 3, got None"),
    (
        {"deepspeed": {**ZERO_2, "optimizer": {}}},
        {},
        r"training.deepspeed.optimizer: leave it out; training.lear",
    ),
    (
        {"deepspeed": {**ZERO_2, "bf16": {"enabled": True}}},
        {},
        r"training.deepspeed.bf16: leave it out; model.dt",
    ),
    (
        {"fsdp": {}},
        {"stage": "projector"},
        r"training.fsdp: stage 'projector' saves weights that must be whole",
    ),
    (
        {"deepspeed": {"zero_optimization": {"stage": 3}}},
        {"adapter": {"method": "moe-llava", "ranks": None}},
        r"training.deepspeed: adapter.method 'moe-llava' saves weights that must be whole .* ZeRO stage 2",
    ),
]


@pytest.mark.parametrize(("training", "changes", "message"), BAD)
def test_sharding_that_cannot_be_is_refused(make_experiment, training, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_experiment(training=training, **changes)


@pytest.mark.parametrize("training", [{"fsdp": {}}, {"deepspeed": ZERO_2}])
def test_sharding_wants_processes(make_experiment, monkeypatch, training):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"expected the processes that torchrun starts, got one"):
        training_arguments(make_experiment(training=training))


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_a_checkpoint_is_continued_with_the_sharding_of_its_run(tmp_path, kind):
    """The state, and one file of each optimizer, made by hand: what is checked is which files there are."""
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "global_step2").mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    names = ["scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"]
    names += {
        "fsdp": ["optimizer.bin", "pytorch_model_fsdp.bin"],
        "deepspeed": [f"global_step2/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)],
    }[kind]
    for name in names:
        (checkpoint / name).touch()
    if kind == "deepspeed":
        (checkpoint / "latest").write_text("global_step2")
    assert starting_point(tmp_path, True, 2, kind) == checkpoint
    with pytest.raises(
        ValueError, match=rf"the checkpoint is of a run with training.{kind} and this run has neither"
    ):
        starting_point(tmp_path, True, 2)
    (checkpoint / names[-1]).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"is missing, and without it training would go on with other results"
    ):
        starting_point(tmp_path, True, 2, kind)


def test_the_norm_of_shared_out_gradients_is_looked_at(tmp_path):
    """FSDP gives the norm as a DTensor, with a share of it in each process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        for value in (1.0, float("nan")):
            guard = StepGuard(tmp_path)
            guard.add(torch.tensor(0.5), ["dish1"])
            norm = distribute_tensor(torch.tensor([value]), mesh).norm()
            if value == 1.0:
                guard.check(norm, 1)
                continue
            with pytest.raises(NotFiniteError, match="step 1: the gradient norm is nan on the records dish1"):
                guard.check(norm, 1)
    finally:
        torch.distributed.destroy_process_group()
