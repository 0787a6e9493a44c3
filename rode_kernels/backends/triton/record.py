"""The launches that calls on the Triton backend make, without a GPU: to compile them ahead of time, and to read off their traffic.

What they are recorded with does not depend on the interpreter; compiling them needs it off.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rode_kernels.backends.gpu import cost
from rode_kernels.backends.triton import (
    backward_kernels,
    device,
    forward_kernels,
    gate_kernels,
    launch_backward,
    launch_forward,
    launch_gates,
    launch_siblings,
    tune,
)
from rode_kernels.mixture import make_mixture
from rode_kernels.operands import BackwardOperands, ForwardOperands, Settings

_Grid = tuple[int, ...]
_Arguments = dict[str, Any]


@dataclass
class Launch:
    """One launch that a call makes."""

    kernel: Any
    grid: _Grid
    arguments: _Arguments
    options: tune.Config


class Recorder:
    """Stands in a kernel's place, and keeps what it would have been launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: _Grid | Callable[[_Arguments], _Grid]) -> Callable[..., None]:
        def record(*args: Any, **kwargs: Any) -> None:
            names = list(inspect.signature(self.kernel.fn).parameters)
            options = {n: kwargs.pop(n) for n in ("num_warps", "num_stages", *tune.ALWAYS) if n in kwargs}
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            blocks = grid(arguments) if callable(grid) else grid
            self.launches.append(Launch(self.kernel, blocks, arguments, options))

        return record


def _by(choice: int) -> Callable[..., None]:
    """A replacement of `tune.tuned` that takes each kernel's configuration at `choice`, the last one where there are fewer."""

    def chosen(*arguments: Any, scratch: bool = False) -> None:
        *_, options, run, y = arguments
        run(y, **options[min(choice, len(options) - 1)])

    return chosen


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
    needs: tuple[bool, ...] | None = None,
    without_dy: bool = False,
    amd: bool = False,
    choice: int = 0,
    gemm_path: bool = False,
    siblings: int = 1,
    device_type: str = "meta",
    recorder: type[Recorder] = Recorder,
) -> list[Launch]:
    """The launches of one forward and one backward call, from tensors without memory (or where `device_type` says); `choice` among
    configurations, 0 by rule. `gemm_path`: matrix products by PyTorch, with these kernels between them. `siblings`: so many such
    mixtures read the same x, each with a mask of its own if there is dropout."""
    launches: list[Launch] = []
    kernels = [(forward_kernels, n) for n in ("fused", "shrink", "expand")]
    kernels += [
        (backward_kernels, n)
        for n in ("grad_output_pass", "gate_backward", "grad_input_pass", "reduce_partials")
    ]
    kernels += [(gate_kernels, n) for n in ("apply_gates", "apply_gates_backward")]
    before = [(module, name, getattr(module, name)) for module, name in kernels]
    others = device.multiprocessors, device.amd, tune.tuned
    for module, name, kernel in before:
        setattr(module, name, recorder(kernel, launches))
    device.multiprocessors, device.amd = lambda x: multiprocessors, lambda: amd
    tune.tuned = _by(choice)
    try:
        mixture = make_mixture(ranks, tuple(16.0 / r for r in ranks))
        R, N = sum(ranks), len(ranks)

        def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.ones(*shape, dtype=dtype, device=device_type)  # every gate is open

        x, A, B, base = tensor(tokens, K), tensor(R, K), tensor(O, R), tensor(tokens, O)
        # with given gates also their gradient where they are closed, with a router also that of returned gates
        W, b = (None, None) if gated else (tensor(N, K), tensor(N, dtype=torch.float32))
        gates = tensor(tokens, N, dtype=torch.float32) if gated else None
        seed = tensor(1, dtype=torch.int64)
        settings = Settings(mixture, dropout_p, gated)
        needs = needs or (True, True, True, not gated, not gated, gated)
        if siblings > 1:
            # that masks differ is seen by addresses, which only tensors with memory have
            seeds = [torch.zeros(1, dtype=torch.int64) for _ in range(siblings)]
            given = [ForwardOperands(x, A, B, W, b, None, base, seed) for seed in seeds]
            outputs = launch_siblings.forward(given, [settings] * siblings)
            sent = [
                BackwardOperands(y, g, x, u, g, A, B, W, seed)
                for (y, u, g), seed in zip(outputs, seeds, strict=True)
            ]
            launch_siblings.backward(sent, [settings] * siblings, [needs] * siblings)
            return launches
        forward = launch_gates.forward if gemm_path else launch_forward.forward
        backward = launch_gates.backward if gemm_path else launch_backward.backward
        y, u, g = forward(ForwardOperands(x, A, B, W, b, gates, base, seed), settings, inplace)
        dy, dgates = None if without_dy else y, None if gated else g
        backward(BackwardOperands(dy, dgates, x, u, g, A, B, W, seed), settings, needs)
    finally:
        for module, name, kernel in before:
            setattr(module, name, kernel)
        device.multiprocessors, device.amd, tune.tuned = others
    return launches


