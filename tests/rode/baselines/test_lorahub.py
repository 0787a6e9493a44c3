"""LoRAHub: the matrices against a float64 formula, the search, and the way from two trained folders to an answer."""

from __future__ import annotations

import builtins
import json
import math
import shlex

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from rode import RodeConfig, cli
from rode.baselines.lorahub import compose_adapters, find_coefficients
from rode.cli import main
from rode.commands import compose as compose_command
from rode.training.config import experiment_from_dict
from rode.training.train import train
from rode.vlm import load_adapter, load_vlm
from rode_food import Example
from tiny_llava import draw


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(12, 9)
        self.lin1 = nn.Linear(9, 5)
        self.spare = nn.Linear(2, 2)  # to be saved along

    def forward(self, x):
        return self.lin1(torch.tanh(self.lin0(x)))


def plain(**fields):
    values = {"ranks": (4,), "gate": "none", "target_modules": ["lin0", "lin1"], "init_weights": False}
    return RodeConfig(**{**values, **fields})


def adapted(*configs):
    torch.manual_seed(0)
    model = get_peft_model(Mlp(), configs[0], adapter_name="a")
    for name, config in zip("bcdef", configs[1:], strict=False):
        model.add_adapter(name, config)
    return model.eval()


def test_values(tmp_path):
    model = adapted(
        plain(alpha=6), plain(alpha=8, alpha_pattern={"lin.": 6.0}), plain(alpha=3, scaling=(1.5,))
    )
    base = [p.data_ptr() for n, p in model.named_parameters() if "base_layer" in n]
    torch.manual_seed(1)
    x = torch.randn(7, 12)
    for weights in ([0.0, 0.0, 0.0], [0.7, -1.2, 0.3]):
        compose_adapters(model, ["a", "b", "c"], weights, "all")
        model.set_adapter("all")
        want = x.double()
        for layer in (model.lin0, model.lin1):
            A = sum(w * layer.adapter(n).A.double() for w, n in zip(weights, "abc", strict=True))
            B = sum(w * layer.adapter(n).B.double() for w, n in zip(weights, "abc", strict=True))
            linear = layer.base_layer
            want = want @ linear.weight.double().T + linear.bias.double() + 6 / 4 * (want @ A.T) @ B.T
            want = torch.tanh(want) if layer is model.lin0 else want
        torch.testing.assert_close(model(x).double(), want, rtol=1e-5, atol=1e-5)
    products = sum(
        w * model.lin0.adapter(n).B @ model.lin0.adapter(n).A for w, n in zip(weights, "abc", strict=True)
    )
    assert not torch.allclose(model.lin0.get_delta_weight("all"), 1.5 * products, atol=1e-2)
    assert base == [p.data_ptr() for n, p in model.named_parameters() if "base_layer" in n]

    model.save_pretrained(tmp_path, selected_adapters=["all"])
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Mlp(), tmp_path / "all").eval()
    assert again.active_peft_config.gate == "none"
    assert torch.equal(again(x), model(x))
    torch.testing.assert_close(again.merge_and_unload()(x), model(x))


def test_filling_again_is_in_place():
    model = adapted(plain(), plain())
    compose_adapters(model, ["a", "b"], [0.5, 0.5], "ab")
    pointers = [p.data_ptr() for p in model.parameters()]
    count = len(list(model.modules()))
    compose_adapters(model, ["a", "b"], [1.0, 0.0], "ab")
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert count == len(list(model.modules()))
    assert torch.equal(model.lin1.adapter("ab").A, model.lin1.adapter("a").A)
    assert model.active_adapter == "a"


def test_saved_modules_go_along():
    model = adapted(*[plain(modules_to_save=["spare"])] * 2)
    copies = model.spare.modules_to_save
    nn.init.normal_(copies["a"].weight)
    with pytest.raises(ValueError, match=r"spare: adapters \['a', 'b'\] were saved with different weights"):
        compose_adapters(model, ["a", "b"], [1.0, 1.0], "ab")
    assert "ab" not in model.peft_config
    copies["b"].load_state_dict(copies["a"].state_dict())
    compose_adapters(model, ["a", "b"], [1.0, 1.0], "ab")
    assert torch.equal(copies["ab"].weight, copies["a"].weight)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (plain(ranks=(2,)), "adapter 'b' has rank 2, but adapter 'a' has 4"),
        (plain(rank_pattern={"lin1": (2,)}), r"lin1: adapter 'a' has rank 4, adapter 'b' 2"),
        (plain(alpha=8), r"lin0: adapter 'a' has scaling 4, adapter 'b' 2; A and B are added up apart"),
        (plain(gate="relu"), r"expected plain LoRA \(gate 'none', one rank\), got gate 'relu'"),
        (plain(ranks=(2, 2)), r"ranks \[2, 2\]"),
        (plain(target_modules=["lin0"]), "adapter 'a' adapts .*lin1, adapter 'b' does not"),
        (plain(modules_to_save=["spare"]), r"saves the modules \['spare'\], but adapter 'a' \[\]"),
    ],
    ids=["rank", "rank_pattern", "scaling", "gate", "experts", "targets", "modules"],
)
def test_what_cannot_become_one(second, message):
    model = adapted(plain(), second)
    with pytest.raises(ValueError, match=message):
        compose_adapters(model, ["a", "b"], [1.0, 1.0], "ab")
    assert "ab" not in model.peft_config


