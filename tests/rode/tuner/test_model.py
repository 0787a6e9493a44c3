"""PEFT's conventions: several adapters, saving, loading, targets, errors."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from rode.tuner import RodeConfig, RodeLayer

CONFIGS = {
    "relu": {"ranks": (2, 4), "router_bias": True},
    "softmax": {"ranks": (3, 3), "gate": "softmax"},
    "topk": {"ranks": (1, 2, 1), "gate": "topk", "top_k": 2},
    "none": {"ranks": (8,), "gate": "none"},
    "patterns": {"ranks": (4,), "rank_pattern": {"lin1": (2, 1)}, "alpha_pattern": {"lin0": 5.0}},
    "modules_to_save": {"ranks": (2, 4), "target_modules": ["lin0"], "modules_to_save": ["lin1"]},
}


def make(mlp, dtype=torch.float64, seed=3, **fields):
    fields = {"dropout": 0.0, "init_weights": False, "target_modules": ["lin0", "lin1"], **fields}
    torch.manual_seed(seed)
    return get_peft_model(mlp(dtype), RodeConfig(**fields))


def x64(rows=6):
    return torch.randn(rows, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_reload_gives_the_same_bits(mlp, tmp_path, name, low_cpu_mem_usage):
    model = make(mlp, **CONFIGS[name])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(x64()).square().sum().backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(again(x64()), model(x64()))
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float64], ids=str)
def test_what_moves_to_its_base_keeps_its_bits_and_stays_frozen(mlp, tmp_path, base_dtype):
    """As where PEFT reads weights onto a GPU first and the base is elsewhere, or of another type."""
    saved = make(mlp, torch.float32, **CONFIGS["relu"])
    saved.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mlp(base_dtype), tmp_path, low_cpu_mem_usage=True)
    theirs = again.state_dict()
    for name, value in saved.state_dict().items():
        if ".rode_" in name:
            assert theirs[name].dtype == (torch.float64 if base_dtype == torch.float64 else torch.float32)
            assert torch.equal(theirs[name].float(), value), name
    assert not any(p.requires_grad for p in again.parameters())


def test_a_fresh_process_reloads_the_same_bits(mlp, tmp_path):
    model = make(mlp, torch.float32, ranks=(2, 4))
    model.save_pretrained(tmp_path / "adapter")
    torch.save(mlp(torch.float32).state_dict(), tmp_path / "base.pt")
    x = torch.randn(5, 12)
    torch.save((x, model(x).detach()), tmp_path / "xy.pt")
    program = f"""
        import torch
        import rode  # registers the method
        from peft import PeftModel
        from torch import nn

        class Mlp(nn.Module):
            def __init__(self):
                super().__init__()
                self.lin0, self.act, self.lin1 = nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5)

            def forward(self, x):
                return self.lin1(self.act(self.lin0(x)))

        base = Mlp()
        base.load_state_dict(torch.load({str(tmp_path / "base.pt")!r}))
        x, y = torch.load({str(tmp_path / "xy.pt")!r})
        assert torch.equal(PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r})(x), y)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_the_adapter_is_trained_and_saved(mlp, tmp_path):
    from safetensors.torch import load_file

    model = make(mlp, ranks=(2, 4))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "rode_" in n}
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(saved) == [
        f"base_model.model.{layer}.{name}"
        for layer in ("lin0", "lin1")
        for name in ("rode_adapters.A", "rode_adapters.B", "rode_adapters.router_weight")
    ]
    assert torch.equal(
        saved["base_model.model.lin1.rode_adapters.A"], model.base_model.model.lin1.adapter("default").A
    )


@pytest.mark.parametrize("twice", [False, True])
def test_model_card_says_to_import_rode(mlp, tmp_path, twice):
    model = make(mlp)
    if twice:
        (tmp_path / "README.md").write_text("# Mine\n")
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import rode\nfrom peft import PeftModel") == 1
    assert ("# Mine" in card) == twice
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_adapters_stay_float32_on_a_16_bit_base(mlp, tmp_path):
    model = make(mlp, torch.bfloat16, ranks=(2, 4))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mlp(torch.bfloat16), tmp_path)
    for name, p in again.named_parameters():
        if "rode_" in name:
            assert p.dtype == torch.float32
            assert torch.equal(p, dict(model.named_parameters())[name])
    half = PeftModel.from_pretrained(mlp(torch.bfloat16), tmp_path, autocast_adapter_dtype=False)
    assert {p.dtype for n, p in half.named_parameters() if "rode_" in n} == {torch.bfloat16}
    assert half(torch.randn(2, 12, dtype=torch.bfloat16)).isfinite().all()


def test_several_adapters(mlp):
    x, plain = x64(), mlp()(x64())
    model = make(mlp, ranks=(2, 4))
    first = model(x)
    torch.manual_seed(4)
    model.add_adapter(
        "other", RodeConfig(ranks=(8,), gate="none", init_weights=False, target_modules=["lin0"])
    )
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other" in n)
    assert torch.equal(model(x), first)
    model.set_adapter("other")
    model.eval()
    second = model(x)
    assert not torch.equal(second, first)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"other"}

    lin0, lin1 = model.base_model.model.lin0, model.base_model.model.lin1
    model.base_model.set_adapter(["default", "other"])  # both are added
    both = lin0(x)
    separate = []
    for name in ("default", "other"):
        model.base_model.set_adapter(name)
        separate.append(lin0(x) - lin0.base_layer(x))
    torch.testing.assert_close(both, lin0.base_layer(x) + sum(separate), rtol=1e-12, atol=1e-12)
    assert lin1._get_available_adapters() == {"default"}

    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    assert torch.equal(model(x), second)
    model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert torch.equal(model(x), first)
    assert not any(".other" in n for n, _ in model.named_parameters())
    for attribute in RodeLayer.adapter_layer_names + RodeLayer.other_param_names:
        assert "other" not in getattr(lin0, attribute)
    assert torch.equal(model.unload()(x), plain)


