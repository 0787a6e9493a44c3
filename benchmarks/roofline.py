"""Floors of the operation, and of a training step of LLaVA-7B with it, on devices that are not here: predicted.

Bytes and launches are counted elsewhere (`python -m benchmarks traffic`, `rode_kernels.backends.gpu.cost`) and divided by the
bandwidths of a device here. Nothing is measured; a real pass is slower. On such a device
`python -m benchmarks mixture --backend cuda` measures it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from benchmarks import write_json
from benchmarks.traffic import RANKS, eager
from rode_kernels.backends.gpu import cost
from rode_kernels.backends.gpu.planner import plan_backward, plan_forward
from rode_kernels.backends.gpu.plans import ProblemShape

# (in_features, out_features) of the linear layers in each of LLaMA-7B's 32 layers, each with experts.
LAYERS = 32
LINEARS = Counter({(4096, 4096): 4, (4096, 11008): 2, (11008, 4096): 1})
TOKENS = 8192
CASES = [(M, 4096, 4096) for M in (16, 512, 8192, 65536)]
NAMES = ("rode_kernels", "packed PyTorch", "PEFT-style loop")


@dataclass(frozen=True)
class Both:
    forward: cost.Cost
    backward: cost.Cost


def costs(M: int, K: int, O: int, device: cost.Device) -> dict[str, Both]:
    """Costs of one linear layer by what runs it, for bfloat16 and ranks 2, 4, 8, 16."""
    call = ProblemShape(M, K, O, sum(RANKS), len(RANKS))
    found = {
        NAMES[0]: Both(
            cost.forward(call, plan_forward(call, device.multiprocessors)),
            cost.backward(call, plan_backward(call, device.multiprocessors)),
        )
    }
    forward, backward = eager(M, K, O), eager(M, K, O, of_backward=True)
    for name in NAMES[1:]:
        found[name] = Both(*(_of(count) for count in (forward[name], backward[f"{name}, backward"])))
    return found


def _of(count) -> cost.Cost:
    """Operators of plain PyTorch, as if every one had the whole device."""
    each = count.dram / count.launches
    return cost.Cost(tuple(cost.Step(each, each, 1 << 30) for _ in range(count.launches)))


def operation() -> list[dict]:
    rows = []
    for device in cost.DEVICES.values():
        for M, K, O in CASES:
            for name, both in costs(M, K, O, device).items():
                rows.append(
                    {
                        **{
                            "device": device.name,
                            "tokens": M,
                            "in_features": K,
                            "out_features": O,
                            "what": name,
                        },
                        "forward": both.forward.floor(device),
                        "backward": both.backward.floor(device),
                    }
                )
    return rows


def step() -> list[dict]:
    """A step over TOKENS tokens: products with the frozen weights, forward and for the gradient of what went in, and the adapters.
    Attention, norms, the loss and recomputation are left out: they are the same for all."""
    rows = []
    for device in cost.DEVICES.values():
        operations = sum(4.0 * TOKENS * K * O * n for (K, O), n in LINEARS.items()) * LAYERS
        frozen = operations / device.tensor
        for name in NAMES:
            adapters = 0.0
            for (K, O), n in LINEARS.items():
                both = costs(TOKENS, K, O, device)[name]
                adapters += LAYERS * n * (both.forward.floor(device) + both.backward.floor(device))
            rows.append({"device": device.name, "what": name, "frozen": frozen, "adapters": adapters})
    return rows


def main(json_file: str | None) -> None:
    print(
        "Predicted floors, not measurements: bytes and launches that are counted, divided by a device's bandwidths."
    )
    print(
        "bfloat16, ranks 2, 4, 8, 16, all gates open; a launch costs 2 us. PyTorch's operators as if each read its inputs once."
    )
    print(f"\n{'':10} {'M':>6} {'K = O':>6}  {'':18} {'forward':>10} {'backward':>10}")
    rows = operation()
    for row in rows:
        print(
            f"{row['device']:10} {row['tokens']:6} {row['in_features']:6}  {row['what']:18} "
            f"{cost.seconds(row['forward']):>10} {cost.seconds(row['backward']):>10}"
        )
    print(
        f"\nA training step of LLaVA-7B over {TOKENS} tokens: frozen products (without attention), and the adapters of all linears"
    )
    print(f"{'':10} {'frozen':>10}  {'':18} {'adapters':>10} {'of frozen':>10}")
    steps = step()
    for row in steps:
        print(
            f"{row['device']:10} {cost.seconds(row['frozen']):>10}  {row['what']:18} "
            f"{cost.seconds(row['adapters']):>10} {row['adapters'] / row['frozen']:10.0%}"
        )
    print("\nTo measure on such a device: python -m benchmarks mixture --backend cuda")
    if json_file:
        write_json(json_file, {"operation": rows, "step": steps})
