"""Greedy decoding: tokens a second of a model alone, with PEFT's LoRA merged into it, with LoRA beside it, and with RoDE.

One sequence: a prompt of random tokens, then a fixed number of new ones through the key-value cache, as `rode generate` asks for
them, but no token ends the answer. Weights are random. Logits are checked first, RoDE's against plain PyTorch and LoRA's against
the merged weights; rounds are interleaved.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Dinov2Config,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
)

from benchmarks import adapted, write_json
from benchmarks.cases import QV, chosen
from benchmarks.timing import Spread, dtype_name, headline, interleaved, machine, ratios, spread
from rode.tuner import RodeLayer

PROMPT = 64
"""Tokens before the first new one; about as many as a picture and a question of the demo."""
RANK = 8
"""Of LoRA: FoodLMM's, and the demo's."""
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Roundings of a whole model, as the norm of the difference of logits over the norm of the logits."""


class Decoder(NamedTuple):
    """A model that answers.

    Attributes:
        build: the model with random weights in a dtype. targets: the layers that get adapters.
    """

    build: Callable[[torch.dtype], Any]
    targets: str | tuple[str, ...]


def demo(dtype: torch.dtype) -> Any:
    """The model of `rode demo`: LLaVA of a DINOv2 ViT-S/14 and SmolLM2-135M, with the demo's attention."""
    text = LlamaConfig(
        vocab_size=49216,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    tower = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=49152, tie_word_embeddings=True
    )
    return AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="eager")


def llama(dtype: torch.dtype) -> Any:
    """Four blocks of Llama-7B, with its vocabulary."""
    return AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=4), dtype=dtype)


MODELS = {
    "demo": Decoder(demo, r".*language_model.*\.(q_proj|v_proj)"),
    "llama-4096": Decoder(llama, QV),
}


def merged(lora: nn.Module) -> nn.Module:
    """The model with LoRA's weights added to its own; the layers that change get memory of their own."""
    model = adapted.share(lora)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer()
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
    return model.merge_and_unload()


def systems(base: nn.Module, targets: str | tuple[str, ...]) -> dict[str, Any]:
    """All with the weights of `base`, in one place in memory."""
    share = adapted.share
    lora = adapted.lora(share(base), targets, RANK)
    found = {
        "base": base,
        "LoRA merged": merged(lora),
        "LoRA": lora,
        "rode": adapted.rode(share(base), targets),
    }
    return {name: model.eval() for name, model in found.items()}


@torch.inference_mode()
def logits(model: Any, ids: Tensor) -> Tensor:
    """(1, T, vocabulary): the last token alone, with the others in the cache, as in decoding."""
    first = model(input_ids=ids[:, :-1], use_cache=True)
    last = model(input_ids=ids[:, -1:], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat([first.logits, last.logits], 1).double()


def check(models: dict[str, Any], ids: Tensor) -> None:
    """RoDE's logits against plain PyTorch, LoRA's against the merged weights.

    Raises:
        RuntimeError: they differ by more than rounding explains.
    """
    bound = BOUNDS[models["base"].dtype]
    plain = adapted.plain(adapted.share(models["base"]), models["rode"], "loop").eval()
    for name, other in (("rode", plain), ("LoRA", models["LoRA merged"])):
        got, want = logits(models[name], ids), logits(other, ids)
        for part, of in (("prompt", slice(0, -1)), ("decoding", slice(-1, None))):
            error = ((got[:, of] - want[:, of]).norm() / want[:, of].norm()).item()
            if not error < bound:
                raise RuntimeError(
                    f"{name} is wrong (logits of {part}, relative error {error:.2e}): nothing is timed"
                )


@torch.inference_mode()
def open_share(model: nn.Module, ids: Tensor) -> float:
    """The share of gates that are open for these tokens."""
    shares, hooks = [], []

    def note(layer: RodeLayer, inputs: tuple[Tensor, ...]) -> None:
        router = layer.adapter("default").router_weight
        shares.append((inputs[0].float() @ router.t() > 0).double().mean())

    for layer in model.modules():
        if isinstance(layer, RodeLayer):
            hooks.append(layer.register_forward_pre_hook(note))
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(shares).mean().item()


@torch.inference_mode()
def generate(model: Any, ids: Tensor, new: int) -> Tensor:
    """The new tokens.

    Raises:
        RuntimeError: they are not as many as asked.
    """
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=new, eos_token_id=None, pad_token_id=0, use_cache=True
    )
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    found = found[:, ids.shape[1] :]
    if found.shape[1] != new:
        raise RuntimeError(f"generate: expected {new} new tokens, got {found.shape[1]}: nothing is timed")
    return found


def run(name: str, dtype: torch.dtype, new: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """A row for each system: tokens a second, and the ratio to those of the base."""
    torch.manual_seed(0)
    base = MODELS[name].build(dtype).requires_grad_(False).to(device)
    base.generation_config.eos_token_id = None  # `generate` would take it where it is given none
    models = systems(base, MODELS[name].targets)
    vocabulary = base.get_input_embeddings().num_embeddings
    # the highest ids may be those of pictures
    ids = torch.randint(vocabulary // 2, (1, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)
    check(models, ids)
    share = open_share(models["rode"], ids)
    calls = {system: partial(generate, model, ids, new) for system, model in models.items()}
    times = interleaved(calls, rounds, device, warm_up=1)
    rows = []
    for system in models:
        rate, ratio = spread([new / t for t in times[system]]), ratios(times, "base", system)
        row = {"case": name, "dtype": dtype_name(dtype), "prompt": PROMPT, "new": new, "system": system}
        row |= {"tokens_per_second": rate._asdict(), "ratio": ratio._asdict()}
        rows.append(row | {"open_share": share if system == "rode" else None})
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    rate, ratio = Spread(**row["tokens_per_second"]), Spread(**row["ratio"])
    is_open = "" if row["open_share"] is None else f", {row['open_share']:.0%} of gates open"
    return (
        f"  {row['case']:10} {row['dtype']:9} {row['system']:12} {rate.text(1):>26} tokens/s  "
        f"{ratio.text(3)} of the base's{is_open}"
    )


def main(options: Namespace) -> None:
    """`options` as `python -m benchmarks generate` has them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = chosen(MODELS, options.cases)
    about = {"benchmark": "generate", **machine(device), "rounds": options.rounds}
    print(
        f"{headline(about)}; {options.tokens} new tokens after a prompt of {PROMPT}, adapters in float32 on q and v"
    )
    rows: list[dict[str, Any]] = []
    for name in cases:
        for dtype in options.dtype:
            rows += run(name, getattr(torch, dtype), options.tokens, options.rounds, device)
            if options.json:  # what was measured stays if a later case fails
                write_json(options.json, {**about, "rows": rows})
