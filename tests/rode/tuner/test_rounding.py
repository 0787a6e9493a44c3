"""While a model generates, adapters round float32 parameters once: the same bits, and never those of older parameters."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from rode.tuner.rounding import RoundedParameters, rounded_parameters
from tiny_llama import adapted_llama

IDS = torch.arange(10).view(2, 5)
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
KINDS = {
    "rode": dict(),
    "softmax": dict(gate="softmax"),
    "one expert": dict(gate="none", ranks=(4,)),
    "shared A": dict(shared_A=True, ranks=(3, 3)),
    "normalised experts": dict(norm_experts=True),
    "averaged factors": dict(gate="softmax", router_input="task", combine="factors", num_ids=3, ranks=(3, 3)),
}


def adapted(**options):
    return adapted_llama(torch.bfloat16, ["q_proj", "v_proj", "down_proj"], **options).eval()


def adapters_of(model):
    return [layer.adapter("default") for layer in model.modules() if hasattr(layer, "rode_adapters")]


class AtEachToken(LogitsProcessor):
    def __init__(self, do):
        self.do = do

    def __call__(self, input_ids, scores):
        self.do()
        return scores


def generate(model, do=lambda: None, **more):
    out = model.generate(
        input_ids=IDS,
        logits_processor=LogitsProcessorList([AtEachToken(do)]),
        return_dict_in_generate=True,
        output_logits=True,
        **GREEDY,
        **more,
    )
    return torch.stack(out.logits)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_generation_has_the_bits_of_rounding_in_each_call(monkeypatch, kind):
    model = adapted(**KINDS[kind])
    more = {"rode_task_ids": torch.tensor([0, 2])} if kind == "averaged factors" else {}
    kept = generate(model, **more)
    monkeypatch.setattr(RoundedParameters, "of", lambda self, name, parameter, x: parameter)
    assert torch.equal(kept, generate(model, **more))


def test_each_parameter_is_rounded_once():
    model, seen = adapted(), []
    adapter = adapters_of(model)[0]

    def look():
        seen.append({name: kept[2] for name, kept in adapter.rounded._kept.items()})

    generate(model, look)
    assert len(seen) == 4
    assert seen[0].keys() == {"A", "B", "router_weight"}
    for later in seen[1:]:
        assert all(later[name] is seen[0][name] for name in later)
    assert all(one.rounded is None for one in adapters_of(model))


@pytest.mark.parametrize("change", ["in place", "another tensor"])
def test_a_parameter_that_changes_is_rounded_again(change):
    """As when another adapter is swapped in between two tokens."""
    model, x = adapted(), torch.randn(1, 24, dtype=torch.bfloat16)
    layer = next(m for m in model.modules() if hasattr(m, "rode_adapters"))
    adapter = layer.adapter("default")
    with torch.no_grad(), rounded_parameters([adapter]):
        before = layer(x)
        if change == "in place":
            adapter.A.mul_(-3.0)
        else:
            adapter.A = torch.nn.Parameter(adapter.A * -3.0)
        after = layer(x)
    assert not torch.equal(before, after)
    with torch.no_grad():
        assert torch.equal(after, layer(x))


def test_an_error_on_the_way_leaves_nothing_rounded():
    model = adapted()

    def fail():
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        generate(model, fail)
    assert all(one.rounded is None for one in adapters_of(model))


def test_outside_of_generation_nothing_is_kept():
    model = adapted()
    with torch.no_grad():
        before = model(IDS).logits
        for adapter in adapters_of(model):
            adapter.B.data.copy_(adapter.B.data * 2)  # without autograd's notice, as some optimizers write
        assert not torch.equal(model(IDS).logits, before)