def cost_of(launches: list[Launch], element_size: int) -> cost.Cost:
    """Bytes that these launches move, from grids and blocks. DRAM: each tensor's distinct bytes once a launch. L2: all that
    programs load or store, without masked elements."""
    steps = []
    for one in launches:
        dram = l2 = 0.0
        for distinct, times in _FORMULAS[one.kernel.fn.__name__](one.arguments, one.grid, element_size):
            dram += distinct
            l2 += distinct * times
        steps.append(cost.Step(dram, l2, math.prod(one.grid)))
    return cost.Cost(tuple(steps))


# For each kernel: (bytes of a tensor, how often the programs go through it). M tokens, K and O features, R columns, N experts.
_Moved = Iterator[tuple[float, float]]


def _of_fused(a: _Arguments, grid: _Grid, e: int) -> _Moved:
    M, K, O, R = (a[n] for n in "MKOR")
    N = a["N"] if a["ROUTED"] else 0
    tiles = grid[0]
    yield from ((M * K * e, 1), ((R + N) * K * e, tiles), (O * R * e, tiles))
    yield from (((1 + a["HAS_BASE"]) * M * O * e, 1), (M * (R + a["N"]) * 4, 1))
    if not N:
        yield from _only_l2(M * (R - a["N"]) * 4)  # each column's gate, of which g has the distinct bytes


def _of_shrink(a: _Arguments, grid: _Grid, e: int) -> _Moved:
    M, K = a["M"], a["K"]
    blocks, tiles, parts = grid
    yield from ((M * K * e, blocks), (a["WIDTH"] * K * e, tiles), (parts * M * a["WIDTH"] * 4, 1))


