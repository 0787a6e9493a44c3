"""A whole Llama block with adapters on q and v: what a training step costs beside the frozen block, in time and in memory.

The step is forward and backward with a gradient for the block's input, float32; where there is a GPU, its time there, in bfloat16.
Beside RoDE stand the same formula as a loop over
LoRA layers and packed into two products, plain PyTorch both, PEFT's LoRA of ranks 8 and 30, and PEFT's X-LoRA. The first three
have the same weights, and their outputs and input gradients are checked against the loop in float64 before anything is measured.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import write_json
from benchmarks.eager import packed, peft_loop
from benchmarks.timing import dtype_name, headline, interleaved, machine, ratios
from rode.tuner import RodeConfig, RodeLayer
from rode_kernels.backends import cpu

RANKS = (2, 4, 8, 16)
QV = ["q_proj", "v_proj"]
SHAPES = {
    576: {"intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    4096: {"intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
}
"""SmolLM2-135M's and Llama-7B's."""


def block(hidden: int) -> LlamaForCausalLM:
    """One block; its vocabulary is small, so that the head weighs little."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=1, vocab_size=32, use_cache=False, **SHAPES[hidden]
    )
    return LlamaForCausalLM(config).requires_grad_(False).train()


class Plain(nn.Module):
    """A frozen linear layer with the mixture of a `RodeLayer`, in plain PyTorch."""

    def __init__(self, layer: RodeLayer, how: str) -> None:
        super().__init__()
        self.base, self.how = layer.base_layer, how
        adapter = layer.adapter("default")
        tensors = (adapter.A, adapter.B, adapter.router_weight)
        self.A, self.B, self.W = (nn.Parameter(t.detach().clone()) for t in tensors)
        self.scaling = adapter.scaling
        expert = torch.arange(len(RANKS)).repeat_interleave(torch.tensor(RANKS))
        self.register_buffer("expert", expert)
        self.register_buffer("factors", torch.tensor(self.scaling)[expert])

    def forward(self, x: Tensor) -> Tensor:
        base = self.base(x)
        rows, into = x.flatten(0, -2), base.flatten(0, -2)
        if self.how == "loop":
            return peft_loop(rows, self.A, self.B, self.W, into, RANKS, self.scaling).view_as(base)
        down = torch.cat([self.A, self.W])
        return packed(rows, down, self.B, self.factors.to(x.dtype), self.expert, into).view_as(base)


def rode(hidden: int) -> nn.Module:
    config = RodeConfig(
        ranks=RANKS, dropout=0.0, target_modules=QV, init_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(block(hidden), config).train()


def plain(hidden: int, how: str) -> nn.Module:
    """The weights of `rode(hidden)` in plain PyTorch."""
    model = rode(hidden).get_base_model()
    attention = model.model.layers[0].self_attn
    for name in QV:
        setattr(attention, name, Plain(getattr(attention, name), how))
    return model


def lora(hidden: int, rank: int) -> nn.Module:
    config = LoraConfig(
        r=rank, lora_alpha=16, target_modules=QV, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(block(hidden), config).train()


def x_lora(hidden: int) -> nn.Module:
    """X-LoRA over two of PEFT's LoRA adapters of rank 8."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = {str(i): f"{folder}/{i}" for i in range(2)}
        for path in adapters.values():
            lora(hidden, 8).save_pretrained(path)
        config = XLoraConfig(hidden_size=hidden, adapters=adapters, task_type="CAUSAL_LM")
        return get_peft_model(block(hidden), config).train()


def systems(hidden: int) -> dict[str, nn.Module]:
    return {
        "frozen": block(hidden),
        "rode": rode(hidden),
        "packed": plain(hidden, "packed"),
        "loop": plain(hidden, "loop"),
        "LoRA r=8 (PEFT)": lora(hidden, 8),
        "LoRA r=30 (PEFT)": lora(hidden, 30),
        "X-LoRA (PEFT)": x_lora(hidden),
    }


class Step:
    """Forward and backward of one system on one input (1, M, hidden); parameters' gradients are made anew each time."""

    def __init__(self, model: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.model, self.x, self.dy = model, x.clone().requires_grad_(True), dy
        self.trained = [p for p in model.parameters() if p.requires_grad]

    def forward(self) -> Tensor:
        # the head is a stand-in for what follows: its logits take the gradient
        return self.model(inputs_embeds=self.x).logits

    def __call__(self) -> list[Tensor | None]:
        return torch.autograd.grad(self.forward(), [self.x, *self.trained], self.dy, allow_unused=True)


def check(steps: dict[str, Step]) -> None:
    """Logits and the input's gradient of the three that have one set of weights, against the loop in float64.

    Raises:
        RuntimeError: one is off by more than rounding explains.
    """
    double = copy.deepcopy(steps["loop"].model).double()
    truth = Step(double, steps["loop"].x.detach().double(), steps["loop"].dy.double())
    bound = 1e-4 if steps["loop"].x.dtype == torch.float32 else 5e-2  # of a whole block's roundings
    y, dx = truth.forward().detach(), truth()[0]
    for name in ("rode", "packed", "loop"):
        for what, got, want in (("y", steps[name].forward().detach(), y), ("dx", steps[name]()[0], dx)):
            error = ((got.double() - want).abs().max() / want.abs().max()).item()
            if not error < bound:
                raise RuntimeError(
                    f"{name} is wrong ({what}, relative error {error:.2e}): nothing is measured"
                )


def make_steps(
    hidden: int, tokens: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Step]:
    generator, like = torch.Generator().manual_seed(1), dict(device=device, dtype=dtype)
    x = torch.randn(1, tokens, hidden, generator=generator).to(**like)
    dy = torch.randn(1, tokens, 32, generator=generator).to(**like)
    steps = {
        name: Step(model.to(**like), x, dy)
        for name, model in systems(hidden).items()
        if not (name.startswith("X-LoRA") and dtype != torch.float32)  # it multiplies in float32
    }
    check(steps)
    return steps


def run(
    hidden: int, tokens: int, rounds: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[dict[str, Any]]:
    """A row for each system: seconds, and the ratio to the frozen block."""
    steps = make_steps(hidden, tokens, device, dtype)
    times = interleaved(dict(steps), rounds, device, warm_up=1, host={})
    rows = []
    for name in steps:
        ratio = ratios(times, name, "frozen")
        seconds = sorted(times[name])[len(times[name]) // 2]
        rows.append(
            {"hidden": hidden, "tokens": tokens, "system": name, "seconds": seconds, "ratio": ratio._asdict()}
        )
        print(
            f"  hidden {hidden:5} {name:18} {1000 * seconds:9.1f} ms  {ratio} times the frozen block",
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


def main(what: str, json_file: str | None, rounds: int = 10, tokens: int = 1024) -> None:
    """`what` is "block" (time) or "memory"."""
    on_gpu = what == "block" and torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    tokens = 8 * tokens if on_gpu else tokens
    about = {**machine(device), "dtype": dtype_name(dtype)}
    print(f"{headline(about)}; one block, {tokens} tokens, {about['dtype']}, adapters on q and v")
    if on_gpu:
        print("X-LoRA (PEFT): left out, for it multiplies in float32 what is in bfloat16 here")
    rows = []
    for hidden in SHAPES:
        rows += memory(hidden, tokens) if what == "memory" else run(hidden, tokens, rounds, device, dtype)
    if json_file:
        write_json(json_file, {"benchmark": what, **about, "rows": rows})
