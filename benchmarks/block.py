"""A whole Llama block with adapters: what a training step costs beside the frozen block, in time and in memory.

The step is forward and backward with a gradient for the block's input, as a config trains: dropout 0.05, adapters in float32 on a
block in float32 or bfloat16. Adapters are on q and v, or on all seven linear layers; the block is run as it is, or under activation
checkpointing. Where there is a GPU, the time there.

Beside RoDE stand the same formula packed into three products and as a loop over LoRA layers, plain PyTorch both, PEFT's LoRA of
ranks 8 and 30, and PEFT's X-LoRA. The first three have the same weights; their outputs and all their gradients are checked against
the loop in float64, under the same dropout, before anything is measured.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks import adapted, write_json
from benchmarks.cases import DROPOUT, ON_BLOCK, BlockCase, chosen
from benchmarks.timing import dtype_name, headline, interleaved, machine, ratios, spread
from rode_kernels.backends import cpu

SHAPES = {
    576: {"intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    4096: {"intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
}
"""SmolLM2-135M's and Llama-7B's."""
MAIN = ON_BLOCK["qv"]
SEED = 0
"""The seed of torch's generator before each step that is checked."""


def block(hidden: int, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """One block, frozen; its vocabulary is small, so that the head weighs little."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=1, vocab_size=32, use_cache=False, **SHAPES[hidden]
    )
    return LlamaForCausalLM(config).requires_grad_(False).to(dtype)


def systems(base: nn.Module, case: BlockCase) -> dict[str, nn.Module]:
    """All with the weights of `base`, in one place in memory."""
    targets, share = case.targets, adapted.share
    rode = adapted.rode(share(base), targets)
    found = {
        "frozen": share(base),
        "rode": rode,
        "packed": adapted.plain(share(base), rode, "packed"),
        "LoRA r=8 (PEFT)": adapted.lora(share(base), targets, 8),
        "LoRA r=30 (PEFT)": adapted.lora(share(base), targets, 30),
    }
    if case.others:
        found["loop"] = adapted.plain(share(base), rode, "loop")
        if base.dtype == torch.float32:  # it multiplies in float32 what is in bfloat16
            found["X-LoRA (PEFT)"] = adapted.x_lora(share(base), targets)
    return found


class Step:
    """Forward and backward of one system on one input (1, M, hidden); parameters' gradients are made anew each time.

    Args:
        checkpointing: of the block's activations. autocast: to x's dtype.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, dy: Tensor, checkpointing: bool = False, autocast: bool = False
    ) -> None:
        self.model, self.x, self.dy = model.train(), x.clone().requires_grad_(True), dy
        self.autocast = autocast
        self.trained = [p for p in model.parameters() if p.requires_grad]
        if checkpointing:
            for layer in model.modules():
                if isinstance(layer, LlamaDecoderLayer):
                    layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def forward(self) -> Tensor:
        # the head is a stand-in for what follows: its logits take the gradient
        with torch.autocast(self.x.device.type, self.x.dtype, enabled=self.autocast):
            return self.model(inputs_embeds=self.x).logits

    def backward(self, y: Tensor) -> list[Tensor | None]:
        return torch.autograd.grad(y, [self.x, *self.trained], self.dy, allow_unused=True)

    def __call__(self) -> list[Tensor | None]:
        return self.backward(self.forward())

    def results(self) -> dict[str, Tensor]:
        """Logits and all gradients of `adapted.rode` or `adapted.plain`, under known dropout."""
        torch.manual_seed(SEED)
        y = self.forward()
        dx, *others = self.backward(y)
        weights = adapted.gradients(self.model, dict(zip(self.trained, others, strict=True)))
        return {"y": y.detach(), "dx": dx, **{f"weight gradient {i}": grad for i, grad in enumerate(weights)}}


BOUNDS = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (5e-2, 2e-1)}
"""Roundings of a whole block, as the norm of the difference over the norm of the truth: of y and dx, and of gradients of weights.
In bfloat16 some gates open that are closed in float64, and a few tokens decide some gradients of weights."""


def make_truth(base: nn.Module, rode: nn.Module) -> nn.Module:
    """The loop in float64, with the adapters rounded to the dtype of `base`, as every system rounds them."""
    truth = copy.deepcopy(adapted.plain(adapted.share(base), rode, "loop"))
    return truth.to(base.dtype).double()


def check(steps: dict[str, Step], truth: nn.Module) -> None:
    """Logits and gradients of the systems that have one set of weights, against `truth`.

    Raises:
        RuntimeError: one is off by more than rounding explains.
    """
    x, dy = steps["rode"].x.detach(), steps["rode"].dy
    of_activations, of_weights = BOUNDS[x.dtype]
    adapted.as_operation(truth, True)
    right = Step(truth, x.double(), dy.double()).results()
    for name in ("rode", "packed", "loop"):
        if name not in steps:
            continue
        steps[name]()  # the tuner's layers learn who reads the same tensor, and run in groups from then on
        adapted.as_operation(steps[name].model, True)
        for what, got in steps[name].results().items():
            bound = of_activations if what in ("y", "dx") else of_weights
            error = ((got.double() - right[what]).norm() / right[what].norm()).item()
            if not error < bound:
                raise RuntimeError(
                    f"{name} is wrong ({what}, relative error {error:.2e}): nothing is measured"
                )
        adapted.as_operation(steps[name].model, False)


