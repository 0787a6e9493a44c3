"""What is measured, against routers set by hand and against counts made one token at a time."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import get_peft_model

from rode import RodeConfig
from rode.evaluation.analysis.measure import measure
from rode.evaluation.analysis.numbers import summarise
from rode.evaluation.analysis.text import best_measure, format_analysis, sharing_rows
from rode.tuner import RodeLayer
from rode.vlm import PixelSource, PromptEncoder
from rode_food import Example
from tiny_llava import tiny_model, tiny_processor

FIRST_Q = r".*language_model\.layers\.0\.self_attn\.q_proj"  # sees embeddings alone, normalised
KINDS = ("image", "prompt", "answer")


@pytest.fixture
def two_tasks(food):
    """Two questions about each of four pictures: categories are answered in a's, recipes in b's."""
    return [
        Example(f"dish{i}", str(food / f"{i}.png"), task, "What is it?", answer, answer, "s", "test")
        for i in range(4)
        for task, answer in (("category", "aaaa"), ("recipe", "bbbbbbb"))
    ]


def told_apart(gate="relu"):
    """A model whose expert 0 opens on the letter a, expert 1 on b, and expert 2 on nothing."""
    model = tiny_model()
    tokenizer = tiny_processor().tokenizer
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[:, :2] = 0
        for feature, letter in enumerate("ab"):
            (token,) = tokenizer(letter, add_special_tokens=False).input_ids
            table[token] = torch.nn.functional.one_hot(torch.tensor(feature), table.shape[1]).float()
    model = get_peft_model(model, RodeConfig(ranks=(2, 3, 1), gate=gate, target_modules=FIRST_Q)).eval()
    (layer,) = (m for m in model.modules() if isinstance(m, RodeLayer))
    layer.adapter("default").router_weight.data.zero_()
    layer.adapter("default").router_weight.data[0, 0] = layer.adapter("default").router_weight.data[1, 1] = 1
    return model


def run(model, examples, **options):
    measured = measure(model, tiny_processor(), examples, prompt="vicuna", batch_size=3, **options)
    return measured, summarise(measured)


def shared(found, kind, measure="open_rate"):
    (entry,) = (e for e in found["sharing"] if e["kind"] == kind and e["measure"] == measure)
    return entry


def test_an_expert_for_each_task_and_a_dead_one(two_tasks):
    measured, found = run(told_apart(), two_tasks)
    assert found["tasks"] == ["recipe", "category"]
    assert [(u["expert"], u["rank"], u["block"]) for u in found["units"]] == [(0, 2, 0), (1, 3, 0), (2, 1, 0)]
    # an answer: a space, the letters, the end
    assert found["open_rate"]["category"]["answer"] == [pytest.approx(4 / 6), 0, 0]
    assert found["open_rate"]["recipe"]["answer"] == [0, pytest.approx(7 / 9), 0]
    # RMSNorm makes of a one among 32 features the root of 32
    gate = 32**0.5
    assert found["mean_gate"]["category"]["answer"] == [pytest.approx(4 / 6 * gate, rel=1e-4), 0, 0]
    assert [u["expert"] for u in found["dead"]] == [2]
    assert found["always_open"] == found["nearly_dead"] == []
    for value in ("open_rate", "gate_share"):
        entry = shared(found, "answer", value)
        assert entry["jaccard"] == 0
        assert entry["same"]["mean"] > 0.3
        assert entry["halves"] == {"recipe": pytest.approx(1), "category": pytest.approx(1)}
    assert (entry["first"], entry["second"], entry["both"], entry["neither"]) == (1, 1, 0, 1)
    # pictures come before the question: the router cannot know the task there
    assert shared(found, "image")["jaccard"] == pytest.approx(1)
    sparsity = found["sparsity"]["category"]["answer"]
    assert sparsity == {
        "experts": 3,
        "zeros": pytest.approx((4 * 2 + 2 * 3) / 18),
        "closed": pytest.approx(2 / 6),
        "effective": pytest.approx(1),
        "carriers": pytest.approx(1),
    }
    assert measured["recipe"].ids == ("dish0", "dish1", "dish2", "dish3")
    assert set(measured) == {"category", "recipe"}


def test_all_open(two_tasks):
    config = RodeConfig(ranks=(2, 3), router_bias=True, router_init="open")
    _, found = run(get_peft_model(tiny_model(), config).eval(), two_tasks)
    assert len(found["always_open"]) == len(found["units"]) == 2 * 2 * 2
    assert found["dead"] == found["nearly_dead"] == []
    for entry in found["sharing"]:
        assert entry["jaccard"] == pytest.approx(1)
        assert entry["unrelated"]["mean"] == pytest.approx(1)
        assert entry["p"] == 1
    for by_kind in found["sparsity"].values():
        for sparsity in by_kind.values():
            assert sparsity == pytest.approx(
                {"experts": 2, "zeros": 0, "closed": 0, "effective": 2, "carriers": 2}
            )
    assert best_measure(found) == "gate_share"


def test_softmax_is_told_apart_by_its_gates(two_tasks):
    _, found = run(told_apart("softmax"), two_tasks)
    assert best_measure(found) == "gate_share"
    assert shared(found, "answer")["jaccard"] == 1  # every gate is open, which says nothing
    # a token of a letter has logits (sqrt 32, 0, 0), another (0, 0, 0)
    strong = math.exp(32**0.5)
    own, other = strong / (strong + 2), 1 / (strong + 2)
    category = [(4 * own + 2 / 3) / 6, (4 * other + 2 / 3) / 6, (4 * other + 2 / 3) / 6]
    recipe = [(7 * other + 2 / 3) / 9, (7 * own + 2 / 3) / 9, (7 * other + 2 / 3) / 9]
    want = sum(map(min, category, recipe)) / sum(map(max, category, recipe))
    assert shared(found, "answer", "gate_share")["jaccard"] == pytest.approx(want, rel=1e-4)
    sparsity = found["sparsity"]["category"]["answer"]
    assert sparsity["zeros"] == sparsity["closed"] == 0
    entropy = -(own * math.log(own) + 2 * other * math.log(other))
    assert sparsity["effective"] == pytest.approx((4 * math.exp(entropy) + 2 * 3) / 6, rel=1e-4)
    assert sparsity["carriers"] == pytest.approx((4 * 1 + 2 * 3) / 6)


def by_hand(model, examples):
    """{task: {kind: {layer: [gates of each token]}}}, loss by task: one example at a time, in float64."""
    processor = tiny_processor()
    encoder, source = PromptEncoder(processor, "vicuna"), PixelSource(processor)
    gates, losses = {}, {}
    for e in examples:
        encoded = encoder.encode(e.question, e.answer, [source(e.image)])
        ids = encoded.input_ids
        seen = {}
        hooks = [
            module.register_forward_pre_hook(
                lambda m, args, n=name, seen=seen: seen.__setitem__(n, args[0][0].double())
            )
            for name, module in model.get_base_model().named_modules()
            if isinstance(module, RodeLayer)
        ]
        with torch.no_grad():
            logits = (
                model(input_ids=torch.tensor([ids]), pixel_values=source.pixels(e.image)[None])
                .logits[0]
                .double()
            )
        for hook in hooks:
            hook.remove()
        for t in range(encoded.prompt_length, len(ids)):
            losses.setdefault(e.task, []).append(-logits[t - 1].log_softmax(-1)[ids[t]].item())
        for name, x in seen.items():
            router = (
                model.get_base_model().get_submodule(name).adapter("default").router_weight.detach().double()
            )
            for t, token in enumerate(ids):
                kind = "answer" if t >= encoded.prompt_length else "image" if token == 4 else "prompt"
                row = [max(h, 0.0) for h in (router @ x[t]).tolist()]
                for k in (kind, "all"):
                    gates.setdefault(e.task, {}).setdefault(k, {}).setdefault(name, []).append(row)
    return gates, {task: sum(values) / len(values) for task, values in losses.items()}


def test_numbers_of_a_random_router_are_those_made_by_hand(two_tasks):
    torch.manual_seed(3)
    model = get_peft_model(tiny_model(), RodeConfig(ranks=(2, 3, 4), init_weights=False)).eval()
    measured, found = run(model, two_tasks)
    gates, losses = by_hand(model, two_tasks)
    assert found["loss"] == pytest.approx(losses, rel=1e-4)
    layers = [layer.name for layer in measured["recipe"].layers]
    rates, means = {}, {}
    for task, by_kind in gates.items():
        for kind, by_layer in by_kind.items():
            rates[task, kind] = [
                sum(g[i] > 0 for g in by_layer[n]) / len(by_layer[n]) for n in layers for i in range(3)
            ]
            means[task, kind] = [
                sum(g[i] for g in by_layer[n]) / len(by_layer[n]) for n in layers for i in range(3)
            ]
            assert found["open_rate"][task][kind] == pytest.approx(rates[task, kind])
            assert found["mean_gate"][task][kind] == pytest.approx(means[task, kind], rel=1e-4)
            assert found["open_by_task"][task][kind] == pytest.approx(sum(rates[task, kind]) / 12)
            tokens = [g for n in layers for g in by_layer[n]]
            opened = [[p / sum(g) for p in g if p > 0] for g in tokens if sum(g) > 0]
            effective = [math.exp(-sum(p * math.log(p) for p in g)) for g in opened]
            sparsity = found["sparsity"][task][kind]
            assert sparsity["zeros"] == pytest.approx(sum(g.count(0) for g in tokens) / (3 * len(tokens)))
            assert sparsity["closed"] == pytest.approx(1 - len(opened) / len(tokens))
            assert sparsity["effective"] == pytest.approx(sum(effective) / len(opened), rel=1e-5)
    for kind in (*KINDS, "all"):
        a, b = rates["recipe", kind], rates["category", kind]
        want = sum(map(min, a, b)) / sum(map(max, a, b))
        assert shared(found, kind)["jaccard"] == pytest.approx(want)
        a, b = (
            [g / (sum(m[i - i % 3 : i - i % 3 + 3]) or 1) for i, g in enumerate(m)]
            for m in (means["recipe", kind], means["category", kind])
        )
        want = sum(map(min, a, b)) / sum(map(max, a, b))
        assert shared(found, kind, "gate_share")["jaccard"] == pytest.approx(want, rel=1e-4)
    (maps,) = found["heat_maps"]
    assert (maps["blocks"], maps["ranks"]) == ([0, 1], [2, 3, 4])
    rows = rates["recipe", "answer"]
    assert maps["open_rate"]["recipe"]["answer"][1] == pytest.approx(
        [(rows[6 + i] + rows[9 + i]) / 2 for i in range(3)]
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(run(model, two_tasks)[1]))


def test_one_task_alone_and_one_example(two_tasks):
    _, found = run(told_apart(), two_tasks[:1])
    assert found["tasks"] == ["category"]
    assert found["sharing"] == []
    _, found = run(told_apart(), two_tasks[:2])
    assert shared(found, "answer")["halves"] == {"recipe": None, "category": None}
    text = format_analysis({"adapter": "a", "gate": "relu", **found})
    assert "dead: 1 of 3 experts (by rank 1: 1 of 1, 2: 0 of 1, 3: 0 of 1)" in text
    row = sharing_rows(found, "answer", "open_rate")[1]
    assert row[:2] == ["recipe & category", "0.00"]
    assert row[-1] == "- -"


def test_the_models_own_answers(two_tasks, monkeypatch):
    asked = []

    def answer(model, processor, images, questions, **_):
        asked.extend(zip(images, questions, strict=True))
        return ["ab"] * len(images)

    monkeypatch.setattr("rode.evaluation.generate.answer", answer)
    _, found = run(told_apart(), two_tasks, answers="generated")
    assert sorted(asked) == sorted((e.images, e.question) for e in two_tasks)
    assert found["open_rate"]["category"]["answer"] == [0.25, 0.25, 0]  # a space, a, b, the end


def test_what_cannot_be_measured(two_tasks):
    with pytest.raises(ValueError, match="expected at least one"):
        run(told_apart(), [])
    with pytest.raises(ValueError, match="answers: expected one of truth, generated, got 'none'"):
        run(told_apart(), two_tasks, answers="none")
    with pytest.raises(ValueError, match="no RoDE adapter: without a router there is nothing to analyse"):
        run(tiny_model(), two_tasks)
    plain = get_peft_model(tiny_model(), RodeConfig(ranks=(2,), gate="none"))
    with pytest.raises(ValueError, match="an adapter with gate='none': without a router"):
        run(plain, two_tasks)
