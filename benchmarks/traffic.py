"""Bytes that the GPU kernels move, counted on the emulator, against the fewest possible and against plain PyTorch.

Two counts, kept apart. DRAM: each tensor's distinct bytes, once a launch. L2: all bytes that threads load or store. The emulator
runs one and two tiles of 64 tokens at full width; every tile (and every range of tokens, in the backward pass) adds the same, so
the counts of M tokens follow (`scaled`, `backward`; tests compare). The Triton kernels' counts follow from the grids and blocks of
their launches. Operators of plain PyTorch are counted as if each read its inputs and wrote its results once, which flatters them:
their products read tiles again too.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from itertools import product

import torch
from torch import Tensor

from benchmarks import write_json
from benchmarks.eager import BytesMoved, packed, peft_loop
from rode_kernels import backends, rectified_mixture
from rode_kernels.backends.cuda.emulated import machine, native
from rode_kernels.backends.gpu import cost
from rode_kernels.backends.gpu.planner import plan_backward, plan_forward
from rode_kernels.backends.gpu.plans import BackwardPlan, Plan, ProblemShape

RANKS = (2, 4, 8, 16)
SCALING = tuple(16.0 / r for r in RANKS)
TILE = 64
MULTIPROCESSORS = 108  # of an A100; backward is counted for the 132 of an H100 as well
FUSED = Plan(fused=True, rows=TILE, splits=1, out_tiles=1)


@dataclass
class Case:
    """Tensors of one call: `tokens`, bfloat16, parameters in the same dtype."""

    x: Tensor
    A: Tensor
    B: Tensor
    router: Tensor
    bias: Tensor
    base: Tensor

    @classmethod
    def random(cls, tokens: int, K: int, O: int, device: str = "cpu", open_: bool = True) -> Case:
        generator = torch.Generator(device).manual_seed(0) if device == "cpu" else None

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * std).bfloat16()

        R, N = sum(RANKS), len(RANKS)
        bias = torch.zeros(N, device=device) if open_ else torch.full((N,), -1e9, device=device)
        case = cls(
            x=normal(tokens, K),
            A=normal(R, K, std=K**-0.5),
            B=normal(O, R),
            router=normal(N, K, std=K**-0.5),
            bias=bias.bfloat16(),
            base=normal(tokens, O),
        )
        return case

    @property
    def arguments(self) -> list[Tensor]:
        return [self.x, self.A, self.B, self.router, self.bias]

    @property
    def options(self) -> dict:
        return dict(ranks=RANKS, scaling=SCALING, backend="cuda-emulated")

    def formula(self) -> Tensor:
        """y in float64."""
        x, A, B, router, bias, y = (
            t.double() for t in (self.x, self.A, self.B, self.router, self.bias, self.base)
        )
        gates, start = torch.relu(x @ router.t() + bias), 0
        for i, (rank, factor) in enumerate(zip(RANKS, SCALING, strict=True)):
            rows = slice(start, start + rank)
            y = y + factor * gates[:, i, None] * (x @ A[rows].t() @ B[:, rows].t())
            start += rank
        return y


@dataclass
class Count:
    """Bytes of one call, and how much of the 32-byte sectors that warps asked for was wanted."""

    dram: float = 0
    l2: float = 0
    sectors: float = 0
    used: float = 0
    launches: int = 0

    @property
    def sector_use(self) -> float:
        return self.used / (32 * self.sectors) if self.sectors else 1.0


def emulate(case: Case, plan: Plan, *, inplace: bool) -> Count:
    """One call on the emulator, its result checked."""
    base = case.base.clone()
    machine.plan = plan
    try:
        y = rectified_mixture(*case.arguments, **case.options, base=base, inplace=inplace)
    finally:
        machine.plan = None
    _check("y", y, case.formula())
    return _counted()


def emulate_backward(case: Case, plan: BackwardPlan) -> Count:
    """One backward call, its gradients checked."""
    doubles = [t.double().requires_grad_() for t in case.arguments]
    x, A, B, router, bias = doubles
    gates = torch.relu(x @ router.t() + bias)
    columns = torch.tensor(SCALING).double().repeat_interleave(torch.tensor(RANKS))
    v = (x @ A.t()) * gates.repeat_interleave(torch.tensor(RANKS), 1) * columns
    truth = torch.autograd.grad(v @ B.t(), doubles, case.base.double())
    leaves = [t.detach().requires_grad_() for t in case.arguments]
    y = rectified_mixture(*leaves, **case.options)
    machine.backward_plan = plan
    try:
        gradients = torch.autograd.grad(y, leaves, case.base)
    finally:
        machine.backward_plan = None
    for name, gradient, true in zip(("x", "A", "B", "router", "bias"), gradients, truth, strict=True):
        _check(f"the gradient of {name}", gradient, true)
    return _counted()


def _check(what: str, value: Tensor, truth: Tensor) -> None:
    error = ((value.double() - truth).abs().max() / truth.abs().max()).item()
    if not error < 2**-6:
        raise RuntimeError(f"the result is wrong ({what}, relative error {error:.2e}): nothing is counted")


def _counted() -> Count:
    total = Count(launches=len(native.launches()))
    for direction in native.all_traffic():
        total.dram += direction["launch_used"]
        total.l2 += direction["bytes"]
        total.sectors += direction["sectors"]
        total.used += direction["used"]
    return total


def backward(M: int, K: int, O: int, multiprocessors: int) -> Count:
    """The backward pass at M tokens, by its plan, from calls of one and two tiles of 64 tokens in one and two ranges."""
    plan = plan_backward(ProblemShape(M, K, O, sum(RANKS), len(RANKS)), multiprocessors)

    def of(tiles: int, tiles_y: int, tiles_x: int) -> Count:
        split = replace(plan, tokens_per_split_y=tiles_y * TILE, tokens_per_split_x=tiles_x * TILE)
        return emulate_backward(Case.random(tiles * TILE, K, O), split)

    one, two, more_y, more_x = of(1, 1, 1), of(2, 2, 2), of(2, 1, 2), of(2, 2, 1)
    ranges_y, ranges_x = -(-M // plan.tokens_per_split_y), -(-M // plan.tokens_per_split_x)
    total = scaled(one, two, M / TILE)
    for name in ("dram", "l2", "sectors", "used"):
        of_two = getattr(two, name)
        more = (ranges_y - 1) * (getattr(more_y, name) - of_two) + (ranges_x - 1) * (
            getattr(more_x, name) - of_two
        )
        setattr(total, name, getattr(total, name) + more)
    return total


def scaled(one: Count, two: Count, tiles: float) -> Count:
    """Counts of so many tiles, from those of one and of two: what a launch costs, and what each tile adds."""

    def of(name: str) -> float:
        first, second = getattr(one, name), getattr(two, name)
        return first + (tiles - 1) * (second - first)

    return Count(of("dram"), of("l2"), of("sectors"), of("used"), one.launches)


def fused(M: int, K: int, O: int, *, inplace: bool, open_: bool = True) -> Count:
    """The single launch at M tokens."""
    one, two = (emulate(Case.random(n * TILE, K, O, open_=open_), FUSED, inplace=inplace) for n in (1, 2))
    return scaled(one, two, M / TILE)


def fewest(M: int, K: int, O: int, backward: bool = False) -> int:
    """Forward: x and base read, y written, the weights once, in 16 bits. Backward: x and dy read, dx written, the weights once."""
    return int(cost.fewest(ProblemShape(M, K, O, sum(RANKS), len(RANKS)), backward))


def eager(M: int, K: int, O: int, of_backward: bool = False) -> dict[str, Count]:
    """The loop and the packed form, or their gradients, from the sizes of the operators that they run."""
    case = Case.random(M, K, O, device="meta")
    args = [t.detach().requires_grad_(of_backward) for t in (case.x, case.A, case.B, case.router, case.base)]
    R = sum(RANKS)
    factors = torch.empty(R, dtype=torch.bfloat16, device="meta")
    expert = torch.empty(R, dtype=torch.int64, device="meta")
    down = torch.empty(R + len(RANKS), K, dtype=torch.bfloat16, device="meta").requires_grad_(of_backward)
    forms = {
        "PEFT-style loop": (lambda: peft_loop(*args, RANKS, SCALING), args),
        "packed PyTorch": (
            lambda: packed(args[0], down, args[2], factors, expert, args[4]),
            [args[0], down, args[2], args[4]],
        ),
    }
    counts = {}
    for name, (form, leaves) in forms.items():
        with BytesMoved() as forward:
            y = form()
        if of_backward:
            dy = torch.empty_like(y)
            with BytesMoved() as moved:
                torch.autograd.grad(y, leaves, dy)
            name = f"{name}, backward"
        else:
            moved = forward
        counts[name] = Count(moved.bytes, moved.bytes, launches=moved.launches)
    return counts


def table(K: int = 4096, O: int = 4096) -> list[dict]:
    """All rows; `dram` and `l2` in bytes, ratios to the fewest possible."""
    rows = []

    def add(M: int, name: str, count: Count, of_backward: bool = False) -> None:
        least = fewest(M, K, O, of_backward)
        rows.append(
            {
                "tokens": M,
                "what": name,
                **asdict(count),
                "sector_use": count.sector_use,
                "dram_ratio": count.dram / least,
                "l2_ratio": count.l2 / least,
            }
        )

    M = 8192
    add(M, "fewest possible", Count(fewest(M, K, O), fewest(M, K, O), launches=1))
    add(M, "one launch", fused(M, K, O, inplace=False))
    everything, nothing = fused(M, K, O, inplace=True), fused(M, K, O, inplace=True, open_=False)
    add(M, "one launch, base in place", everything)
    sparse = Count(
        launches=1,
        **{n: 0.1 * getattr(everything, n) + 0.9 * getattr(nothing, n) for n in ("l2", "sectors", "used")},
    )
    # The weights' bytes are read from memory once, however few tokens are open.
    sparse.dram = 0.1 * everything.dram + 0.9 * nothing.dram + 0.9 * 2 * O * sum(RANKS)
    add(M, "the same, 10 % of 256-token runs open", sparse)
    for name, count in eager(M, K, O).items():
        add(M, name, count)
    for M_, multiprocessors in product((8192, 65536), (MULTIPROCESSORS, 132)):
        add(
            M_,
            f"backward, {multiprocessors} multiprocessors",
            backward(M_, K, O, multiprocessors),
            of_backward=True,
        )
    for M_ in (8192, 65536):
        for name, count in eager(M_, K, O, of_backward=True).items():
            add(M_, name, count, of_backward=True)
    for M_, name, count, of_backward in triton_rows(K, O):
        add(M_, name, count, of_backward)
    for few in (512, 16, 1):
        plan = plan_forward(ProblemShape(few, K, O, sum(RANKS), len(RANKS)), MULTIPROCESSORS)
        add(
            few,
            f"two launches, {plan.splits} parts of K",
            emulate(Case.random(few, K, O), plan, inplace=False),
        )
        for name, count in eager(few, K, O).items():
            add(few, name, count)
    return rows


def triton_rows(K: int, O: int) -> list[tuple[int, str, Count, bool]]:
    """The Triton kernels' counts, from the grids and blocks of the launches that calls make; whether it is backward."""
    if importlib.util.find_spec("triton") is None:
        return []
    from rode_kernels.backends.triton.record import cost_of, record

    def of(M: int, multiprocessors: int, backward: bool) -> Count:
        launches = record(torch.bfloat16, tokens=M, K=K, O=O, ranks=RANKS, multiprocessors=multiprocessors)
        launches = launches[-4:] if backward else launches[:-4]
        moved = cost_of(launches, 2)
        return Count(moved.dram, moved.l2, launches=moved.launches)

    rows = [(M, "Triton", of(M, MULTIPROCESSORS, False), False) for M in (8192, 512, 16, 1)]
    for M in (8192, 65536):
        for multiprocessors in (MULTIPROCESSORS, 132):
            name = f"Triton, backward, {multiprocessors} multiprocessors"
            rows.append((M, name, of(M, multiprocessors, True), True))
    return rows


