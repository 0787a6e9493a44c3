"""`python -m rode_kernels`: what is available here, and why the rest is not; `plan`: what a call would run, and why."""

from __future__ import annotations

import argparse
import platform
from dataclasses import replace

import torch

from rode_kernels import backends
from rode_kernels.backends.cuda import backend as cuda
from rode_kernels.backends.cuda import emulated as cuda_emulated
from rode_kernels.backends.gpu import cost
from rode_kernels.backends.gpu.planner import (
    plan_backward,
    plan_forward,
    prefer_gemm,
    variants_backward,
    variants_forward,
)
from rode_kernels.backends.gpu.plans import (
    MAX_EXPERTS,
    MAX_FEATURES,
    MAX_RANK,
    MAX_TOKENS,
    Plan,
    ProblemShape,
    can_fuse,
)
from rode_kernels.backends.gpu.shared_memory import SharedMemory

ONE_LAUNCH = Plan(fused=True, rows=64, splits=1, out_tiles=1)
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
_Row = tuple[str, cost.Cost, bool]  # what runs, its cost, and whether it was chosen


def list_backends() -> None:
    print(
        f"rode_kernels on Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}"
    )
    for status in backends().values():
        serves = ", ".join(status.devices) or "any device"
        print(f"  {status.name:14} {'yes' if status.available else 'no':4} {serves:12} {status.reason}")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _ranks(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _fraction(text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1.0
    if not 0.0 <= fraction <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return fraction


def shared_memory(device: cost.Device) -> SharedMemory | None:
    """A device's shared memory, beside CUDA kernels that say what they take of it; None where none were built."""
    native = cuda._native or cuda_emulated.native
    return SharedMemory(native, device.shared) if native else None


def explain(shape: ProblemShape, ranks: tuple[int, ...], device: cost.Device) -> None:
    """Every variant of both passes with bytes, launches and floor, the chosen one marked, and why it is."""
    gates = ("a router" if shape.routed else "given gates") + (", dropout" if shape.dropout else "")
    print(
        f"M = {shape.tokens}, K = {shape.in_features}, O = {shape.out_features}, ranks {ranks}, {gates}, "
        f"{shape.element_size} bytes an element, on {device.name} ({device.multiprocessors} multiprocessors)"
    )
    memory = shared_memory(device)
    if memory is None:
        print(
            "Shared memory is not looked at: there are no CUDA kernels in this build to say what they take."
        )
    print(
        "Floors are what moving so many bytes takes at the device's full bandwidths: a prediction, not a measurement."
    )
    measured = f"(measured on one H100{', without dropout' if shape.dropout else ''})"
    chosen, by_gemm = plan_forward(shape, device.multiprocessors, memory), prefer_gemm(shape)
    rows = [("cuda: matrix products by PyTorch", cost.gemm_path(shape), by_gemm)]
    for plan in variants_forward(shape, device.multiprocessors, memory):
        name = (
            "one launch"
            if plan.fused
            else f"two launches, K in {plan.splits} parts, {plan.rows} tokens by {128 * plan.out_tiles} B of y"
        )
        rows.append((f"cuda: {name}", cost.forward(shape, plan), plan == chosen and not by_gemm))
    rows += _triton(shape, ranks, device, backward=False)
    _table("forward", rows, cost.fewest(shape), device)
    tiles = -(-shape.tokens // chosen.rows)
    if by_gemm:
        print(
            f"  {shape.total_rank} columns: matrix products dominate, and PyTorch multiplies faster {measured}."
        )
    elif chosen.fused:
        print(f"  {tiles} tiles of 64 tokens are blocks enough: each reads x and base and writes y once.")
    elif can_fuse(shape.total_rank, shape.routed_experts) and memory and not memory.fits(shape, ONE_LAUNCH):
        print(
            f"  One launch would ask for {memory.asked(shape, ONE_LAUNCH)} bytes of shared memory, a block gets {memory.limit}."
        )
    elif tiles >= device.multiprocessors:
        print(
            f"  {shape.total_rank} columns and {shape.routed_experts} routed experts do not fit the registers of one block."
        )
    else:
        print(
            f"  {tiles} tiles of {chosen.rows} tokens leave most of the device idle, unless its blocks share K."
        )
    back, by_gemm = plan_backward(shape, device.multiprocessors, memory), prefer_gemm(shape, backward=True)
    rows = [("cuda: matrix products by PyTorch", cost.gemm_path(shape, backward=True), by_gemm)]
    for other in variants_backward(shape, device.multiprocessors, memory):
        name = f"{other.o_tiles} tiles of O, ranges of {other.tokens_per_split_y} and {other.tokens_per_split_x} tokens"
        rows.append((f"cuda: {name}", cost.backward(shape, other), other == back and not by_gemm))
    rows += _triton(shape, ranks, device, backward=True)
    _table("backward", rows, cost.fewest(shape, backward=True), device)
    if by_gemm:
        return print(
            f"  With so many columns or float32 tokens matrix products dominate; PyTorch multiplies faster {measured}."
        )
    print(
        f"  {back.o_tiles} tiles of O: fewer mean fewer parts of t, more mean fewer partial dB; each has "
        f"{-(-shape.tokens // back.tokens_per_split_y)} ranges of tokens."
    )


def _triton(shape: ProblemShape, ranks: tuple[int, ...], device: cost.Device, backward: bool) -> list[_Row]:
    try:
        from rode_kernels.backends.triton.record import cost_of, record
    except ImportError:
        return []
    launches = record(
        {4: torch.float32, 2: torch.bfloat16}[shape.element_size],
        tokens=shape.tokens,
        K=shape.in_features,
        O=shape.out_features,
        ranks=ranks,
        multiprocessors=device.multiprocessors,
        gated=not shape.routed,
        inplace=shape.in_place,
    )
    name = "triton" if shape.open_share == 1.0 else "triton, if all were open"
    return [(name, cost_of(launches[-4:] if backward else launches[:-4], shape.element_size), False)]


def _table(what: str, rows: list[_Row], fewest: float, device: cost.Device) -> None:
    print(f"\n{what:62} {'launches':>8} {'DRAM':>18} {'L2':>10} {'floor':>9}")
    for name, of, chosen in rows:
        print(
            f"  {name:60} {of.launches:8} {of.dram / 1e6:8.1f} MB {of.dram / fewest:5.2f}x {of.l2 / 1e6:7.1f} MB "
            f"{cost.seconds(of.floor(device)):>9}{'  chosen' if chosen else ''}"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m rode_kernels", description=__doc__)
    plan = parser.add_subparsers(dest="command").add_parser(
        "plan", help="what a call would run on a GPU, and why"
    )
    for name, what in (("m", "tokens"), ("k", "in_features"), ("o", "out_features")):
        plan.add_argument(f"--{name}", type=_count, required=True, help=what)
    plan.add_argument(
        "--ranks", type=_ranks, default=(2, 4, 8, 16), help="of the experts, by commas (2,4,8,16)"
    )
    plan.add_argument("--dtype", choices=SIZES, default="bfloat16", help="of x")
    plan.add_argument("--device", choices=sorted(cost.DEVICES), default="A100")
    plan.add_argument("--multiprocessors", type=_count, help="instead of the device's")
    plan.add_argument(
        "--open", type=_fraction, default=1.0, metavar="F", help="of tiles of tokens with an open gate (1)"
    )
    plan.add_argument("--gated", action="store_true", help="gates are given, there is no router")
    plan.add_argument("--in-place", action="store_true", help="y is accumulated into base")
    plan.add_argument("--dropout", action="store_true", help="there is dropout")
    options = parser.parse_args(arguments)
    if options.command is None:
        return list_backends()
    device = cost.DEVICES[options.device]
    if options.multiprocessors:
        device = replace(device, multiprocessors=options.multiprocessors)
    shape = ProblemShape(
        *(options.m, options.k, options.o, sum(options.ranks), len(options.ranks), SIZES[options.dtype]),
        routed=not options.gated,
        in_place=options.in_place,
        open_share=options.open,
        dropout=options.dropout,
    )
    for name, value, most in (
        ("--m", options.m, MAX_TOKENS),
        ("--k", options.k, MAX_FEATURES),
        ("--o", options.o, MAX_FEATURES),
        ("sum of --ranks", shape.total_rank, MAX_RANK),
        ("number of --ranks", shape.experts, MAX_EXPERTS),
    ):
        if value > most:
            parser.error(
                f"{name}: the GPU kernels take at most {most}, got {value}; such a call runs on 'reference'"
            )
    explain(shape, options.ranks, device)


if __name__ == "__main__":
    main()
