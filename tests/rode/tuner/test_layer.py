"""The adapted layer against a formula written apart from it, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from torch import nn

from rode.tuner import RodeConfig, RodeLayer

RANKS = (2, 1, 3)


def make(mlp, dtype=torch.float64, **fields):
    fields = {"ranks": RANKS, "dropout": 0.0, "init_weights": False, "target_modules": ["lin0"], **fields}
    if fields.get("gate") == "topk":
        fields.setdefault("top_k", 1)
    torch.manual_seed(3)
    return get_peft_model(mlp(dtype), RodeConfig(**fields))


def adapted(mlp, dtype=torch.float64, **fields):
    model = make(mlp, dtype, **fields)
    return model, model.base_model.model.lin0


PARTS = ("A", "B", "router_weight", "router_bias")


def parts(layer, adapter="default"):
    """The adapter's A, B, router and router bias (None where there is none)."""
    return [getattr(layer.adapter(adapter), name) for name in PARTS]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", ["relu", "softmax", "topk", "none"])
def test_values_and_gradients_are_the_formulas(mlp, oracle, gate, bias):
    if gate == "none" and bias:
        pytest.skip("no router, no bias")
    _, layer = adapted(mlp, gate=gate, router_bias=bias)
    base = layer.base_layer
    x = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 4, 9, dtype=torch.float64)
    y = layer(x)
    y.backward(dy)

    mine = [p for p in parts(layer) if p is not None]
    assert all(p.dtype == torch.float64 for p in mine)
    copies = [None if p is None else p.detach().clone().requires_grad_() for p in parts(layer)]
    x2 = x.detach().clone().requires_grad_()
    scaling = [16 / r for r in RANKS]
    want = oracle(x2, base.weight.detach(), base.bias.detach(), *copies, RANKS, scaling, gate)
    want.backward(dy)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-11, atol=1e-12)
    for name, p, copy in zip(PARTS, parts(layer), copies, strict=False):
        if p is not None:
            assert copy.grad.abs().max() > 0, name
            torch.testing.assert_close(p.grad, copy.grad, rtol=1e-11, atol=1e-12, msg=name)
    assert base.weight.grad is None