def test_errors_of_arguments():
    model = adapted(plain(), plain())
    for names, weights, into, message in (
        (["a", "b"], [1.0], "ab", "weights: expected one per adapter, got 1 for 2"),
        (["a", "x"], [1.0, 1.0], "ab", r"adapters: \['x'\] not in the model"),
        (["a", "b"], [1.0, 1.0], "b", "into: 'b' is one of the adapters"),
        (["a", "b"], [1.0, math.nan], "ab", "weights: expected finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            compose_adapters(model, names, weights, into)
    lora = get_peft_model(Mlp(), LoraConfig(target_modules=["lin0"]))
    with pytest.raises(ValueError, match=r"expected a RoDE adapter with gate 'none', got a .*LORA"):
        compose_adapters(lora, ["default"], [1.0], "x")


@pytest.mark.parametrize(("n", "budget"), [(1, 30), (2, 40), (4, 80), (1, 150), (3, 300)])
def test_the_search_finds_a_known_optimum(n, budget):
    goal = [0.8, -0.5, 1.2, 0.1][:n]
    search = find_coefficients(lambda w: sum((a - b) ** 2 for a, b in zip(w, goal, strict=True)), n, budget)
    want = [math.copysign(abs(g) - 0.05 / n / 2, g) for g in goal]  # where 2 (w - goal) = -+ 0.05 / n
    assert search.best.weights == pytest.approx(want, abs=0.08)
    assert len(search.evaluations) == budget
    assert search.best.objective == min(e.objective for e in search.evaluations)
    penalty = 0.05 * sum(map(abs, search.best.weights)) / n
    assert search.best.objective == pytest.approx(search.best.loss + penalty)
    assert all(abs(w) <= 1.5 for e in search.evaluations for w in e.weights)
    assert search.optimizer


def test_the_search_stays_in_bounds_and_repeats():
    for budget in (40, 250):
        far = [find_coefficients(lambda w: (w[0] - 9) ** 2 + abs(w[1]), 2, budget, seed=3) for _ in range(2)]
        assert far[0] == far[1]
    assert far[0].best.weights[0] == pytest.approx(1.5, abs=0.05)
    nothing = find_coefficients(lambda w: 0.0, 3)
    assert nothing.best.weights == (0.0, 0.0, 0.0)  # where it starts, and where the penalty leaves it


def test_losses_that_are_not_finite():
    search = find_coefficients(lambda w: math.nan if w[0] > 0 else w[0] ** 2 + w[0], 1)
    assert search.best.weights[0] == pytest.approx(-0.5, abs=0.1)
    with pytest.raises(ValueError, match="not finite for any of 40 vectors"):
        find_coefficients(lambda w: math.inf, 2)
    with pytest.raises(ValueError, match="n and budget"):
        find_coefficients(lambda w: 0.0, 0)
    with pytest.raises(ZeroDivisionError):
        find_coefficients(lambda w: 1 / 0, 2)


def test_without_nevergrad(monkeypatch):
    whole = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "nevergrad":
            raise ImportError(name)
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'rode\[compose\]'"):
        find_coefficients(lambda w: 0.0, 2)


@pytest.fixture(scope="module")
def folders(llava_dir, tmp_path_factory):
    """(folder of a trained adapter, folder of one that is noise, records.jsonl with pictures)."""
    folder = tmp_path_factory.mktemp("compose")
    dishes, records, examples = ("rice", "soup", "pie"), [], []
    for i in range(9):
        colour = [30, 30, 30]
        colour[i % 3] = 200 + i
        draw(folder / f"{i}.png", tuple(colour))
        record = {"id": f"d{i}", "image": f"{i}.png", "source": "s", "category": dishes[i % 3]}
        records.append(json.dumps({**record, "split": "train" if i < 6 else "val"}))
    (folder / "records.jsonl").write_text("\n".join(records) + "\n")
    question = "What dish is this?"
    for i in range(6):
        dish = dishes[i % 3]
        examples.append(
            Example(f"d{i}", str(folder / f"{i}.png"), "category", question, dish, dish, "s", "train")
        )
    values = {
        "name": "trained",
        "output_dir": str(folder / "trained"),
        "model": {"path": str(llava_dir), "device": "cpu", "dtype": "float32", "prompt": "vicuna"},
        "data": {
            "sources": [{"path": str(folder / "records.jsonl"), "tasks": ["category"]}],
            "wording": "first",
        },
        "adapter": {
            "ranks": [4],
            "gate": "none",
            "dropout": 0.0,
            "target_modules": ".*language_model.*_proj",
        },
        "training": {
            "learning_rate": 1e-2,
            "batch_size": 6,
            "gradient_accumulation": 1,
            "warmup_steps": 5,
            "max_steps": 40,
        },
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(experiment_from_dict(values), progress=False)
    model, _ = load_vlm(llava_dir, dtype="float32", device="cpu")
    torch.manual_seed(4)
    config = RodeConfig(init_weights=False, task_type="CAUSAL_LM", **values["adapter"])
    get_peft_model(model, config).save_pretrained(folder / "noise")
    torch.set_num_threads(threads)
    return folder / "trained", folder / "noise", folder / "records.jsonl"


def test_from_two_folders_to_an_answer(capsys, folders, tmp_path):
    trained, noise, records = folders
    out = tmp_path / "both"
    assert main(["compose", str(trained), str(noise), "--out", str(out), "--examples", "3", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert f"adapter in {out}: loss" in said
    assert {path.name for path in out.iterdir()} >= {
        "adapter_model.safetensors",
        "config.yaml",
        "compose.json",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["both"]
    found = json.loads((out / "compose.json").read_text())
    alone = found["losses_alone"]
    assert alone[0] < 0.5 * alone[1]
    assert found["loss"] <= min(alone) + 0.1
    assert found["adapters"] == [str(trained), str(noise)]
    assert sorted(found["records"]) == ["d6", "d7", "d8"]
    assert len(found["evaluations"]) == found["budget"] == 40
    assert found["evaluations"][0]["weights"] == [0.0, 0.0]
    assert {"rode", "nevergrad", "torch"} <= set(found["versions"])

    model, _ = load_vlm(
        json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"],
        dtype="float32",
        device="cpu",
    )
    model = load_adapter(model, out)
    for name, source in (("a", trained), ("b", noise)):
        load_adapter(model, source, name)
    got = {n: p.clone() for n, p in model.named_parameters() if ".default." in n}
    compose_adapters(model, ["a", "b"], found["coefficients"], "again")
    again = {n: p for n, p in model.named_parameters() if ".again." in n}
    assert len(got) == 2 * 2 * 7
    assert all(torch.equal(p, again[n.replace(".default.", ".again.")]) for n, p in got.items())

    image = str(records.parent / "7.png")
    assert (
        main(["generate", "--adapter", str(out), "--image", image, "--question", "What dish is this?"]) == 0
    )
    assert capsys.readouterr().out.strip()
    (tmp_path / "evaluation").mkdir()
    argv = [
        "evaluate",
        "--adapter",
        str(out),
        "--data",
        str(records),
        "--split",
        "val",
        "--tasks",
        "category",
    ]
    assert main([*argv, "--max-new-tokens", "4", "--quiet", "--out", str(tmp_path / "evaluation")]) == 0


def fails(capsys, argv, message):
    assert main(argv) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("rode: ")
    assert message in said


def test_errors_of_the_command(capsys, folders, tmp_path, llava_dir):
    trained, noise, records = map(str, folders)
    out = ["--out", str(tmp_path / "out")]
    fails(capsys, ["compose", trained, *out], "expected two or more adapters to compose")
    fails(
        capsys, ["compose", trained, str(tmp_path), *out], "no adapter here (adapter_config.json is missing)"
    )
    fails(
        capsys, ["compose", trained, noise, "--out", trained], "holds something already: give another --out"
    )
    fails(capsys, ["compose", noise, noise, *out], "nothing to find coefficients on: give --data")
    fails(capsys, ["compose", noise, noise, *out, "--data", records], "no model: give --model DIR")
    fails(capsys, ["compose", trained, noise, *out, "--split", "test"], "no example of split 'test'")
    other = tmp_path / "other"
    model, _ = load_vlm(llava_dir, dtype="float32", device="cpu")
    get_peft_model(model, RodeConfig(ranks=(2, 4))).save_pretrained(other)
    fails(capsys, ["compose", trained, str(other), *out], f"{other}: expected plain LoRA")
    experiment = (folders[0] / "config.yaml").read_text().replace(str(llava_dir), "/elsewhere")
    (folders[1] / "config.yaml").write_text(experiment)
    try:
        fails(capsys, ["compose", trained, noise, *out], "trained with different model.path")
    finally:
        (folders[1] / "config.yaml").unlink()
    assert not (tmp_path / "out").exists()
    for argv in (["compose", "a", "b"], ["compose", "a", "b", *out, "--budget", "0"]):
        with pytest.raises(SystemExit) as exit:
            main(argv)
        assert exit.value.code == 2


def test_help_shows_what_can_be_typed(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["compose", "--help"])
    assert exit.value.code == 0
    assert "usage: rode compose" in capsys.readouterr().out
    commands = [
        line.strip() for line in compose_command.DESCRIPTION.splitlines() if line.startswith("  rode ")
    ]
    assert len(commands) == 2
    for command in commands:
        cli._parse(shlex.split(command.removeprefix("rode ")))
