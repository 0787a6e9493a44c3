"""Training the base model beside the adapter: what learns at which rate, gradients, files, and what cannot go."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from rode.training.base_weights import part_of, trained_base
from rode.training.config import ConfigError
from rode.training.manifest import damage
from rode.training.train import make_trainable, train
from rode.tuner import adapter as adapter_module
from rode.tuner import siblings
from rode.tuner.layer import RodeLayer
from rode.vlm import PixelSource, PromptEncoder, TrainingCollator, load_adapter, load_vlm
from rode.vlm.load import BASE_FILE
from rode.vlm.loss import answer_loss

RATES = {
    "learning_rate": 5e-2,
    "projector_learning_rate": 1e-2,
    "language_model_learning_rate": 1e-3,
    "vision_learning_rate": 1e-4,
}
ONE_STEP = {"schedule": "constant", "warmup_steps": 0, "max_steps": 1}
OF_BASE = {"language_model": {"language model"}, "all": {"language model", "projector", "vision tower"}}


def rates(base):
    left_out = {
        "projector": ("language_model_", "vision_"),
        "language_model": ("projector_", "vision_"),
        "all": ("none",),
    }
    return {name: rate for name, rate in RATES.items() if not name.startswith(left_out[base])}


@pytest.mark.parametrize("base", ["projector", "language_model", "all"])
def test_what_learns_at_which_rate(make_experiment, examples, llava_dir, base):
    """Adam's first step moves a weight that has a gradient by its rate."""
    experiment = make_experiment(
        adapter={"dropout": 0.0}, training={"train_base": base, **ONE_STEP, **rates(base)}
    )
    model, processor = load_vlm(llava_dir, dtype="float32", device="cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = train(experiment, examples=examples, model=model, processor=processor, progress=False)
    assert set(part_of(result.model).values()) == {"adapter"} | OF_BASE.get(base, {"projector"})
    file = result.output_dir / BASE_FILE
    assert file.exists() == (base != "projector")
    moved = {"language_model": 0.0, "vision_tower": 0.0}
    for name, tensor in (load_file(file) if file.exists() else {}).items():
        part = "vision_tower" if "vision_tower" in name else "language_model"
        moved[part] = max(moved[part], float((tensor - before[name]).abs().max()))
        assert tensor.dtype == torch.float32
    assert moved["language_model"] == pytest.approx(1e-3 if base != "projector" else 0, rel=1e-2)
    assert moved["vision_tower"] == pytest.approx(1e-4 if base == "all" else 0, rel=1e-2)
    state = load_file(result.output_dir / "adapter_model.safetensors")
    projector = {name: tensor for name, tensor in state.items() if "multi_modal_projector" in name}
    assert bool(projector) == (base != "language_model")
    for name, tensor in projector.items():
        old = before[name.removeprefix("base_model.model.")]
        assert float((tensor - old).abs().max()) == pytest.approx(1e-2, rel=1e-2)


@pytest.mark.filterwarnings("error::rode.tuner.fingerprint.AdapterMismatch")
@pytest.mark.parametrize(("base", "dtype"), [("language_model", "bfloat16"), ("all", "float32")])
def test_resumed_to_the_bit_and_loaded(make_experiment, examples, llava_dir, tmp_path, base, dtype):
    training = {"train_base": base, "max_steps": 4, "save_steps": 2, "save_total_limit": 5}
    changes = {"model": {"dtype": dtype}, "adapter": {"dropout": 0.3}}
    whole = train(make_experiment(training=training, **changes), examples=examples, progress=False)
    checkpoint = whole.output_dir / "checkpoint-2"
    assert BASE_FILE in json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert damage(checkpoint) is None
    experiment = make_experiment(training=training, output_dir=str(tmp_path / "resumed"), **changes)
    rest = train(experiment, examples=examples, progress=False, resume=str(checkpoint))
    for file in (BASE_FILE, "adapter_model.safetensors"):
        want, got = load_file(whole.output_dir / file), load_file(rest.output_dir / file)
        assert want.keys() == got.keys()
        assert all(torch.equal(got[name], want[name]) for name in want), file
    model, processor = load_vlm(llava_dir, dtype=dtype, device="cpu")
    collate = TrainingCollator(PromptEncoder(processor, "vicuna"), PixelSource(processor))
    batch = collate(examples[:2])
    for name in ("truncated", "labels"):
        batch.pop(name)
    loaded = load_adapter(model, whole.output_dir)
    with torch.no_grad():
        got, want = loaded(**batch).logits, whole.model(**batch).logits
    if dtype == "float32":
        assert torch.equal(got, want)
    else:
        assert got.dtype == torch.bfloat16  # the base model's precision, as it was loaded
        assert (got.float() - want).abs().max() < 0.05 * want.abs().max()


def plain(layer):
    """The formula of an adapted layer in plain PyTorch."""
    own = layer.rode_adapters["default"]
    ranks = torch.tensor(own.ranks)

    def forward(x):
        linear = layer.base_layer
        gates = F.relu(F.linear(x, own.router_weight, own.router_bias)) * torch.tensor(
            own.scaling, dtype=x.dtype
        )
        inner = F.linear(x, own.A) * gates.repeat_interleave(ranks, dim=-1)
        return F.linear(x, linear.weight, linear.bias) + F.linear(inner, own.B)

    return forward


@pytest.mark.parametrize("targets", [None, ".*language_model.*_proj"])
def test_gradients_are_those_of_plain_pytorch(make_experiment, examples, llava_dir, monkeypatch, targets):
    """In float64; base and adapter learn together, through the operation that computes layer and mixture as one."""
    adapter = {"dropout": 0.0} | ({} if targets is None else {"target_modules": targets})
    experiment = make_experiment(adapter=adapter, training={"train_base": "all"})
    model, processor = load_vlm(llava_dir, dtype="float32", device="cpu")
    model = make_trainable(model, experiment).double().train()
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, RodeLayer):
            torch.nn.init.normal_(layer.rode_adapters["default"].B, std=0.1)
    other = copy.deepcopy(model)
    for layer in other.modules():
        if isinstance(layer, RodeLayer):
            layer.forward = plain(layer)
    batch = TrainingCollator(PromptEncoder(processor, "vicuna"), PixelSource(processor))(examples[:3])
    batch.pop("truncated")
    labels = batch.pop("labels")
    batch["pixel_values"] = batch["pixel_values"].double()
    weights = []

    def counted(real, of):
        def call(*args, **kwargs):
            weights.extend(of(*args))
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(
        adapter_module,
        "rectified_linear",
        counted(adapter_module.rectified_linear, lambda *args: [args[1]]),
    )
    monkeypatch.setattr(
        siblings,
        "rectified_linears",
        counted(siblings.rectified_linears, lambda x, linears: [one.weight for one in linears]),
    )
    for _ in range(2):  # layers learn in the first pass which of them read the same tensor
        model.zero_grad()
        weights.clear()
        loss = answer_loss(model, model.get_output_embeddings(), batch, labels)
        loss.backward()
        adapted = [layer.base_layer.weight for layer in model.modules() if isinstance(layer, RodeLayer)]
        assert {id(weight) for weight in weights} == {id(weight) for weight in adapted}
        assert all(weight.requires_grad for weight in weights)
        for parameter in other.parameters():
            parameter.grad = None
        want = answer_loss(other, other.get_output_embeddings(), batch, labels)
        want.backward()
        assert float(loss.detach() - want.detach()) == pytest.approx(0, abs=1e-6)
        for (name, got), (_, expected) in zip(
            model.named_parameters(), other.named_parameters(), strict=True
        ):
            assert (got.grad is None) == (expected.grad is None), name
            if expected.grad is not None:
                error = (got.grad - expected.grad).norm() / expected.grad.norm().clamp(min=1e-12)
                assert error < 6e-15, (name, float(error))  # some 30 units in the last place
    assert len(trained_base(model)) > 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training": {"train_base": "all"}, "model": {"vision_features": "disk"}},
            "model.vision_features: expected live with training.train_base all, got disk",
        ),
        ({"training": {"train_base": "tower"}}, "train_base: expected one of"),
        (
            {"training": {"train_base": "language_model"}, "adapter": {"method": "moe-llava"}},
            "train_base: expected none or projector with moe-llava, got language_model",
        ),
        (
            {"training": {"train_base": "all"}, "stage": "projector"},
            "train_base: expected none in stage 'projector'",
        ),
        (
            {"training": {"train_base": "language_model", "vision_learning_rate": 1e-5}},
            "vision_learning_rate: expected null with train_base language_model",
        ),
        (
            {"training": {"language_model_learning_rate": 1e-5}},
            "language_model_learning_rate: expected null with train_base none",
        ),
        (
            {"training": {"train_base": "language_model", "fsdp": {}}},
            "train_base: expected none or projector with training.fsdp",
        ),
    ],
)
def test_what_cannot_go(make_experiment, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_experiment(**changes)


def test_a_quantised_base(make_experiment, llava_dir):
    model, _ = load_vlm(llava_dir, dtype="float32", device="cpu")
    layer = model.model.language_model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"expected none for a quantised model, got language_model: .*q_proj"
    ):
        make_trainable(model, make_experiment(training={"train_base": "language_model"}))


def test_another_models_weights(make_experiment, examples, llava_dir):
    experiment = make_experiment(training={"train_base": "language_model", "max_steps": 1})
    folder = train(experiment, examples=examples, progress=False).output_dir
    model, _ = load_vlm(llava_dir, dtype="float32", device="cpu")
    adapted = load_adapter(model, folder)
    with pytest.raises(ValueError, match="its training changed the base model"):
        load_adapter(adapted, folder, "second")
    state = load_file(folder / BASE_FILE)
    save_file({**state, "lm_head.weight": torch.zeros(3, 3)}, folder / BASE_FILE)
    fresh, _ = load_vlm(llava_dir, dtype="float32", device="cpu")
    with pytest.raises(ValueError, match=r"got lm_head.weight of the shape \(3, 3\)"):
        load_adapter(fresh, folder)