def test_scalings(mlp, oracle, scaling):
    name, meaning = scaling
    _, layer = adapted(mlp, scaling=name, alpha=5.0)
    x = torch.randn(7, 12, dtype=torch.float64)
    want = oracle(
        x, layer.base_layer.weight, layer.base_layer.bias, *parts(layer), RANKS, meaning(RANKS, 5.0), "relu"
    )
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_explicit_scaling_and_patterns(mlp, oracle):
    model, layer = adapted(
        mlp,
        target_modules=["lin0", "lin1"],
        ranks=(4,),
        rank_pattern={"lin1": (1, 2)},
        alpha_pattern={"lin1": 3.0},
    )
    assert layer.adapter("default").ranks == (4,)
    assert layer.adapter("default").scaling == (4.0,)
    lin1 = model.base_model.model.lin1
    assert lin1.adapter("default").ranks == (1, 2)
    assert lin1.adapter("default").scaling == (3.0, 1.5)
    assert lin1.adapter("default").A.shape == (3, 9)
    _, layer = adapted(mlp, scaling=(0.5, -1.0, 2.0))
    x = torch.randn(3, 12, dtype=torch.float64)
    base = layer.base_layer
    want = oracle(x, base.weight, base.bias, *parts(layer), RANKS, (0.5, -1.0, 2.0), "relu")
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_top1_keeps_one_gate_and_its_gradient_reaches_all_logits():
    from rode.tuner.routers import topk_gates

    logits = torch.tensor([[0.3, 1.2, -0.4], [2.0, 2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    gates = topk_gates(logits, RodeConfig(gate="topk", top_k=1)).gates
    soft = logits.detach().softmax(-1)
    want = torch.tensor([[0.0, soft[0, 1], 0.0], [soft[1, 0], 0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(gates, want)  # exact zeros, and the first of equals
    gates[0].sum().backward()
    s = soft[0]  # d softmax_1 / d logit_j = s_1 ([j = 1] - s_j)
    want = s[1] * (torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64) - s)
    torch.testing.assert_close(logits.grad[0], want)


def test_autocast_does_not_round_router_logits():
    from rode.tuner.routers import router_logits

    x, weight, bias = torch.randn(5, 64).to(torch.bfloat16), torch.randn(3, 64), torch.randn(3)
    with torch.autocast("cpu", torch.bfloat16):
        logits = router_logits(x, weight, bias)
    want = x.double() @ weight.double().T + bias.double()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), want, rtol=1e-5, atol=1e-5)


def test_router_keeps_no_copy_of_x_for_backward():
    from rode.tuner.routers import router_logits

    x = torch.randn(2, 50, 64).to(torch.bfloat16).requires_grad_()
    weight, kept = torch.randn(3, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        logits = router_logits(x, weight, None)
    assert sorted(t.data_ptr() for t in kept) == sorted((x.data_ptr(), weight.data_ptr()))
    dh = torch.randn(2, 50, 3)
    logits.backward(dh)
    torch.testing.assert_close(
        weight.grad, torch.einsum("btn,btk->nk", dh, x.detach().float()), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(x.grad, (dh @ weight.detach()).to(torch.bfloat16))


def test_a_new_adapter_changes_nothing(mlp):
    x = torch.randn(4, 12, dtype=torch.float64)
    want = mlp()(x)
    model, _ = adapted(mlp, init_weights=True)
    assert torch.equal(model(x), want)


def test_initialisation_is_loras_and_follows_the_seed(mlp):
    _, layer = adapted(mlp, init_weights=True, ranks=(200, 300))
    _, twin = adapted(mlp, init_weights=True, ranks=(200, 300))
    for a, b in zip(parts(layer)[:3], parts(twin)[:3], strict=True):
        assert torch.equal(a, b)
    bound = 1 / math.sqrt(12)
    A, B, router, _ = parts(layer)
    assert A.abs().max() <= bound
    assert abs(A.std().item() - bound / math.sqrt(3)) < 0.01  # uniform in +-1/sqrt(K)
    assert B.count_nonzero() == 0
    assert 0 < router.abs().max() <= bound


def test_router_inits(mlp):
    _, layer = adapted(mlp, router_init="open", router_bias=True)
    x = torch.randn(5, 12, dtype=torch.float64)
    delta = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(delta, x @ layer.get_delta_weight("default").T, rtol=1e-12, atol=1e-12)
    _, layer = adapted(mlp, router_init="normal", router_bias=True, ranks=(1,) * 500)
    router, bias = parts(layer)[2:]
    assert abs(router.std().item() - 0.02) < 0.002
    assert bias.count_nonzero() == 0
    _, layer = adapted(mlp, router_bias=True, ranks=(1,) * 500)
    router, bias = parts(layer)[2:]
    open_share = ((torch.randn(400, 12).double() @ router.T + bias) > 0).double().mean().item()
    assert abs(open_share - 0.5) < 0.05  # the reason for the default


def test_closed_experts_get_zero_gradients_and_not_none(mlp):
    model, layer = adapted(mlp, router_bias=True)
    with torch.no_grad():
        layer.adapter("default").router_weight.zero_()
        layer.adapter("default").router_bias.copy_(torch.tensor([-1.0, 2.0, -1.0]))
    x = torch.randn(6, 12, dtype=torch.float64)
    model(x).sum().backward()
    A, B, router, bias = (p.grad for p in parts(layer))
    assert A[:2].count_nonzero() == 0
    assert A[3:].count_nonzero() == 0
    assert A[2].count_nonzero() > 0
    assert B[:, [0, 1, 3, 4, 5]].count_nonzero() == 0
    assert router[[0, 2]].count_nonzero() == 0
    assert bias[0] == 0
    assert bias[1] != 0


@pytest.mark.parametrize("gate", ["relu", "softmax", "topk", "none"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_activations_with_float32_adapter(mlp, oracle, gate, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    _, layer = adapted(mlp, dtype, gate=gate)
    assert all(p is None or p.dtype == torch.float32 for p in parts(layer))
    x = torch.randn(16, 12, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert all(p is None or p.grad.dtype == torch.float32 for p in parts(layer))
    wide = [None if p is None else p.detach().double() for p in parts(layer)]
    base = layer.base_layer
    want = oracle(
        x.detach().double(),
        base.weight.double(),
        base.bias.double(),
        *wide,
        RANKS,
        [16 / r for r in RANKS],
        gate,
    )
    error = (y.double() - want).abs().max(-1).values  # by token: near a tie, the top 1 may choose otherwise
    assert error.median() < 0.02 * want.abs().max()


class Widening(nn.Module):
    """Stands for a quantised layer: not nn.Linear, and its output has another dtype than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 12, 9
        self.weight = nn.Parameter(torch.randn(9, 12).to(torch.bfloat16))
        self.saved = None

    def forward(self, x):
        self.saved = x.float() @ self.weight.float().T
        return self.saved


def test_other_linear_layers_and_output_dtypes(mlp):
    model = mlp(torch.bfloat16)
    model.lin0 = Widening()
    config = RodeConfig(ranks=RANKS, dropout=0.0, init_weights=False, target_modules=["lin0"])
    with pytest.warns(UserWarning, match="Unsupported layer type"):
        model = get_peft_model(model, config)
    layer = model.base_model.model.lin0
    x = torch.randn(4, 12).to(torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.float32
    base = layer.base_layer.saved
    assert torch.equal(base, layer.base_layer(x))  # nothing was written into what the base layer keeps
    assert not torch.equal(y, base)


@pytest.mark.parametrize("gate", ["relu", "none"])
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_layers(bits, gate):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    quantised = (
        bnb.nn.Linear4bit(64, 32) if bits == 4 else bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    )
    quantised.load_state_dict(linear.state_dict())
    config = RodeConfig(ranks=(2, 4), gate=gate, dropout=0.0, init_weights=False, target_modules=["0"])
    model = get_peft_model(nn.Sequential(quantised.to("cpu")), config)
    layer = model.base_model.model[0]
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    y = model(x)
    with model.disable_adapter():
        base = model(x)
    y.sum().backward()
    assert all(p.grad.count_nonzero() > 0 for p in layer.parameters() if p.requires_grad)
    assert x.grad.count_nonzero() > 0
    if gate == "none":
        want = x.double() @ layer.get_delta_weight("default").double().T
        torch.testing.assert_close((y - base).double(), want, rtol=0.02, atol=0.05)
        model.merge_adapter()
        assert (model(x) - y).abs().mean() < 0.2 * (y - base).abs().mean()  # rounded to few bits again
        model.unmerge_adapter()


def test_hooks_on_the_base_layer_see_its_own_output(mlp):
    _, layer = adapted(mlp)
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(4, 12, dtype=torch.float64)
    layer(x)
    assert torch.equal(seen[0], nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))


def test_dropout_acts_in_training_only_and_never_on_the_router(mlp):
    model, layer = adapted(mlp, gate="relu", dropout=0.5)
    x = torch.randn(1, 12, dtype=torch.float64).expand(4000, 12).contiguous()
    model.eval()
    still = layer(x)
    assert torch.equal(still, layer(x))
    model.train()
    torch.manual_seed(0)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(0)
    assert torch.equal(first, layer(x))
    # What is kept is scaled up, so the mean over draws stays; had the router seen the dropped input, its gates would rise.
    mean, wide = first.mean(0), (still - layer.base_layer(x)).abs().max().item()
    torch.testing.assert_close(mean, still[0], rtol=0, atol=0.1 * wide)
    with torch.no_grad():
        layer.adapter("default").router_weight.zero_()[:, 0] = 1.0  # gates are the first feature
    if x[0, 0] <= 0:
        x = -x
    assert (layer(x) != layer.base_layer(x)).any(
        -1
    ).float().mean() > 0.99  # half of them, had it been dropped there


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("gate", ["relu", "topk", "none"])
def test_checkpointing_gives_the_same_gradients(mlp, gate, reentrant):
    from torch.utils.checkpoint import checkpoint

    grads = []
    for recompute in (False, True):
        model, layer = adapted(mlp, gate=gate, dropout=0.3)
        x = torch.randn(
            8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
        ).requires_grad_()
        torch.manual_seed(9)
        y = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
        y.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in parts(layer) if p is not None)])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


def test_merge_and_unmerge_constant_gates(mlp):
    model, layer = adapted(mlp, gate="none")
    x = torch.randn(6, 12, dtype=torch.float64)
    want, weight = model(x), layer.base_layer.weight.clone()
    model.merge_adapter(safe_merge=True)
    assert layer.merged
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    with model.disable_adapter():  # unmerges
        torch.testing.assert_close(model(x), mlp()(x), rtol=1e-12, atol=1e-12)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, weight, rtol=1e-12, atol=1e-12)
    plain = model.merge_and_unload()
    assert not any(isinstance(m, RodeLayer) for m in plain.modules())
    torch.testing.assert_close(plain(x), want, rtol=1e-12, atol=1e-12)


def test_broken_weights_are_not_merged(mlp):
    model, layer = adapted(mlp, gate="none")
    weight = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.adapter("default").A[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)


@pytest.mark.parametrize("gate", ["relu", "softmax", "topk"])
def test_gates_that_depend_on_the_input_refuse_to_merge(mlp, gate):
    model = make(mlp, gate=gate, target_modules=["lin1"])
    routed = model.base_model.model.lin1
    plain = RodeConfig(ranks=(2,), gate="none", init_weights=False, target_modules=["lin0", "lin1"])
    model.add_adapter("plain", plain)
    layer = model.base_model.model.lin0  # comes first, and could be merged
    weight = layer.base_layer.weight.clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=f"adapter 'default': its {gate} gates depend on the input"):
            merge(adapter_names=["plain", "default"])
    assert torch.equal(layer.base_layer.weight, weight)
    assert not layer.merged
    with pytest.raises(ValueError, match="cannot be merged"):
        routed.merge()


@pytest.mark.parametrize("gate", ["relu", "topk"])
def test_compiles_without_graph_breaks(mlp, gate):
    model, _ = adapted(mlp, torch.float32, gate=gate, target_modules=["lin0", "lin1"])
    x = torch.randn(4, 12)
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
