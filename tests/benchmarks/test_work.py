"""Operations and bytes of small calls, counted by hand."""

from __future__ import annotations

import torch

from benchmarks.work import Work, work

OPEN = torch.tensor([[True, False], [False, False], [True, True]])  # 3 tokens, 2 experts


def test_by_hand():
    """M = 3, K = 10, O = 7, ranks 2 and 5, two bytes an element."""
    M, K, O, R, N, e = 3, 10, 7, 7, 2, 2
    found = work(OPEN, (2, 5), K, O, e)
    ranks = 2 + 2 + 5  # of open gates
    saved = 4 * (M * R + M * N)
    weights = e * (R * K + N * K + O * R)
    forward = Work(2 * M * N * K + 2 * ranks * (K + O), e * (M * K + 2 * M * O) + weights + saved)
    assert found["forward"] == forward
    # the second token opens nothing: its row of base is neither read nor written
    assert found["in place"] == Work(forward.operations, forward.bytes - e * 2 * O)
    # both products of u twice, t and dB, and for three open gates dh in dWr and in dx
    operations = 4 * ranks * (K + O) + 2 * (2 * 3 * K)
    moved = e * (2 * K + 2 * O) + e * 3 * K  # x and dy of two tokens; dx of three
    assert found["backward"] == Work(operations, moved + weights + weights + saved)
    assert found["both"] == Work(forward.operations + operations, forward.bytes + found["backward"].bytes)
    assert found["both in place"] == Work(
        forward.operations + operations, found["in place"].bytes + found["backward"].bytes
    )


def test_parameters_may_be_larger_than_x():
    """They and their gradients are float32 beside x in two bytes."""
    same, larger = (work(OPEN, (2, 5), 10, 7, 2, size) for size in (2, 4))
    weights = 7 * 10 + 2 * 10 + 7 * 7
    assert larger["forward"] == same["forward"] + Work(0, 2 * weights)
    assert larger["backward"] == same["backward"] + Work(0, 2 * 2 * weights)
    assert work(OPEN, (2, 5), 10, 7, 2) == same


def test_weights_of_an_expert_that_nobody_opens_are_not_read():
    """One token, of which expert 1 alone is open; its gradients are zeros for the other, and written."""
    K, O, e = 10, 7, 4
    is_open = torch.tensor([[False, True]])
    found = work(is_open, (2, 5), K, O, e)
    u_and_g = 4 * (7 + 2)
    assert found["forward"].bytes == e * (K + 2 * O + (5 + 2) * K + O * 5) + u_and_g
    written = e * ((7 + 2) * K + O * 7)
    assert found["backward"].bytes == e * (2 * K + O + (5 + 2) * K + O * 5) + written + u_and_g


def test_nothing_open_needs_the_router_alone():
    found = work(torch.zeros(3, 2, dtype=torch.bool), (2, 5), 10, 7, 2)
    assert found["forward"].operations == 2 * 3 * 2 * 10
    assert (
        found["in place"].bytes == 2 * (3 * 10 + 2 * 10) + 4 * 3 * 9
    )  # x and the router read, u and g written
    assert found["backward"].operations == 0