def text(rows: list[dict]) -> str:
    by_tokens = defaultdict(list)
    for row in rows:
        by_tokens[row["tokens"]].append(row)
    lines = []
    for tokens, group in by_tokens.items():
        lines += [
            f"M = {tokens}",
            f"  {'':38} {'launches':>8} {'DRAM':>18} {'L2':>18} {'sectors used':>13}",
        ]
        for row in group:
            dram, l2 = (f"{row[n] / 1e6:8.2f} MB {row[n + '_ratio']:5.3f}x" for n in ("dram", "l2"))
            use = f"{row['sector_use']:.1%}" if row["sectors"] else "-"
            lines.append(f"  {row['what']:38} {row['launches']:8} {dram:>18} {l2:>18} {use:>13}")
    return "\n".join(lines)


def main(json_file: str | None) -> None:
    status = backends()["cuda-emulated"]
    if not status.available:
        raise SystemExit(
            f"python -m benchmarks traffic needs the emulator: {status.reason}; `make test` builds it"
        )
    rows = table()
    print(
        "Bytes of one pass: K = O = 4096, bfloat16, ranks 2, 4, 8, 16; ratios to the fewest possible. Forward: x and base"
    )
    print(
        "read, y written, the weights read; backward: x and dy read, dx written, the weights read. Counted on the emulator;"
    )
    print("nothing is timed.\n")
    print(text(rows))
    if json_file:
        write_json(json_file, rows)
