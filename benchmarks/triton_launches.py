"""The launches that calls on the Triton backend make, without a GPU: to compile them ahead of time, and to read off their traffic.

TRITON_INTERPRET must not be set: interpreted kernels have no signature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rode_kernels.mixture import make_mixture
from rode_kernels.triton import backward_kernels, forward_kernels, launch


@dataclass
class Launch:
    """One launch that a call makes."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


class Recorder:
    """Stands in a kernel's place, and keeps what it would have been launched with."""

    def __init__(self, kernel, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]):
        def record(*args, **kwargs) -> None:
            names = [p.name for p in self.kernel.params]
            options = {n: kwargs.pop(n) for n in ("num_warps", "num_stages") if n in kwargs}
            self.launches.append(
                Launch(self.kernel, grid, {**dict(zip(names, args, strict=False)), **kwargs}, options)
            )

        return record


def _by_rule(kernel, shape_class, tokens, options, run, y, *, scratch=False) -> None:
    run(y, **options[0])


def record(
    dtype: torch.dtype,
    *,
    tokens: int,
    K: int = 4096,
    O: int = 4096,
    ranks: tuple[int, ...] = (2, 4, 8, 16),
    dropout_p: float = 0.0,
    multiprocessors: int = 108,
    inplace: bool = False,
    gated: bool = False,
    frozen: bool = False,
    without_dy: bool = False,
    amd: bool = False,
) -> list[Launch]:
    """The launches of one forward and one backward call, from tensors without memory."""
    launches: list[Launch] = []
    kernels = [(forward_kernels, n) for n in ("fused", "shrink", "expand")]
    kernels += [(backward_kernels, n) for n in ("through_y", "through_v", "weights", "add")]
    before = [(module, name, getattr(module, name)) for module, name in kernels]
    others = launch._multiprocessors, launch.amd, launch.tuned
    for module, name, kernel in before:
        setattr(module, name, Recorder(kernel, launches))
    launch._multiprocessors, launch.amd = lambda x: multiprocessors, lambda: amd
    launch.tuned = _by_rule
    try:
        mixture = make_mixture(ranks, tuple(16.0 / r for r in ranks))
        R, N = sum(ranks), len(ranks)

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        x, A, B, base = empty(tokens, K), empty(R, K), empty(O, R), empty(tokens, O)
        # with given gates also their gradient where they are closed, with a router also that of returned gates
        W, b = (None, None) if gated else (empty(N, K), empty(N))
        gates = torch.empty(tokens, N, device="meta") if gated else None
        seed = torch.empty(1, dtype=torch.int64, device="meta")
        static = (seed, mixture, dropout_p, gated)
        y, u, g = launch.forward(x, A, B, W, b, gates, base, *static, inplace)
        needs = (True, True, True, not gated, not gated, gated)
        if frozen:  # all but A
            needs = (False, True, False, False, False, False)
        launch.backward(None if without_dy else y, None if gated else g, x, u, g, A, B, W, *static, needs)
    finally:
        for module, name, kernel in before:
            setattr(module, name, kernel)
        launch._multiprocessors, launch.amd, launch.tuned = others
    return launches


def traffic(launches: list[Launch], element_size: int) -> tuple[float, float]:
    """(DRAM, L2) bytes of these launches, from grids and blocks. DRAM: each tensor's distinct bytes once a launch; L2: all that
    programs load or store, masked elements left out."""
    dram = l2 = 0
    for one in launches:
        for distinct, times in _FORMULAS[one.kernel.__name__](one.arguments, one.grid, element_size):
            dram += distinct
            l2 += distinct * times
    return dram, l2


# For each kernel: (bytes of a tensor, how often the programs go through it). M tokens, K and O features, R columns, N experts.


def _of_fused(a, grid, e):
    M, K, O, R, N = (a[n] for n in "MKORN")
    tiles = grid[0]
    yield from (
        (M * K * e, 1),
        ((R + N) * K * e, tiles),
        (O * R * e, tiles),
        (2 * M * O * e, 1),
        (M * (R + N) * 4, 1),
    )


def _of_shrink(a, grid, e):
    M, K, R, N = (a[n] for n in "MKRN")
    blocks, tiles, parts = grid
    yield from ((M * K * e, blocks), ((R + N) * K * e, tiles), (parts * M * a["WIDTH"] * 4, 1))


def _of_expand(a, grid, e):
    M, O, R, N, parts = (a[n] for n in ("M", "O", "R", "N", "parts"))
    tiles, shares = grid
    passes = 1 if a["BLOCK_R"] >= R else -(-O // a["BLOCK_O"]) / shares
    yield (
        parts * M * a["WIDTH"] * 4,
        0,
    )  # distinct; what programs read of it are u, and each column's own logit
    yield from ((0, 0), (O * R * e, tiles), (2 * M * O * e, 1), (M * (R + N) * 4, 1))
    yield from _only_l2(shares * passes * parts * M * 2 * R * 4 + parts * M * N * 4)


def _of_through_y(a, grid, e):
    M, O, R, N = (a[n] for n in "MORN")
    o_blocks, R_blocks, ranges = grid
    yield from ((M * O * e, R_blocks), (O * R * e, ranges), (M * R * 4, o_blocks), (M * N * 4, 0))
    yield from _only_l2(o_blocks * M * R * 4)  # each column's gate
    yield from ((o_blocks * M * R * 4, 1), (ranges * O * R * 4, 1))


def _of_through_v(a, grid, e):
    M, K, R, N, o_blocks = (a[n] for n in ("M", "K", "R", "N", "o_blocks"))
    tiles, parts = grid
    again = 1 if a["BLOCK_R"] >= R else 1 + -(-K // a["BLOCK_K"]) / parts
    yield from ((o_blocks * M * R * 4, parts * again), (M * R * 4, parts), (M * N * 4, parts))
    yield from _only_l2(parts * again * M * R * 4)
    yield from (((R + N) * K * e, tiles), (M * K * e, 1), (M * R * e, 1), (M * N * 4, 1))


def _of_weights(a, grid, e):
    M, K, R, N = (a[n] for n in "MKRN")
    k_blocks, blocks, ranges = grid
    yield from (
        (M * K * e, blocks),
        (M * R * e, k_blocks),
        (M * N * 4, k_blocks),
        (ranges * (R + N) * K * 4, 1),
    )


def _of_add(a, grid, e):
    yield from ((a["count"] * a["stride"] * 4, 1), (a["stride"] * e, 1))


def _only_l2(bytes_moved: float):
    """Bytes that are counted among another tensor's distinct ones."""
    yield from ((bytes_moved, 1), (-bytes_moved, 0))


_FORMULAS = {
    "fused": _of_fused,
    "shrink": _of_shrink,
    "expand": _of_expand,
    "through_y": _of_through_y,
    "through_v": _of_through_v,
    "weights": _of_weights,
    "add": _of_add,
}