def make_steps(
    hidden: int,
    tokens: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    case: BlockCase = MAIN,
) -> dict[str, Step]:
    """A checked step of each system."""
    generator, like = torch.Generator().manual_seed(1), dict(device=device, dtype=dtype)
    x = torch.randn(1, tokens, hidden, generator=generator).to(**like)
    dy = torch.randn(1, tokens, 32, generator=generator).to(**like)
    base = block(hidden, dtype).to(device)
    models = systems(base, case)
    # without autocast PEFT multiplies in float32, which takes longer; RoDE's tuner needs none
    mixed = {name: name.startswith("LoRA") and dtype != torch.float32 for name in models}
    steps = {name: Step(model, x, dy, case.checkpointing, mixed[name]) for name, model in models.items()}
    check(steps, make_truth(base, models["rode"]))
    return steps


def run(
    hidden: int,
    tokens: int,
    rounds: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    name: str = "qv",
) -> list[dict[str, Any]]:
    """A row for each system: seconds, and the ratio to the frozen block."""
    case = ON_BLOCK[name]
    steps = make_steps(hidden, tokens, device, dtype, case)
    times = interleaved(dict(steps), rounds, device, warm_up=1, flush=True, host={})
    rows = []
    for system in steps:
        ratio, seconds = ratios(times, system, "frozen"), spread(times[system])
        row = {"hidden": hidden, "tokens": tokens, "dtype": dtype_name(dtype), "case": name}
        row |= {"checkpointing": case.checkpointing, "dropout": DROPOUT, "system": system}
        rows.append(row | {"seconds": seconds._asdict(), "ratio": ratio._asdict()})
        print(
            f"  hidden {hidden:5} {row['dtype']:9} {name:16} {system:18} {1000 * seconds.median:9.1f} ms  "
            f"{ratio.text(3)} times the frozen block",
            flush=True,
        )
    return rows


def saved_bytes(step: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that one forward pass keeps for backward: distinct storages that are no parameter or buffer."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = step()
    del output
    return sum(kept.values())


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that a call holds at once beyond what was there before, its results included; every allocation is counted."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = call()
    now = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    del result
    return most


def scratch(size: int) -> str:
    return f", and {size / 2**20:.2f} MiB of scratch" if size else ""


def memory(hidden: int, tokens: int) -> list[dict[str, Any]]:
    """A row for each system: bytes kept for backward, the peak of a step, both beyond the frozen block's, and the scratch that
    the CPU kernels keep in their threads, which torch does not count."""
    steps = make_steps(hidden, tokens)
    kept = {name: saved_bytes(step.forward, step.model) for name, step in steps.items()}
    peak = {name: peak_bytes(step) for name, step in steps.items()}
    rows = []
    for name in steps:
        row = {"hidden": hidden, "tokens": tokens, "system": name}
        row |= {"kept": kept[name] - kept["frozen"], "peak": peak[name] - peak["frozen"]}
        row["scratch"] = cpu.scratch_bytes() if name == "rode" else 0
        rows.append(row)
        print(
            f"  hidden {hidden:5} {name:18} kept for backward {row['kept'] / 2**20:9.2f} MiB, peak {row['peak'] / 2**20:9.2f} MiB "
            f"beyond the frozen block's{scratch(row['scratch'])}",
            flush=True,
        )
    return rows


def main_memory(options: Namespace, tokens: int = 1024) -> None:
    """`options` as `python -m benchmarks memory` has them."""
    about = machine()
    print(f"{headline(about)}; one block, {tokens} tokens, float32, adapters on q and v, dropout {DROPOUT}")
    rows = [row for hidden in SHAPES for row in memory(hidden, tokens)]
    if options.json:
        write_json(options.json, {"benchmark": "memory", **about, "dtype": "float32", "rows": rows})


def main(options: Namespace) -> None:
    """`options` as `python -m benchmarks block` has them."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    cases = chosen(ON_BLOCK, options.cases)
    widths = chosen({str(hidden): hidden for hidden in SHAPES}, options.width, "--width")
    dtypes = [
        getattr(torch, name)
        for name in options.dtype or (["bfloat16"] if on_gpu else ["float32", "bfloat16"])
    ]
    tokens = options.tokens or (8192 if on_gpu else 1024)
    about = {"benchmark": "block", **machine(device), "rounds": options.rounds}
    print(f"{headline(about)}; one block, {tokens} tokens, dropout {DROPOUT}, adapters in float32")
    rows: list[dict[str, Any]] = []
    for name in cases:
        for dtype in dtypes:
            for hidden in widths.values():
                rows += run(hidden, tokens, options.rounds, device, dtype, name)
                if options.json:  # what was measured stays if a later case fails
                    write_json(options.json, {**about, "rows": rows})
