"""Costs of each published system as a configuration: trained parameters, bytes kept for backward, time of a training step.

The step is forward, backward and AdamW of a Llama of four blocks (hidden 576, SmolLM2-135M's shapes) in float32, adapters trained
and the rest frozen. Each preset's logits are checked against the plain-PyTorch backend first. Rounds are interleaved in one
process; times are medians of per-round ratios to PEFT's LoRA of rank 8, with quartiles.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, PolyConfig, XLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import write_json
from benchmarks.block import saved_bytes
from benchmarks.timing import headline, interleaved, machine, ratios
from rode.baselines.moe_llava import convert_to_moe
from rode.tuner import RodeConfig
from rode.tuner.presets import PRESETS, TASKS, preset

BASELINE = "LoRA (PEFT)"
QV = ["q_proj", "v_proj"]
SMALL = dict(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=4,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=4096,
)
PAPER = dict(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32000,
)
"""Llama-7B's."""


def llama(shape: dict[str, int]) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa", tie_word_embeddings=False))


def lora() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=QV, task_type="CAUSAL_LM")


def _x_lora(model: nn.Module) -> nn.Module:
    """PEFT's classifier over two of PEFT's LoRA adapters, which have to be files first."""
    with tempfile.TemporaryDirectory() as folder:
        for name in "01":
            get_peft_model(llama(SMALL), lora()).save_pretrained(f"{folder}/{name}")
        names = {name: f"{folder}/{name}" for name in "01"}
        config = XLoraConfig(hidden_size=model.config.hidden_size, adapters=names, task_type="CAUSAL_LM")
        model.config.use_cache = False  # X-LoRA wants it so
        return get_peft_model(model, config)


def _moe_llava(model: nn.Module) -> nn.Module:
    convert_to_moe(model, dtype=None)
    return model


def systems() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """name -> what puts the system on a Llama."""
    poly = PolyConfig(r=8, n_tasks=TASKS, n_skills=4, target_modules=QV, task_type="CAUSAL_LM")
    ours = {
        name: preset(name, **({} if "target_modules" in PRESETS[name] else {"target_modules": QV}))
        for name in PRESETS
    }
    for config in ours.values():
        config.task_type = "CAUSAL_LM"
    peft = {BASELINE: lora(), "Poly (PEFT)": poly}
    found = {
        name: lambda model, c=config: get_peft_model(model, c) for name, config in {**peft, **ours}.items()
    }
    return {**found, "moe-llava": _moe_llava, "X-LoRA (PEFT)": _x_lora}


@dataclass
class Case:
    """A system on the small model, in training mode, with the batch that it is called with."""

    name: str
    model: nn.Module
    batch: dict[str, Tensor]
    base: int  # parameters of the model without it

    @classmethod
    def make(cls, name: str, put_on: Callable[[nn.Module], nn.Module], ids: Tensor) -> Case:
        torch.manual_seed(0)
        model = llama(SMALL)
        base = sum(p.numel() for p in model.parameters())
        model = put_on(model)
        for key, p in model.named_parameters():
            if "rode_adapters.default.B" in key or "lora_B" in key:  # away from 0, where nothing would flow
                nn.init.normal_(p, std=0.02)
        config = getattr(model, "active_peft_config", None)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        rows = torch.arange(len(ids)) % TASKS
        if isinstance(config, RodeConfig):
            if config.id_input or config.aux_groups:
                batch[config.id_input or "rode_task_ids"] = rows
        elif isinstance(config, PolyConfig):
            batch["task_ids"] = rows
        return cls(name, model.train(), batch, base)

    def trained(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def saved(self) -> int:
        """Bytes that one forward pass keeps for backward."""
        return saved_bytes(lambda: self.model(**self.batch).loss, self.model)

    def check(self) -> None:
        """The logits of the chosen backend are plain PyTorch's.

        Raises:
            RuntimeError: they differ by more than rounding explains.
        """
        if self.name == "expert-choice":  # nearly equal wishes may fall either way
            return
        self.model.eval()
        with torch.no_grad():
            mine = self.model(**self.batch).logits
            with backend("reference"):
                theirs = self.model(**self.batch).logits
        self.model.train()
        error = (mine - theirs).abs().max() / theirs.abs().max()
        if not error < 1e-4:
            raise RuntimeError(f"{self.name} is wrong (logits, relative error {error:.2e}): nothing is timed")

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.model(**self.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@contextmanager
def backend(name: str):
    before = os.environ.get("RODE_BACKEND")
    os.environ["RODE_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("RODE_BACKEND")
        if before is not None:
            os.environ["RODE_BACKEND"] = before


def of_the_paper(put_on: Callable[[nn.Module], nn.Module]) -> int:
    """Trained parameters on Llama-7B's shapes; nothing is allocated."""
    with torch.device("meta"):
        model = put_on(llama(PAPER))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def main(json_file: str | None, rounds: int, rows: int = 4, tokens: int = 256) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, SMALL["vocab_size"], (rows, tokens), generator=generator)
    all_ = systems()
    cases = {name: Case.make(name, put_on, ids) for name, put_on in all_.items()}
    for case in cases.values():
        case.check()
    frozen = Case.make("frozen", lambda model: model.requires_grad_(False), ids)
    for p in frozen.model.get_input_embeddings().parameters():
        p.requires_grad_(True)  # so that a graph is made, as adapters in the first block make one
    bare = frozen.saved()
    adamw = {
        name: torch.optim.AdamW([p for p in case.model.parameters() if p.requires_grad], lr=1e-5)
        for name, case in cases.items()
    }
    times = interleaved(
        {name: lambda c=case, o=adamw[name]: c.step(o) for name, case in cases.items()}, rounds, warm_up=1
    )
    about = machine()
    table = []
    print(f"{headline(about)}; {rows} x {tokens} tokens, {rounds} rounds")
    print(f"{'':16} {'trained':>10} {'on Llama-7B':>12} {'kept, MiB':>10} {'step against ' + BASELINE:>26}")
    for name, case in cases.items():
        ratio = ratios(times, name, BASELINE)
        row = {
            "system": name,
            "trained": case.trained(),
            "trained_llama_7b": None if name == "X-LoRA (PEFT)" else of_the_paper(all_[name]),
            "kept_mib": (case.saved() - bare) / 2**20,
            "step_ratio": ratio._asdict(),
            "step_seconds": sorted(times[name])[len(times[name]) // 2],
        }
        table.append(row)
        seven = "-" if row["trained_llama_7b"] is None else f"{row['trained_llama_7b']:,}"
        print(
            f"{name:16} {row['trained']:>10,} {seven:>12} {row['kept_mib']:>10.1f}   {ratio}",
            flush=True,
        )
    if json_file:
        write_json(json_file, {"benchmark": "presets", **about, "rows": table})
