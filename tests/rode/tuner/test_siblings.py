"""Layers of one module that get the same tensor learn to run as a group: the same results, whatever breaks the habit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from rode.tuner import GateStatistics, RodeConfig
from rode.tuner import siblings as module
from rode.tuner.siblings import learned_groups, restore_groups, siblings_of
from rode_kernels import backends
from rode_kernels.backends.cuda import emulated
from tiny_llama import adapted_llama

IDS = torch.arange(32).view(2, 16) * 7 % 61
QKV, GATE_UP = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]


@pytest.fixture(autouse=True)
def any_number_of_tokens(monkeypatch):
    monkeypatch.setattr(module, "_FEWEST_TOKENS", 1)


def llama(dtype=torch.float64, **options):
    model = adapted_llama(dtype, **{"dropout": 0.0, **options})
    model.enable_input_require_grads()  # so that x of the first block needs its gradient, too
    return model.train()


def alone(model):
    """The same model, whose layers run by themselves."""
    for one in siblings_of(model).values():
        one.dissolve()
    return model


def names(model):
    return {
        block.rpartition(".")[2]: None if group is None else [name.rpartition(".")[2] for name in group]
        for block, group in learned_groups(model).items()
    }


def gradients(model, run=None, seed=0):
    """Loss and every gradient."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(IDS, labels=IDS).loss if run is None else run(model)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(have, want):
    assert len(have) == len(want)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def nodes(loss):
    """Names of the nodes of a graph."""
    seen, todo = {}, [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen[node] = node.name()
            todo += [following for following, _ in node.next_functions]
    return list(seen.values())


def test_layers_learn_in_the_first_pass_and_run_together_from_the_second():
    model = llama()
    want = gradients(alone(llama()))
    first = model(IDS, labels=IDS).loss
    assert not any("SiblingsFunction" in name for name in nodes(first))
    assert names(model) == {"self_attn": QKV, "mlp": GATE_UP}
    second = model(IDS, labels=IDS).loss
    assert sum("SiblingsFunction" in name for name in nodes(second)) == 4
    assert sum("LinearMixtureFunction" in name for name in nodes(second)) == 4  # o_proj and down_proj
    for _ in range(2):
        assert_same(gradients(model), want)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing(reentrant, dropout):
    """The gradients are those without, and those of single layers, which drop the same elements."""
    plain, model = llama(dropout=dropout), llama(dropout=dropout)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    single = alone(llama(dropout=dropout))
    for seed in range(3):
        want = gradients(single, seed=seed)
        assert_same(gradients(model, seed=seed), want)
        assert_same(gradients(plain, seed=seed), want)
    assert names(model) == {"self_attn": QKV, "mlp": GATE_UP}


def test_with_dropout_the_kernels_of_gpus_run_groups_together(monkeypatch):
    """The emulated ones: the same gradients as of single layers, which drop the same elements."""
    if not backends()["cuda-emulated"].available:
        pytest.skip(backends()["cuda-emulated"].reason)
    monkeypatch.setenv("RODE_BACKEND", "cuda-emulated")
    monkeypatch.setattr(emulated.machine, "together", True)
    monkeypatch.setattr(emulated.machine, "architecture", 90)
    model, single, ran = llama(torch.float32, dropout=0.3), alone(llama(torch.float32, dropout=0.3)), []
    for name in ("forward_siblings", "backward_siblings"):
        run = getattr(emulated, name)

        def noted(*args, name=name, run=run):
            found = run(*args)
            ran.append((name, len(args[0]), found is not None))
            return found

        monkeypatch.setattr(emulated, name, noted)
    for seed in range(2):
        have, want = gradients(model, seed=seed), gradients(single, seed=seed)
        for a, b in zip(have, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    both = [(name, size, True) for size in (3, 2) for name in ("forward_siblings", "backward_siblings")]
    assert sorted(ran) == sorted(both * 2)  # of two blocks, in the second pass


def test_two_passes_wait_for_one_backward_under_checkpointing():
    """A group that was learned in the first must not begin in the second: the first would be computed again as a group."""
    model, want = (
        llama(),
        gradients(alone(llama()), lambda m: m(IDS, labels=IDS).loss + m(IDS.flip(1), labels=IDS).loss),
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(3):
        assert_same(
            gradients(model, lambda m: m(IDS, labels=IDS).loss + m(IDS.flip(1), labels=IDS).loss), want
        )
    assert any("SiblingsFunction" in name for name in nodes(model(IDS, labels=IDS).loss))


def test_a_retained_graph_is_computed_again_as_it_was():
    model, want = llama(), gradients(alone(llama()))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    gradients(model)

    def twice(m):
        loss = m(IDS, labels=IDS).loss
        loss.backward(retain_graph=True)
        m.zero_grad()
        return loss

    assert_same(gradients(model, twice), want)


class Three(nn.Module):
    """Three layers, called as `calls` says."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))
        self.calls = lambda q, k, v, x: q(x) * k(x) + v(x)

    def forward(self, x):
        return self.calls(self.q, self.k, self.v, x)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Three()

    def forward(self, x):
        return self.inner(x * 1)


def three(**options):
    torch.manual_seed(0)
    options = {"ranks": (1, 2), "init_weights": False, "dropout": 0.0, **options}
    return get_peft_model(Outer(), RodeConfig(target_modules=["q", "k", "v"], **options)).train()


def inner_of(model):
    return model.base_model.model.inner


X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)


def of_x(model, seed=0):
    """Output's sum of squares and gradients, of x too."""

    def run(m):
        x = X.clone().requires_grad_()
        of_x.x = x
        return m(x).square().sum()

    found = gradients(model, run, seed)
    return [*found, of_x.x.grad]


def with_another_tensor(q, k, v, x):
    return q(x) * k(x) + v(x * 1)


def without_one(q, k, v, x):
    return q(x) + v(x)


def without_the_leader(q, k, v, x):
    return k(x) + v(x)


def in_another_order(q, k, v, x):
    return v(x) + q(x) * k(x)


def changed_in_place(q, k, v, x):
    h = x * 2
    a = q(h).detach()
    with torch.no_grad():
        h += 1
    return k(h) * a + v(h)


def without_gradients_at_first(q, k, v, x):
    with torch.no_grad():
        a = q(x)
    return a * k(x) + v(x)


def one_twice(q, k, v, x):
    return q(x) * q(x) + k(x) + v(x)


HABITS = [
    with_another_tensor,
    without_one,
    without_the_leader,
    in_another_order,
    changed_in_place,
    without_gradients_at_first,
    one_twice,
]


@pytest.mark.parametrize("before", [True, False], ids=["learned before", "from the start"])
@pytest.mark.parametrize("habit", HABITS)
def test_a_broken_habit_dissolves_the_group_once_with_the_same_results(habit, before):
    model, single = three(), alone(three())
    if before:
        assert_same(of_x(model), of_x(single))
        assert_same(of_x(model), of_x(single))
        assert names(model) == {"inner": ["q", "k", "v"]}
    for m in (model, single):
        inner_of(m).calls = habit
    for _ in range(3):
        assert_same(of_x(model), of_x(single))
    inner_of(model).calls = inner_of(single).calls = lambda q, k, v, x: q(x) * k(x) + v(x)
    for _ in range(2):
        assert_same(of_x(model), of_x(single))
    if before:
        assert names(model) == {"inner": None}
        assert not siblings_of(model)[next(iter(siblings_of(model)))]._ready


def hook_on_a_base_layer(layers):
    layers[1].base_layer.register_forward_hook(lambda *_: None)


def hook_on_an_adapter(layers):
    layers[2].rode_adapters["default"].register_forward_hook(lambda *_: None)


def patched_forward(layers):
    forward = layers[0].base_layer.forward
    layers[0].base_layer.forward = lambda x: forward(x)


@pytest.mark.parametrize("change", [hook_on_a_base_layer, hook_on_an_adapter, patched_forward])
def test_a_layer_that_cannot_take_part(change):
    model, single = three(), alone(three())
    for _ in range(2):
        of_x(model)
    change([inner_of(model).q, inner_of(model).k, inner_of(model).v])
    for _ in range(2):
        assert_same(of_x(model), of_x(single))
    assert names(model) == {"inner": None}


def test_adapters_off_for_a_pass_is_no_broken_habit():
    """As for the reference model of preference training."""
    model, single = three(), alone(three())
    for _ in range(2):
        of_x(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), _without_adapters(single))
    assert_same(of_x(model), of_x(single))
    assert names(model) == {"inner": ["q", "k", "v"]}


def _without_adapters(model):
    with model.disable_adapter():
        return model(X)


def test_an_error_between_two_layers():
    model, single = three(), alone(three())
    for _ in range(2):
        of_x(model)

    def fails(q, k, v, x):
        q(x)
        raise RuntimeError("stop")

    usual, inner_of(model).calls = inner_of(model).calls, fails
    with pytest.raises(RuntimeError, match="stop"):
        model(X)
    inner_of(model).calls = usual
    for _ in range(2):
        assert_same(of_x(model), of_x(single))


def test_two_active_adapters():
    model, single = three(), alone(three())
    for m in (model, single):
        torch.manual_seed(5)
        m.add_adapter(
            "other",
            RodeConfig(
                ranks=(2,), gate="none", target_modules=["q", "k", "v"], init_weights=False, dropout=0.0
            ),
        )
        m.base_model.set_adapter(["default", "other"])
    for _ in range(3):
        assert_same(of_x(model), of_x(single))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_in_regions_of_checkpointing_of_their_own(reentrant, dropout):
    """Each region is computed again by itself; gradients are those of the loss that was computed."""
    model = three(dropout=dropout)

    def calls(q, k, v, x):
        a, b = (checkpoint(layer, x, use_reentrant=reentrant) for layer in (q, v))
        return a * k(x) + b

    parameter = inner_of(model).v.rode_adapters["default"].A
    direction = torch.randn_like(parameter)
    for step in range(3):
        if step:
            inner_of(model).calls = calls
        of_x(model)  # what it learns of the calls, or unlearns, it knows from here on
        values = []
        for change in (1e-6, -2e-6, 1e-6):
            with torch.no_grad():
                parameter += change * direction
            values.append(of_x(model, seed=step)[0])
        slope = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close((parameter.grad * direction).sum(), slope, rtol=1e-5, atol=1e-7)


def test_compiled_code_leaves_the_group_alone():
    model, single = three(), alone(three())
    for _ in range(2):
        of_x(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(X), single(X))
    assert_same(of_x(model), of_x(single))


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_learns_for_itself(how):
    model = llama()
    model.disable_input_require_grads()  # its hook cannot be pickled
    gradients(model)
    other = how(model)
    assert names(other) == names(model)
    for one, two in zip(siblings_of(model).values(), siblings_of(other).values(), strict=True):
        assert one is not two
        assert not {id(layer) for layer in one.layers} & {id(layer) for layer in two.layers}
    want = gradients(alone(llama()))
    for m in (other, model, other):
        assert_same(gradients(m), want)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=str)
def test_restored_groups_begin_at_once_to_the_same_bits(targets):
    """Also those that were learned in a first pass and have not run yet."""
    model, fresh = llama(target_modules=targets), llama(target_modules=targets)
    gradients(model)
    groups = learned_groups(model)
    want = gradients(model)
    restore_groups(fresh, groups)
    for a, b in zip(gradients(fresh), want, strict=True):
        assert torch.equal(a, b)
    restore_groups(fresh, {"model.layers.0.self_attn": None, "nowhere": ["x"]})
    assert learned_groups(fresh)["model.layers.0.self_attn"] is None


@pytest.mark.parametrize(
    "options",
    [dict(aux_loss="l1", aux_weight=0.1), dict(router_bias=True), dict(ranks=(2, 2), shared_A=True)],
    ids=str,
)
def test_auxiliary_losses_and_statistics(options):
    model, single = llama(**options), alone(llama(**options))
    reports = []
    for m in (model, single):
        for _ in range(2):
            m(IDS)
        statistics = GateStatistics(m)
        with torch.no_grad():
            m(IDS)
        reports.append(statistics.report().scalars())
        statistics.detach()
    assert reports[0] == pytest.approx(reports[1])
    assert_same(gradients(model), gradients(single))


def test_autocast_and_generation():
    """Bits of each layer's output are those of the layer by itself."""
    model, single = llama(torch.float32), alone(llama(torch.float32))
    for m in (model, single):
        m.eval()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            m(IDS)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(IDS).logits, single(IDS).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=IDS, **options), single.generate(input_ids=IDS, **options))


def test_few_tokens_run_by_themselves(monkeypatch):
    monkeypatch.setattr(module, "_FEWEST_TOKENS", 33)
    model = llama()
    for _ in range(2):
        gradients(model)
    assert names(model) == {}
