"""Each preset against its system's formula, written out here token by token and expert by expert, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn

from rode.tuner import RodeConfig, RodeLayer
from rode.tuner.presets import PRESETS, preset

BATCH, TOKENS, WIDTH, INNER = 3, 5, 12, 9
TASK_IDS = torch.tensor([1, 0, 2])


class FeedForward(nn.Module):
    """A Llama block's feed-forward part, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, INNER, bias=False, dtype=torch.float64)
        self.up_proj = nn.Linear(WIDTH, INNER, bias=False, dtype=torch.float64)
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Model(nn.Module):
    """One projection and one feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
        self.mlp = FeedForward()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.v_proj(x))


# Small sizes for each preset; `target_modules` puts it on v_proj, but for those whose block is the point.
SMALL = {
    "rode": {"ranks": (2, 1, 3)},
    "lora": {"ranks": (3,)},
    "foodlmm": {"ranks": (3,)},
    "foodlmm-moe": {"ranks": (2, 2, 2)},
    "llava-mole": {"ranks": (2, 2, 2), "rank_pattern": {}, "target_modules": ["gate_proj", "down_proj"]},
    "loramoe": {"ranks": (2, 2, 2, 2), "aux_groups": (0, 1, 1)},
    "moelora": {"ranks": (2, 2, 2), "embedding_dim": 4, "num_ids": 3, "dropout": 0.0},
    "mocle": {"ranks": (2,) * 4, "embedding_dim": 4, "num_ids": 3, "temperature": 0.7},
    "polytropon": {"ranks": (2,) * 3, "num_ids": 3},
    "hydralora": {"ranks": (2,) * 3},
    "adamole": {"ranks": (2,) * 4},
    "mixlora": {
        "ranks": (2,) * 3,
        "rank_pattern": {},
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    },
    "remoe": {"ranks": (2, 2, 2)},
    "expert-choice": {"ranks": (2, 2, 2), "capacity": 1.2},
    "dual-lora": {"ranks": (1,) * 4, "scaling": (2.0,) * 4},
}


def adapted(name: str, model: nn.Module | None = None, **fields):
    """A model with this preset, everything random and nothing dropped, in evaluation mode."""
    own = {"target_modules": ["v_proj"], "dropout": 0.0, "init_weights": False, **SMALL[name], **fields}
    torch.manual_seed(0)
    model = Model() if model is None else model
    model = get_peft_model(model, preset(name, **own))
    for n, p in model.named_parameters():
        if "table" in n or "norm_" in n:  # away from their start, where experts are alike
            nn.init.normal_(p)
    return model.eval()


def experts(layer: RodeLayer):
    """(scaling_i, A_i, B_i) of each expert."""
    start = 0
    ranks, scaling = layer.adapter("default").ranks, layer.adapter("default").scaling
    for i, rank in enumerate(ranks):
        A = layer.adapter("default").A
        A = A if layer.adapter("default").config.shared_A else A[start : start + rank]
        yield scaling[i], A, layer.adapter("default").B[:, start : start + rank]
        start += rank


def p(layer, name):
    return getattr(layer.adapter("default"), name)


def weighted(layer, x, gates, sequence):
    """W x + sum_i s_i g_i B_i A_i x for one token."""
    y = layer.base_layer.weight @ x
    for (s, A, B), g in zip(experts(layer), gates, strict=True):
        y = y + s * g * (B @ (A @ x))
    return y


def by_token(gates_of):
    """A formula for v_proj from one for a token's gates: gates_of(layer, x, number of the sequence)."""

    def run(layer, x):
        return torch.stack(
            [
                torch.stack([weighted(layer, t, gates_of(layer, t, b), b) for t in row])
                for b, row in enumerate(x)
            ]
        )

    return run


def softmax(h):
    top = max(v.item() for v in h)
    powers = [torch.exp(v - top) for v in h]
    return [v / sum(powers) for v in powers]


def linear_router(layer, x):
    return [row @ x for row in p(layer, "router_weight")]


def relu_gates(layer, x, b):
    return [v if v > 0 else 0 * v for v in linear_router(layer, x)]


def task_embedding_gates(layer, x, b):
    return softmax(linear_router(layer, p(layer, "table")[TASK_IDS[b]]))


def mocle_gates(layer, x, b):
    embedding = p(layer, "table")[TASK_IDS[b]]
    h = [w @ embedding + c for w, c in zip(p(layer, "router_weight"), p(layer, "router_bias"), strict=True)]
    g = softmax([v / 0.7 for v in h])
    best = max(range(len(g)), key=lambda i: g[i].item())
    return [v if i == best else 0 * v for i, v in enumerate(g)] + [1 - g[best]]


def adamole_gates(layer, x, b):
    g = softmax(linear_router(layer, x))
    z = p(layer, "threshold_weight")[0] @ x + p(layer, "threshold_bias")[0]
    threshold = (1 / len(g)) / (1 + torch.exp(-z))
    kept = [v - threshold if v >= threshold else 0 * v for v in g]
    return [v / sum(kept) for v in kept]


