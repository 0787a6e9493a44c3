"""A forward and backward pass captured once and replayed on other values: as a CUDA graph, or by a stand-in without a device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixture_oracle import Problem
from rode_kernels import rectified_mixture

Step = Callable[[], list[Tensor]]
Capture = Callable[[Step], tuple[list[Tensor], Callable[[], None]]]


def as_cuda_graph(step: Step) -> tuple[list[Tensor], Callable[[], None]]:
    """The results of a captured step, and the function that fills them anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # loads kernels, and makes what the library needs in autograd's thread
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return results, graph.replay


def by_calling_again(step: Step) -> tuple[list[Tensor], Callable[[], None]]:
    """The same without a device: a replay calls the step and moves what it returns to where the first results are."""
    results = step()

    def replay() -> None:
        for old, new in zip(results, step(), strict=True):
            old.copy_(new)

    return results, replay


def check_replays(
    p: Problem, capture: Capture, *, backend: str, inplace: bool = False, same_bits: bool = True
) -> None:
    """Replays give what calls give, for values of the inputs, of dy and of the seed that came after the capture.

    Args:
        p: a problem with a router and base, and with a dropout_p if dropout is wanted; its keep and dropout_seed are not read.
        same_bits: whether every bit is the same. Otherwise results differ as far as another order of summation explains.
    """
    leaves = {name: t.clone().requires_grad_() for name, t in p.tensors.items()}
    dy, dgates = torch.zeros_like(p.dy), torch.zeros_like(p.dgates)
    seed = torch.zeros(1, dtype=torch.int64, device=p.x.device)

    def step() -> list[Tensor]:
        y, gates = rectified_mixture(
            *(leaves[name] for name in ("x", "A", "B", "router_weight")),
            leaves.get("router_bias"),
            ranks=p.ranks,
            scaling=p.scaling,
            base=leaves["base"] * 1,  # not a leaf, so that it may be overwritten
            inplace=inplace,
            dropout_p=p.dropout_p,
            seed=seed if p.dropout_p else None,
            return_gates=True,
            backend=backend,
        )
        grads = torch.autograd.grad([y, gates], list(leaves.values()), [dy, dgates])
        return [y.detach(), gates.detach(), *grads]

    results, replay = capture(step)
    seen = []
    for number, factor in enumerate((1.0, -2.0, 0.5)):
        with torch.no_grad():
            for name, t in leaves.items():
                t.copy_(p.tensors[name] * (factor if name in ("x", "base") else 1.0))
            dy.copy_(p.dy * factor)
            dgates.copy_(p.dgates * (1.0 - factor))
            seed.fill_(number)
        replay()
        seen.append([t.clone() for t in results])
        for have, want in zip(results, step(), strict=True):
            if same_bits:
                assert torch.equal(have, want)
            else:
                eps = torch.finfo(want.dtype).eps
                torch.testing.assert_close(have, want, rtol=64 * eps, atol=64 * eps * want.abs().max().item())
    for one, other in zip(seen[0], seen[1], strict=True):
        assert not torch.equal(one, other), "a replay must see the new values"