def _of_expand(a: _Arguments, grid: _Grid, e: int) -> _Moved:
    M, O, R, N, parts = (a[n] for n in ("M", "O", "R", "N", "parts"))
    tiles, splits = grid
    passes = 1 if a["BLOCK_R"] >= R else -(-O // a["BLOCK_O"]) / splits
    # distinct; what programs read of it are u, and each column's own logit
    yield (parts * M * (R + (N if a["ROUTED"] else 0)) * 4, 0)
    yield from ((O * R * e, tiles), ((1 + a["HAS_BASE"]) * M * O * e, 1), (M * (R + N) * 4, 1))
    of_gates = parts * R if a["ROUTED"] else R
    yield from _only_l2(splits * passes * M * (parts * R + of_gates) * 4)
    if a["ROUTED"]:
        yield from _only_l2(parts * M * N * 4)


def _of_grad_output_pass(a: _Arguments, grid: _Grid, e: int) -> _Moved:
    M, O, R, N, parts, together = (a[n] for n in ("M", "O", "R", "N", "parts", "TOGETHER"))
    blocks, ranges, o_blocks = -(-R // a["BLOCK_R"]), -(-M // a["tokens_per_split"]), -(-O // a["BLOCK_O"])
    again = a["GROUP"] - 1  # times that a program goes through its part of t once more, reading and writing
    tiles, need_t, need_B = -(-M // a["ROWS"]), a["NEED_T"], a["NEED_B"]
    kinds = 1 if together else need_t + need_B  # whose programs run one after the other, and read dy each
    yield from ((M * O * e * kinds, 1 if together else blocks), (M * N * 4, 0))
    yield from ((O * R * e * need_t, ranges if together else tiles), (M * R * 4 * need_B, o_blocks))
    # each column's gate, for each product that wants it
    times = o_blocks * (1 + need_B) if together else o_blocks * 2 * need_B + parts * need_t
    yield from _only_l2(times * M * R * 4)
    yield from ((parts * M * R * 4 * need_t, 1 + again), (parts * M * R * 4 * need_t * (again > 0), again))
    yield (ranges * O * R * 4 * need_B, 1)


def _of_gate_backward(a: _Arguments, grid: _Grid, e: int) -> _Moved:
    M, R, N, parts = (a[n] for n in ("M", "R", "N", "parts"))
    if a["HAS_DY"]:
        yield from ((parts * M * R * 4, 1), (M * R * 4, 1))  # t, u
        yield from _only_l2(M * R * 4)  # each column's gate
    # g, dgates, du, dh, dbr
    yield from ((M * N * 4, a["ROUTED"]), (M * N * 4 * a["HAS_DGATES"], 1), (M * R * e, 1), (M * N * 4, 1))
    yield (grid[0] * N * 4 * a["NEED_b"], 1)


def _of_grad_input_pass(a: _Arguments, grid: _Grid, e: int) -> _Moved:
    M, K, R, N = (a[n] for n in "MKRN")
    ranges, k_blocks, tiles = -(-M // a["tokens_per_split"]), -(-K // a["BLOCK_K"]), -(-M // a["ROWS"])
    A_blocks = a["BLOCKS"][-1] if a["NEED_A"] else 0
    W_blocks = -(-N // a["BLOCK_R"]) if a["NEED_W"] else 0
    by_dx, part = a["NEED_X"], a["parts"]
    yield from ((M * K * e, A_blocks + W_blocks) if A_blocks + W_blocks else (0, 0), (M * K * e * by_dx, 1))
    # of du, by a program of dx; the rest it reads for every STEP columns
    held = min(R, a["BLOCK_R"]) if a["MASKS"] == 1 else 0
    of_dx = part * held / R + -(-K // a["STEP"]) * (R - held) / R
    if a["HAS_DY"]:
        yield from ((M * R * e, k_blocks * (A_blocks > 0) + of_dx * by_dx), (R * K * e * by_dx, tiles))
    if a["ROUTED"]:
        yield from ((M * N * 4, k_blocks * (W_blocks > 0) + part * by_dx), (N * K * e * by_dx, tiles))
    yield from ((ranges * (R * a["NEED_A"] + N * a["NEED_W"]) * K * 4, 1),)


def _of_reduce_partials(a: _Arguments, grid: _Grid, e: int) -> _Moved:
    size_y, size_x, N = a["size_y"], a["size_x"], a["N"]
    bias = grid[0] - (size_y + size_x) // a["BLOCK"]  # whether dbr, float32, is wanted
    yield ((size_y * a["count_y"] + size_x * a["count_x"] + bias * N * a["count_b"]) * 4, 1)
    of_B, of_A, of_router = (a[name].element_size() for name in ("dB", "dA", "drouter_weight"))
    yield (size_y * of_B + a["at_W"] * of_A + (size_x - a["at_W"]) * of_router + bias * N * 4, 1)


def _only_l2(bytes_moved: float) -> _Moved:
    """Bytes that are counted among another tensor's distinct ones."""
    yield from ((bytes_moved, 1), (-bytes_moved, 0))


_FORMULAS = {
    "fused": _of_fused,
    "shrink": _of_shrink,
    "expand": _of_expand,
    "grad_output_pass": _of_grad_output_pass,
    "gate_backward": _of_gate_backward,
    "grad_input_pass": _of_grad_input_pass,
    "reduce_partials": _of_reduce_partials,
}