def polytropon(layer, x):
    """(sum_i w_i B_i)(sum_i w_i A_i) x / r, w the task's sigmoids divided by their sum."""
    rows = []
    for b, row in enumerate(x):
        z = [1 / (1 + torch.exp(-v)) for v in p(layer, "table")[TASK_IDS[b]]]
        parts = list(experts(layer))
        A = sum(w / sum(z) * A for w, (_, A, _) in zip(z, parts, strict=True))
        B = sum(w / sum(z) * B for w, (_, _, B) in zip(z, parts, strict=True))
        rows.append(torch.stack([layer.base_layer.weight @ t + B @ (A @ t) / len(A) for t in row]))
    return torch.stack(rows)


def dual_lora(layer, x):
    """W x + 2 B (LN(S x) * relu(T x)); LN over the rank, with factor and shift."""
    S, T, B = p(layer, "A"), p(layer, "router_weight"), p(layer, "B")

    def token(t):
        skill = S @ t
        centred = skill - skill.mean()
        skill = centred / torch.sqrt((centred**2).mean() + 1e-5) * p(layer, "norm_weight") + p(
            layer, "norm_bias"
        )
        return layer.base_layer.weight @ t + 2 * (B @ (skill * torch.clamp(T @ t, min=0)))

    return torch.stack([torch.stack([token(t) for t in row]) for row in x])


def expert_choice(layer, x):
    """Of each sequence, each expert takes the ceil(1.2 * 5 / 3) = 2 tokens with the largest softmax value for it."""
    rows = []
    for row in x:
        g = [softmax(linear_router(layer, t)) for t in row]
        taken = [sorted(range(TOKENS), key=lambda t: -g[t][i].item())[:2] for i in range(3)]
        gates = [[g[t][i] if t in taken[i] else 0 * g[t][i] for i in range(3)] for t in range(TOKENS)]
        rows.append(torch.stack([weighted(layer, t, gate, None) for t, gate in zip(row, gates, strict=True)]))
    return torch.stack(rows)


PROJECTION = {
    "rode": by_token(relu_gates),
    "lora": by_token(lambda layer, x, b: [1.0]),
    "foodlmm": by_token(lambda layer, x, b: [1.0]),
    "foodlmm-moe": by_token(lambda layer, x, b: softmax(linear_router(layer, x))),
    "loramoe": by_token(lambda layer, x, b: softmax(linear_router(layer, x))),
    "moelora": by_token(task_embedding_gates),
    "mocle": by_token(mocle_gates),
    "polytropon": polytropon,
    "hydralora": by_token(lambda layer, x, b: softmax(linear_router(layer, x))),
    "adamole": by_token(adamole_gates),
    "remoe": by_token(relu_gates),
    "expert-choice": expert_choice,
    "dual-lora": dual_lora,
}