def test_second_adapter_loads_beside_the_first(mlp, tmp_path):
    one, two = make(mlp, ranks=(2, 4)), make(mlp, seed=8, ranks=(3,), gate="softmax")
    two.save_pretrained(tmp_path)
    want = two(x64())
    one.load_adapter(tmp_path, "two")
    one.set_adapter("two")
    assert torch.equal(one(x64()), want)


@pytest.mark.parametrize("gate", ["relu", "none"])
def test_weighted_adapter_is_the_weighted_sum(mlp, tmp_path, gate):
    model = make(mlp, ranks=(2, 4), gate=gate, router_bias=gate == "relu", target_modules=["lin0"])
    other = RodeConfig(
        ranks=(3,), alpha=5, gate=gate, dropout=0.0, init_weights=False, target_modules=["lin0"]
    )
    model.add_adapter("other", other)
    lin0, x = model.base_model.model.lin0, x64()
    base, outputs = lin0.base_layer(x), []
    for name in ("default", "other"):
        model.set_adapter(name)
        outputs.append(lin0(x) - base)
    model.base_model.add_weighted_adapter(["default", "other"], [0.3, -2.0], "sum")
    assert model.active_adapters == ["other"]
    model.set_adapter("sum")
    torch.testing.assert_close(lin0(x), base + 0.3 * outputs[0] - 2.0 * outputs[1], rtol=1e-12, atol=1e-12)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(PeftModel.from_pretrained(mlp(), tmp_path / "sum")(x), model(x))


def test_weighted_adapter_refuses_what_is_no_sum(mlp):
    model = make(mlp, gate="softmax").base_model
    with pytest.raises(ValueError, match="depend on each other"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match=r"\['nobody'\] not in the model"):
        model.add_weighted_adapter(["nobody"], [1.0], "sum")
    with pytest.raises(ValueError, match="one per adapter, got 2 for 1"):
        model.add_weighted_adapter(["default"], [1.0, 2.0], "sum")
    model = make(mlp)
    model.add_adapter("other", RodeConfig(gate="none", dropout=0.0, target_modules=["lin0", "lin1"]))
    with pytest.raises(ValueError, match="differ in gate"):
        model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert set(model.peft_config) == {"default", "other"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"norm_experts": True}, "norm_experts: the experts of one adapter depend on each other"),
        ({"shared_A": True, "ranks": (2, 2)}, "shared_A: the experts"),
        ({"gate": "sigmoid", "normalize": True}, "gate='sigmoid': the experts"),
        ({"router_input": "task", "num_ids": 2}, "only routers that read their own layer's input"),
        ({"router_per": "block"}, "only routers that read their own layer's input"),
    ],
)
def test_weighted_adapters_whose_experts_hang_together_are_refused(mlp, fields, words):
    model = make(mlp, **fields).base_model
    with pytest.raises(ValueError, match=words):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_injection_without_a_peft_model(mlp):
    model = inject_adapter_in_model(RodeConfig(ranks=(2,), target_modules=["lin0"]), mlp())
    assert isinstance(model.lin0, RodeLayer)
    assert torch.equal(model(x64()), mlp()(x64()))


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["lin1"], ["lin1"]),
        (r".*lin\d", ["lin0", "lin1"]),
        ("all-linear", ["lin0", "lin1"]),
    ],
)
def test_targets(mlp, target_modules, expected):
    model = make(mlp, target_modules=target_modules)
    assert sorted(model.base_model.targeted_module_names) == expected
    model = make(mlp, target_modules=r".*lin\d", exclude_modules=["lin0"])
    assert model.base_model.targeted_module_names == ["lin1"]


@pytest.mark.parametrize("target_modules", [["lin_1"], r".*\.lin_1"])
def test_no_match_lists_near_misses(mlp, target_modules):
    with pytest.raises(NoMatchingPeftModuleError, match=r"Near misses: .*lin1 \(as in lin1\)") as info:
        make(mlp, target_modules=target_modules)
    assert isinstance(info.value, ValueError)


def test_unmatched_patterns_are_reported(mlp):
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match .*lin7"):
        make(mlp, rank_pattern={"lin7": (1,)})


def test_unsupported_modules_are_named(mlp):
    with pytest.raises(TypeError, match=r"act: expected a linear layer .* got Tanh"):
        make(mlp, target_modules=["act"])
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(TypeError, match=r"0\.out_proj: nn\.MultiheadAttention reads this layer's weight"):
        get_peft_model(attention, RodeConfig(target_modules=["out_proj"]))


def test_mixed_batches_are_refused(mlp):
    model = make(mlp)
    with pytest.raises(ValueError, match="adapter_names: RoDE runs one set of adapters"):
        model(x64(2), adapter_names=["default", "default"])


def test_meta_device(mlp):
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    model = get_peft_model(base, RodeConfig(target_modules=["0"]))
    assert all(p.is_meta for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 30 * (4096 + 4096) + 4 * 4096


def test_an_adapter_added_in_evaluation_has_no_dropout(mlp):
    model = make(mlp, ranks=(2, 4), dropout=0.5).eval()
    model.add_adapter(
        "later", RodeConfig(ranks=(8,), dropout=0.5, init_weights=False, target_modules=["lin0"])
    )
    model.set_adapter("later")
    assert torch.equal(model(x64()), model(x64()))
