"""GateStatistics against counts made by hand, outside of the package."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from rode.tuner import GateStatistics, RodeConfig, RodeLayer
from rode.tuner.recorder import GateRecorder, TokenKinds

RANKS = (2, 4, 1)


def adapted(tiny_llava, **fields):
    torch.manual_seed(4)
    fields = {"ranks": RANKS, "init_weights": False, "dropout": 0.0, **fields}
    return get_peft_model(tiny_llava(), RodeConfig(**fields)).eval()


def inputs_by_layer(model, call):
    """What each adapted layer sees during `call`, in order: {name: [x, ...]}."""
    seen, hooks = {}, []
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, RodeLayer):
            keep = seen.setdefault(name, [])
            hooks.append(
                module.register_forward_pre_hook(lambda _, args, keep=keep: keep.append(args[0].detach()))
            )
    call()
    for hook in hooks:
        hook.remove()
    return seen


def counted_by_hand(model, seen, batches):
    """{layer: {kind: (tokens, open share of each expert, mean gate of each expert)}} for lists of (ids, mask) rows."""
    out = {}
    for name, xs in seen.items():
        router = model.get_base_model().get_submodule(name).adapter("default").router_weight.detach()
        gates = {"image": [], "text": []}
        for x, (ids, mask) in zip(xs, batches, strict=True):
            for row in range(ids.shape[0]):
                for t in range(ids.shape[1]):
                    if mask[row, t]:
                        kind = "image" if ids[row, t] == 100 else "text"
                        gates[kind].append((router @ x[row, t]).clamp(min=0).tolist())
        gates["all"] = gates["image"] + gates["text"]
        out[name] = {
            kind: (
                len(rows),
                [sum(g[i] > 0 for g in rows) / len(rows) for i in range(len(RANKS))],
                [sum(g[i] for g in rows) / len(rows) for i in range(len(RANKS))],
            )
            for kind, rows in gates.items()
            if rows
        }
    return out


def check(report, want):
    assert [layer.name for layer in report.layers] == list(want)
    for layer in report.layers:
        assert layer.ranks == RANKS
        assert layer.block == int(layer.name.split(".layers.")[1].split(".")[0])
        for kind, (tokens, rates, means) in want[layer.name].items():
            assert layer.tokens[kind] == tokens
            assert layer.open_rate[kind] == pytest.approx(rates, abs=1e-12)
            assert layer.mean_gate[kind] == pytest.approx(means, rel=1e-5)


def test_counts_are_those_made_by_hand(tiny_llava, llava_batch):
    model = adapted(tiny_llava)
    with GateStatistics().attach(model) as statistics:
        seen = inputs_by_layer(model, lambda: model(**llava_batch))
    assert all(layer.tokens == {"image": 8, "text": 8, "all": 16} for layer in statistics.report().layers)
    rows = (llava_batch["input_ids"], llava_batch["attention_mask"])
    check(statistics.report(), counted_by_hand(model, seen, [rows]))


def test_generation_with_a_cache_counts_each_token_once(tiny_llava, llava_batch):
    model = adapted(tiny_llava)
    ids = []
    with GateStatistics().attach(model) as statistics:
        seen = inputs_by_layer(
            model, lambda: ids.append(model.generate(**llava_batch, max_new_tokens=4, min_new_tokens=4))
        )
    prompt = llava_batch["input_ids"].shape[1]
    batches = [(llava_batch["input_ids"], llava_batch["attention_mask"])]
    batches += [
        (ids[0][:, t : t + 1], torch.ones(2, 1)) for t in range(prompt, prompt + 3)
    ]  # the last is not run
    check(statistics.report(), counted_by_hand(model, seen, batches))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_run_again_by_checkpointing_counts_once(tiny_llava, llava_batch, reentrant):
    reports, grads = [], []
    for checkpointing in (False, True):
        model = adapted(tiny_llava).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with GateStatistics().attach(model) as statistics:
            model(**llava_batch, labels=llava_batch["input_ids"]).loss.backward()
        reports.append(statistics.report())
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert reports[0] == reports[1]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_nothing_changes_while_counting(tiny_llava, llava_batch):
    model = adapted(tiny_llava)
    want = model(**llava_batch).logits
    with GateStatistics().attach(model):
        assert torch.equal(model(**llava_batch).logits, want)
    assert torch.equal(model(**llava_batch).logits, want)
    assert not model.get_base_model()._forward_pre_hooks
    assert all(m.info.gate_recorder is None for m in model.modules() if isinstance(m, RodeLayer))


class Fetches(TorchDispatchMode):
    """Operators that would make the host wait for a GPU."""

    WAITING = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_to_copy")

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.WAITING:
            self.seen.append((str(function), (kwargs or {}).get("device")))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"by_example": True}])
def test_counting_never_fetches_from_the_device(tiny_llava, llava_batch, options):
    model = adapted(tiny_llava)
    with Fetches() as without:
        model(**llava_batch)
    statistics = GateStatistics(**options).attach(model)
    with Fetches() as with_statistics:
        model(**llava_batch)

    def waits(calls):
        return [name for name, device in calls if "_to_copy" not in name or device is not None]

    assert waits(with_statistics.seen) == waits(without.seen)
    with Fetches() as reporting:
        statistics.report()
    assert waits(reporting.seen)  # the probe sees what it looks for


def test_inference_mode_and_training_share_the_counts(tiny_llava, llava_batch):
    model = adapted(tiny_llava)
    with GateStatistics().attach(model) as statistics:
        with torch.inference_mode():
            model(**llava_batch)
        model(**llava_batch)
        with torch.autocast("cpu", torch.bfloat16):
            model(**llava_batch)
        assert statistics.report().layers[0].tokens["all"] == 3 * 16
        statistics.reset()
        assert statistics.report().layers == ()
        model(**llava_batch)
        assert statistics.report().layers[0].tokens["all"] == 16


def test_softmax_and_topk(tiny_llava, llava_batch):
    for gate, open_experts in (("softmax", 3), ("topk", 2)):
        model = adapted(tiny_llava, gate=gate, **({"top_k": 2} if gate == "topk" else {}))
        with GateStatistics().attach(model) as statistics:
            model(**llava_batch)
        for layer in statistics.report().layers:
            assert sum(layer.open_rate["all"]) == pytest.approx(open_experts)
            if gate == "softmax":
                assert sum(layer.mean_gate["text"]) == pytest.approx(1.0, rel=1e-5)


def test_constant_gates_have_nothing_to_count(tiny_llava, llava_batch):
    model = adapted(tiny_llava, gate="none")
    with GateStatistics().attach(model) as statistics:
        model(**llava_batch)
    report = statistics.report()
    assert report.layers == ()
    assert report.heat_map() == ([], [])
    assert report.scalars() == {}


def test_patches_of_an_adapted_tower_are_image_tokens(tiny_llava, llava_batch):
    model = adapted(tiny_llava, target_modules=r".*(vision_tower|language_model).*q_proj")
    with GateStatistics().attach(model) as statistics:
        model(**llava_batch)
    tokens = {layer.name.split(".")[1]: layer.tokens for layer in statistics.report().layers}
    assert tokens["vision_tower"] == {"image": 2 * 5, "text": 0, "all": 10}  # 4 patches and the class token
    assert tokens["language_model"] == {"image": 8, "text": 8, "all": 16}
    tower = next(layer for layer in statistics.report().layers if "vision_tower" in layer.name)
    assert tower.open_rate["text"] is None


def test_summaries(tiny_llava, llava_batch):
    model = adapted(tiny_llava)
    with GateStatistics().attach(model) as statistics:
        model(**llava_batch)
    report = statistics.report()
    blocks, rows = report.heat_map()
    assert blocks == [0, 1]
    for block, row in zip(blocks, rows, strict=True):
        layers = [layer.mean_gate["all"] for layer in report.layers if layer.block == block]
        assert len(layers) == 2
        assert row == pytest.approx([(a + b) / 2 for a, b in zip(*layers, strict=True)])
    assert report.heat_map("open_rate", "image")[1][0] != rows[0]
    scalars = report.scalars()
    assert set(scalars) == {"gates/open_image", "gates/open_text"} | {
        f"gates/{short}_expert{i}_rank{rank}" for short in ("open", "mean") for i, rank in enumerate(RANKS)
    }
    rates = [layer.open_rate["all"][1] for layer in report.layers]
    assert scalars["gates/open_expert1_rank4"] == pytest.approx(sum(rates) / 4)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["tokens"]["text"] == 8


def mixed_by_hand(gates):
    """(zeros, effective number, carriers of 90 %, closed) of one token."""
    total = sum(gates)
    if total == 0:
        return len(gates), 0.0, 0, 1
    shares = sorted((g / total for g in gates), reverse=True)
    effective = math.exp(-sum(p * math.log(p) for p in shares if p > 0))
    carriers = next(k for k in range(1, len(shares) + 1) if sum(shares[:k]) >= 0.9 - 1e-9)
    return sum(g == 0 for g in gates), effective, carriers, 0


def test_examples_and_answers_are_told_apart(tiny_llava, llava_batch):
    model = adapted(tiny_llava)
    labels = llava_batch["input_ids"].clone()
    labels[:, :-2] = -100  # the last two tokens of each row are its answer
    batch = {**llava_batch, "labels": labels}
    with GateStatistics(answers=True, by_example=True).attach(model) as statistics:
        seen = inputs_by_layer(model, lambda: (model(**batch), model(**batch)))
        layers = statistics.examples()
        report = statistics.report()
        statistics.reset()
        assert statistics.examples() == ()
    assert [layer.name for layer in layers] == list(seen)
    ids, mask = llava_batch["input_ids"], llava_batch["attention_mask"]
    for layer, summary in zip(layers, report.layers, strict=True):
        assert layer.kinds == ("image", "prompt", "answer")
        assert layer.tokens.tolist() == [[4, 3, 2], [4, 1, 2]] * 2
        router = model.get_base_model().get_submodule(layer.name).adapter("default").router_weight.detach()
        x = seen[layer.name][0]
        for row in range(2):
            by_kind = {0: [], 1: [], 2: []}
            for t in range(ids.shape[1]):
                if mask[row, t]:
                    kind = 2 if labels[row, t] != -100 else 0 if ids[row, t] == 100 else 1
                    by_kind[kind].append((router @ x[row, t]).clamp(min=0).tolist())
            for example in (row, row + 2):
                for kind, tokens in by_kind.items():
                    mixed = [mixed_by_hand(gates) for gates in tokens]
                    for i in range(len(RANKS)):
                        assert layer.open[example, kind, i] == sum(g[i] > 0 for g in tokens)
                        assert layer.gates[example, kind, i].item() == pytest.approx(
                            sum(g[i] for g in tokens), rel=1e-5
                        )
                    got = (layer.zeros, layer.effective, layer.carriers, layer.closed)
                    for column, sums in enumerate(got):
                        want = sum(m[column] for m in mixed)
                        assert sums[example, kind].item() == pytest.approx(want, rel=1e-5)
        assert summary.tokens == {"image": 16, "prompt": 8, "answer": 8, "all": 32}
        rate = (layer.open[..., 1].sum() / layer.tokens.sum()).item()
        assert summary.open_rate["all"][1] == pytest.approx(rate)
    with GateStatistics(answers=True).attach(model) as statistics:
        model(**llava_batch, labels=ids)  # what is learned is an answer, whatever else it is
    assert statistics.report().layers[0].tokens == {"image": 0, "prompt": 0, "answer": 16, "all": 16}
    assert set(report.scalars()) >= {"gates/open_image", "gates/open_prompt", "gates/open_answer"}


@pytest.mark.parametrize(
    ("gates", "want"),
    [
        ([0.25, 0.25, 0.25, 0.25], (0, 4.0, 4, 0)),
        ([0.0, 3.0, 0.0, 0.0], (3, 1.0, 1, 0)),
        ([0.9, 0.1, 0.0, 0.0], (2, mixed_by_hand([0.9, 0.1])[1], 1, 0)),
        ([0.0, 0.0, 0.0, 0.0], (4, 0.0, 0, 1)),
        ([0.1] * 10, (0, 10.0, 9, 0)),
    ],
)
def test_how_gates_mix(gates, want):
    kinds = TokenKinds()
    kinds.rows = torch.tensor([[[False]], [[True]]])
    recorder = GateRecorder("a.0.b", kinds, in_tower=False, by_example=True)
    recorder.record("default", (1,) * len(gates), torch.tensor([[gates]]))
    (sums,) = recorder.examples["default"]
    assert sums[1, 0, -4:].tolist() == pytest.approx(want, rel=1e-6)
    assert not sums[0].any()


@pytest.mark.parametrize("shape", [(2, 1), (1, 1), (1, 3)])
def test_gates_that_do_not_depend_on_the_token_count_for_each(shape):
    kinds = TokenKinds()
    kinds.rows = torch.tensor([[[1, 0, 0], [1, 0, 0]], [[0, 1, 1], [0, 1, 0]]]).bool()
    gates = torch.rand(*shape, 4) - 0.5
    sums = []
    for given in (gates, gates.expand(2, 3, 4).contiguous()):
        recorder = GateRecorder("a.0.b", kinds, in_tower=False)
        recorder.record("default", (1, 1, 1, 1), given)
        sums.append(recorder.sums["default"])
    assert torch.equal(*sums)
    assert sums[0][:, 0].tolist() == [2, 3]
    for wrong in (torch.rand(2, 2, 4), torch.rand(6, 4)):
        with pytest.raises(
            ValueError, match=r"layer a.0.b saw tokens of shape .* input_ids has shape \(2, 3\)"
        ):
            recorder.record("default", (1, 1, 1, 1), wrong)


def test_what_cannot_be_counted_is_refused(tiny_llava, llava_batch):
    with pytest.raises(ValueError, match="no RoDE layer"):
        GateStatistics().attach(tiny_llava())
    model = adapted(tiny_llava)
    statistics = GateStatistics().attach(model)
    with pytest.raises(ValueError, match="already attached"):
        statistics.attach(model)
    with pytest.raises(ValueError, match="other statistics are attached"):
        GateStatistics().attach(model)
    embeds = model.get_input_embeddings()(llava_batch["input_ids"][:, -2:])
    with pytest.raises(ValueError, match="without input_ids"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(batch, tokens\)"):
        model(input_ids=llava_batch["input_ids"][:, -2:], attention_mask=torch.ones(2, 1, 2, 2).bool())
    statistics.detach()
    model(inputs_embeds=embeds)
    with (
        GateStatistics(answers=True).attach(model),
        pytest.raises(ValueError, match="answers=True tells answers by labels"),
    ):
        model(**llava_batch)


def test_whole_blocks_as_experts_count_once(tiny_llava, llava_batch):
    fields = {"gate": "topk", "top_k": 2, "normalize": True, "router_per": "block", "expert_per": "block"}
    model = adapted(tiny_llava, **fields, target_modules=["gate_proj", "up_proj", "down_proj"])
    with GateStatistics().attach(model) as statistics:
        model(**llava_batch)
    layers = statistics.report().layers
    assert len(layers) == 6
    for layer in layers:
        assert layer.tokens["all"] == 16
        assert sum(layer.open_rate["all"]) == pytest.approx(2)
        assert sum(layer.mean_gate["all"]) == pytest.approx(1, rel=1e-5)
    assert layers[0].mean_gate == layers[1].mean_gate == layers[2].mean_gate  # one router for the block


def test_gates_of_a_task_count_for_every_token(tiny_llava, llava_batch):
    model = adapted(tiny_llava, gate="softmax", router_input="task", num_ids=2)
    with GateStatistics().attach(model) as statistics:
        model(**llava_batch, rode_task_ids=torch.tensor([0, 1]))
    for layer in statistics.report().layers:
        assert layer.tokens["all"] == 16
        assert sum(layer.mean_gate["text"]) == pytest.approx(1, rel=1e-5)