def swiglu(mlp, x, e=None, weight_of=None):
    """The feed-forward block on one token, `weight_of(layer)` in place of its weights."""
    gate, up, down = (weight_of(layer) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    hidden = gate @ x
    return down @ (hidden / (1 + torch.exp(-hidden)) * (up @ x))


def of_expert(e):
    """The weight of a layer with one expert added to it, or as it is where it has none."""

    def weight(layer):
        if not isinstance(layer, RodeLayer):
            return layer.weight
        s, A, B = list(experts(layer))[e]
        return layer.base_layer.weight + s * B @ A

    return weight


def llava_mole(mlp, x):
    """The block's best expert by one biased router, its output not multiplied by its gate."""
    gate = mlp.gate_proj

    def token(t):
        h = [w @ t + c for w, c in zip(p(gate, "router_weight"), p(gate, "router_bias"), strict=True)]
        best = max(range(3), key=lambda i: h[i].item())
        return swiglu(mlp, t, weight_of=of_expert(best))

    return torch.stack([torch.stack([token(t) for t in row]) for row in x])


def mixlora(mlp, x):
    """sum over the two best experts of softmax over those two times the whole block with that expert's weights."""

    def token(t):
        h = linear_router(mlp.gate_proj, t)
        best = sorted(range(3), key=lambda i: -h[i].item())[:2]
        g = softmax([h[i] for i in best])
        return sum(w * swiglu(mlp, t, weight_of=of_expert(e)) for w, e in zip(g, best, strict=True))

    return torch.stack([torch.stack([token(t) for t in row]) for row in x])


BLOCK = {"llava-mole": llava_mole, "mixlora": mixlora}


def check(model, formula, site, run):
    """Values and the gradients of the input and of every adapter's parameter, through the model and through the formula."""
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    trained = {n: q for n, q in model.named_parameters() if q.requires_grad}
    dy = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    results = []
    for y in (run(model, x), formula(site, x)):
        grads = torch.autograd.grad((y * dy).sum(), [x, *trained.values()], allow_unused=True)
        results.append((y, grads))
    (mine, grads), (want, expected) = results
    torch.testing.assert_close(mine, want, rtol=1e-11, atol=1e-12)
    for name, a, b in zip(["x", *trained], grads, expected, strict=True):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        torch.testing.assert_close(
            a.broadcast_to(b.shape) if a.dim() == 0 else a,
            b if b.dim() else b.broadcast_to(a.shape),
            rtol=1e-9,
            atol=1e-11,
            check_dtype=False,
            msg=lambda m, name=name: f"{name}: {m}",
        )
    return trained, grads


def side(config: RodeConfig) -> dict[str, torch.Tensor]:
    return {config.id_input: TASK_IDS} if config.id_input else {}


@pytest.mark.parametrize("name", PROJECTION)
def test_projection(name):
    model = adapted(name)
    inner = model.base_model.model

    def run(model, x):
        from rode.tuner import routing_inputs

        config = model.peft_config["default"]
        ids = {config.id_input.removeprefix("rode_"): TASK_IDS} if config.id_input else {}
        with routing_inputs(model, **ids):
            inner.mlp, mlp = nn.Identity(), inner.mlp
            try:
                return model(x)
            finally:
                inner.mlp = mlp

    trained, grads = check(model, PROJECTION[name], inner.v_proj, run)
    for n, g in zip(trained, grads[1:], strict=True):
        assert g is not None, n
        assert g.abs().max() > 0, n


@pytest.mark.parametrize("name", BLOCK)
def test_block(name):
    model = adapted(name)
    inner = model.base_model.model
    trained, grads = check(model, BLOCK[name], inner.mlp, lambda model, x: inner.mlp(x))
    unscaled = name == "llava-mole"  # its router learns from the auxiliary loss alone
    for n, g in zip(trained, grads[1:], strict=True):
        assert (g is None or g.abs().max() == 0) == (unscaled and "router" in n), n


def test_every_preset_has_a_formula():
    assert {*PROJECTION, *BLOCK} == set(PRESETS) == set(SMALL)


@pytest.mark.parametrize("name", PRESETS)
def test_defaults_are_a_legal_configuration_that_reloads(name, tmp_path):
    config = preset(name)
    config.save_pretrained(tmp_path)
    again = RodeConfig.from_pretrained(tmp_path)
    belongs_to = again.belongs_to
    assert belongs_to["config"], "of the configuration alone: there are no weights"
    assert again.to_dict() == {**config.to_dict(), "belongs_to": belongs_to}


@pytest.mark.parametrize("name", PRESETS)
def test_adapter_reloads_to_the_same_bits(name, tmp_path):
    model = adapted(name)
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    inputs = side(model.peft_config["default"])
    with torch.no_grad():
        want = model(x, **inputs)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Model(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(x, **inputs), want)


def test_polytropon_is_pefts_poly():
    """With the same matrices and task vectors, PEFT's own layer gives the same output."""
    from peft import PolyConfig

    from rode.tuner import routing_inputs

    fields = {"r": 2, "n_tasks": 3, "n_skills": 3, "target_modules": ["v_proj"], "init_weights": False}
    theirs = get_peft_model(Model(), PolyConfig(**fields)).double().eval()
    mine = adapted("polytropon")
    a, b = mine.base_model.model.v_proj, theirs.base_model.model.v_proj
    with torch.no_grad():
        b.base_layer.weight.copy_(a.base_layer.weight)
        b.poly_router["default"].module_logits.copy_(a.adapter("default").table)
        b.poly_lora_A["default"].copy_(a.adapter("default").A.view(3, 2, WIDTH).transpose(1, 2)[None])
        b.poly_lora_B["default"].copy_(a.adapter("default").B.T.reshape(3, 2, WIDTH)[None])
        x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
        with routing_inputs(mine, task_ids=TASK_IDS):
            mine.base_model.model.mlp = theirs.base_model.model.mlp = nn.Identity()
            torch.testing.assert_close(mine(x), theirs.base_model(x, task_ids=TASK_IDS))


def test_gumbel_sigmoid_samples_in_training_as_torch_does():
    from rode.tuner.routers import gumbel_sigmoid_gates

    logits = torch.tensor([0.7, -1.2, 0.1], dtype=torch.float64)
    config = RodeConfig(gate="gumbel-sigmoid", temperature=0.8)
    torch.manual_seed(3)
    mine = torch.stack([gumbel_sigmoid_gates(logits, config, True) for _ in range(4000)])
    theirs = torch.distributions.RelaxedBernoulli(torch.tensor(0.8, dtype=torch.float64), logits=logits)
    theirs = theirs.sample((4000,))
    spread = theirs.std(0) / math.sqrt(4000)
    assert ((mine.mean(0) - theirs.mean(0)).abs() < 5 * spread).all()
    torch.testing.assert_close(mine.std(0), theirs.std(0), rtol=0.05, atol=0)
    assert torch.equal(gumbel_sigmoid_gates(logits, config, False), logits.sigmoid())


def test_unknown_preset_names_a_near_one():
    with pytest.raises(ValueError, match="no 'mixlroa'; did you mean mixlora"):
        preset("mixlroa")
