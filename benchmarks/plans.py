"""Every plan of the CUDA forward pass that the planner compares, timed: the planner chooses by floors, which are predictions.

K = O = 4096, ranks 2, 4, 8, 16, bfloat16. Each y is compared with that of the planner's choice first; rounds are interleaved.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks import write_json
from benchmarks.problem import device_of
from benchmarks.timing import headline, interleaved, machine, ratios, spread
from rode_kernels import backends
from rode_kernels.backends.cuda import backend as cuda
from rode_kernels.backends.cuda.passes import Passes
from rode_kernels.backends.cuda.prepared import Kernels
from rode_kernels.backends.gpu.layout import Layout
from rode_kernels.backends.gpu.planner import plan_forward, variants_forward
from rode_kernels.backends.gpu.plans import Plan, ProblemShape
from rode_kernels.mixture import make_mixture
from rode_kernels.operands import ForwardOperands, Settings
from rode_kernels.passes import Outputs

TOKENS, WIDTH, RANKS = (64, 512, 2048, 8192, 65536), 4096, (2, 4, 8, 16)


class OnePlan(Passes):
    """Passes whose forward pass always runs by this plan."""

    def __init__(self, kernels: Kernels, plan: Plan):
        super().__init__(kernels, cuda._prepare)
        self.plan = plan

    def plan_forward(self, of: ProblemShape, device: int) -> Plan:
        return self.plan

    def prefer_gemm(self, layout: Layout, backward: bool = False) -> bool:
        return False


def name_of(plan: Plan) -> str:
    if plan.fused:
        return "one launch"
    return f"two launches, splits {plan.splits}, out_tiles {plan.out_tiles}"


def problem(tokens: int, width: int, device: str) -> ForwardOperands:
    """Operands of a call in which about half of the gates are open."""

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * std).to(torch.bfloat16)

    torch.manual_seed(0)
    x, base = normal(tokens, width), normal(tokens, width)
    A, B = normal(sum(RANKS), width, std=width**-0.5), normal(width, sum(RANKS))
    router_weight = normal(len(RANKS), width, std=width**-0.5)
    return ForwardOperands(x, A, B, router_weight, None, None, base, None)


def calls_of(
    kernels: Kernels, operands: ForwardOperands, plans: Sequence[Plan], device: int, stream: int
) -> dict[str, Callable[[], Outputs]]:
    """A forward call for each plan, by its name. Raises RuntimeError if a plan's y is not that of the first plan."""
    settings = Settings(make_mixture(RANKS, tuple(16.0 / rank for rank in RANKS)), 0.0, False)
    calls: dict[str, Callable[[], Outputs]] = {
        name_of(plan): partial(OnePlan(kernels, plan).forward, operands, settings, False, device, stream)
        for plan in plans
    }
    want, *_ = calls[name_of(plans[0])]()
    most = 4 * torch.finfo(want.dtype).eps * want.abs().max()
    for name, call in calls.items():
        error = (call()[0].float() - want.float()).abs().max()
        if not error <= most:
            raise RuntimeError(
                f"the plan '{name}' differs by {error:.3g} from '{name_of(plans[0])}'; report it"
            )
    return calls


def main(options: Namespace) -> None:
    """`options` as `python -m benchmarks plans` has them."""
    device = device_of("cuda")
    if device is None:
        print(
            f"cuda cannot run here: {backends()['cuda'].reason}. On a machine where it can, this would time the forward pass "
            f"of {', '.join(map(str, TOKENS))} tokens by every plan that the planner compares"
        )
        return
    about = {"benchmark": "plans", "backend": "cuda", **machine(device), "rounds": options.rounds}
    print(f"cuda on {headline(about)}; microseconds, and how many times as long as the planner's choice")
    index, rows = torch.cuda.current_device(), []
    kernels = Kernels(cuda._native)
    multiprocessors, memory = cuda._prepare(index)
    for tokens in TOKENS:
        shape = ProblemShape(tokens, WIDTH, WIDTH, sum(RANKS), len(RANKS))
        chosen = plan_forward(shape, multiprocessors, memory)
        others = [plan for plan in variants_forward(shape, multiprocessors, memory) if plan != chosen]
        operands, stream = problem(tokens, WIDTH, device), torch.cuda.current_stream().cuda_stream
        calls = calls_of(kernels, operands, [chosen, *others], index, stream)
        times = interleaved(calls, options.rounds, device, host={})
        for plan in (chosen, *others):
            own, ratio = spread(times[name_of(plan)]), ratios(times, name_of(plan), name_of(chosen))
            rows.append({"tokens": tokens, "plan": plan, "seconds": own._asdict(), "ratio": ratio._asdict()})
            print(f"  tokens {tokens:5} {1e6 * own.median:9.1f} us  {ratio}x  {name_of(plan)}", flush=True)
    if options.json:
        rows = [row | {"plan": vars(row["plan"])} for row in rows]
        write_json(options.json, {**about, "rows": rows})
