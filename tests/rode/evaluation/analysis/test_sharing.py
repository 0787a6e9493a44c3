"""Similarity of use and its reference levels, against values worked out by hand."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from rode.evaluation.analysis.sharing import ROUNDS, Usage, halves, jaccard, share

LAYERS = torch.tensor([0, 0, 0, 1, 1, 1])


def usage(rows, ids=None, tokens=10.0):
    rows = torch.tensor(rows, dtype=torch.float64)
    ids = ids or tuple(f"record{i}" for i in range(len(rows)))
    return Usage(tuple(ids), rows * tokens, torch.full_like(rows, tokens))


def seeded():
    return torch.Generator().manual_seed(0)


def test_jaccard():
    a, b = torch.tensor([0.5, 1.0, 0.0]).double(), torch.tensor([0.25, 1.0, 0.5]).double()
    assert jaccard(a, b).item() == 1.25 / 2.0
    assert jaccard(a, a).item() == 1
    assert jaccard(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).item() == 0
    assert jaccard(torch.zeros(3), torch.zeros(3)).isnan()


def test_usage_is_a_ratio_of_sums_and_not_a_mean_of_ratios():
    task = Usage(("a", "b"), torch.tensor([[1.0], [9.0]]).double(), torch.tensor([[2.0], [38.0]]).double())
    assert task.of().item() == 10 / 40
    assert task.of(torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double()).tolist() == [[0.5], [0.0]]


def test_tasks_with_experts_of_their_own():
    a = usage([[1, 0, 0, 1, 0, 0]] * 6)
    b = usage([[0, 1, 0, 0, 1, 0]] * 6)
    found = share(a, b, LAYERS, seeded())
    assert found["jaccard"] == 0
    # by pairs of records: the similarity is 0 only where all 6 pairs are exchanged, or none
    assert found["p"] < 0.1
    assert found["same"]["mean"] > 0.4
    # in each layer the second task's one expert is a's with probability 1/3: both, one or no layer match
    want = (1 / 9) * 1 + (4 / 9) * (1 / 3)
    assert found["unrelated"]["mean"] == pytest.approx(want, abs=4 * 0.33 / ROUNDS**0.5)
    assert [found[key] for key in ("both", "first", "second", "neither")] == [0, 2, 2, 2]
    assert found["top_both"] == []
    assert found["top_first"] == [(0, 1.0, 0.0), (3, 1.0, 0.0)]
    assert found["top_second"] == [(1, 0.0, 1.0), (4, 0.0, 1.0)]


def test_experts_are_shuffled_within_their_layer():
    a = usage([[0.5, 0.5, 0.5, 0, 0, 0]] * 2)
    assert share(a, a, LAYERS, seeded())["unrelated"] == pytest.approx({"mean": 1, "high": 1})


def test_tasks_that_do_the_same():
    a = usage([[0.5, 0.1, 0.0, 1, 0, 0.02]] * 6)
    found = share(a, a, LAYERS, seeded())
    assert found["jaccard"] == pytest.approx(1)
    assert found["p"] == 1
    assert found["same"]["mean"] == pytest.approx(1)
    assert found["unrelated"]["mean"] < 0.7
    assert found["top_both"][0] == (3, 1.0, pytest.approx(1.0))
    assert found["both"] == 4


def test_labels_are_exchanged_within_records_where_both_tasks_ask():
    # record 0 is unlike record 1, in both tasks alike: only an exchange between records could make a difference
    rows = [[1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0]]
    found = share(usage(rows, "xy"), usage(rows, "xy"), LAYERS, seeded())
    assert found["same"] == {"mean": 1.0, "low": 1.0}
    # the same with records that only one task asks about: two of each, in either part
    found = share(usage(rows, "xy"), usage(rows, "zw"), LAYERS, seeded())
    pooled = [rows[0], rows[1], rows[0], rows[1]]
    values = []
    for labels in product((0, 1), repeat=4):
        if sum(labels) == 2:
            parts = [[row for row, k in zip(pooled, labels, strict=True) if k == part] for part in (0, 1)]
            means = [[sum(column) / 2 for column in zip(*part, strict=True)] for part in parts]
            top = sum(map(max, *means))
            values.append(sum(map(min, *means)) / top)
    want = sum(values) / len(values)
    assert found["same"]["mean"] == pytest.approx(want, abs=4 * 0.5 / ROUNDS**0.5)


def test_halves():
    assert halves(usage([[1, 0, 0, 1, 0, 0]] * 4), seeded()) == pytest.approx(1)
    assert halves(usage([[1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0]]), seeded()) == 0
    assert halves(usage([[1, 0, 0, 1, 0, 0]]), seeded()) is None
    assert halves(usage([[0, 0, 0, 0, 0, 0]] * 4), seeded()) is None


def test_more_examples_make_halves_more_alike():
    torch.manual_seed(1)
    rows = torch.rand(64, 6).round().tolist()
    levels = [halves(usage(rows[:n]), seeded()) for n in (4, 16, 64)]
    assert all(small < large for small, large in pairwise(levels))
