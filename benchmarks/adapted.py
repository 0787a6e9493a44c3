"""Models with adapters as configs train them: RoDE's tuner, the same formula in plain PyTorch, PEFT's LoRA and X-LoRA.

The base is frozen, in float32 or bfloat16; adapters are in float32, with dropout in training mode.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.cases import DROPOUT, PAPER
from benchmarks.eager import packed, peft_loop
from rode.tuner import RodeConfig, RodeLayer
from rode_kernels.backends.reference import dropout_keep
from rode_kernels.checks import normalize_seed


def share(model: nn.Module) -> Any:
    """A copy of a model with the parameters of the first, so that many systems need the memory of one."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


class Plain(nn.Module):
    """A frozen linear layer with the mixture of a `RodeLayer`, in plain PyTorch.

    Args:
        how: "packed" or "loop" (benchmarks/eager.py).

    Attributes:
        as_operation: draw the mask that the operation would draw, so that results can be compared.
    """

    def __init__(self, base: nn.Module, layer: RodeLayer, how: str) -> None:
        super().__init__()
        self.base, self.how, self.as_operation = base, how, False
        adapter = layer.adapter("default")
        self.ranks, self.scaling, self.dropout = adapter.ranks, adapter.scaling, adapter.config.dropout
        A, B, W = (t.detach().clone() for t in (adapter.A, adapter.B, adapter.router_weight))
        if how == "packed":  # one parameter: nothing has to be put together in a step
            self.down, self.B = nn.Parameter(torch.cat([A, W])), nn.Parameter(B)
        else:
            self.A, self.B, self.W = nn.Parameter(A), nn.Parameter(B), nn.Parameter(W)
        expert = torch.arange(len(self.ranks)).repeat_interleave(torch.tensor(self.ranks))
        self.register_buffer("expert", expert.to(A.device))
        self.register_buffer("factors", torch.tensor(self.scaling)[expert].to(A.device))

    def forward(self, x: Tensor) -> Tensor:
        base = self.base(x)
        rows, into = x.flatten(0, -2), base.flatten(0, -2)
        p = self.dropout if self.training else 0.0
        keep = None
        if p and self.as_operation:
            seed = normalize_seed(None, p, rows)
            assert seed is not None, "there is dropout"
            keep = dropout_keep(seed, p, *rows.shape)
        if self.how == "packed":  # into the layer's output, as the tuner does
            factors = self.factors.to(x.dtype)
            y = packed(rows, self.down, self.B, factors, self.expert, into, True, p, keep)
        else:
            y = peft_loop(rows, self.A, self.B, self.W, into, self.ranks, self.scaling, p, keep)
        return y.view_as(base)

    def gradients(self, of: Mapping[nn.Parameter, Tensor]) -> list[Tensor]:
        """The gradients of A, B and the router's weights."""
        if self.how == "loop":
            return [of[self.A], of[self.B], of[self.W]]
        R = sum(self.ranks)
        return [of[self.down][:R], of[self.B], of[self.down][R:]]


def gradients(model: nn.Module, of: Mapping[nn.Parameter, Tensor]) -> list[Tensor]:
    """The gradients of A, B and the router's weights of each adapted layer of `rode` or `plain`, in the order of layers."""
    found = []
    for module in model.modules():
        if isinstance(module, Plain):
            found += module.gradients(of)
        elif isinstance(module, RodeLayer):
            adapter = module.adapter("default")
            found += [of[adapter.A], of[adapter.B], of[adapter.router_weight]]
    return found


def rode(base: nn.Module, targets: str | Sequence[str]) -> PeftModel:
    """RoDE of the paper's ranks on a model, which it takes over. About half of its gates are open, and B is not 0."""
    config = RodeConfig(
        ranks=PAPER,
        dropout=DROPOUT,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    for layer in model.modules():
        if isinstance(layer, RodeLayer):
            nn.init.normal_(layer.adapter("default").B, std=0.02)
    return model


def plain(base: nn.Module, adapted: PeftModel, how: str) -> Any:
    """The adapters of `rode` on a model, which it takes over, in plain PyTorch."""
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, RodeLayer):
            base.set_submodule(name, Plain(base.get_submodule(name), layer, how))
    return base


def as_operation(model: nn.Module, on: bool) -> None:
    """Whether `plain`'s layers draw the masks of the operation, in the same order from torch's generator."""
    for module in model.modules():
        if isinstance(module, Plain):
            module.as_operation = on


def lora(base: nn.Module, targets: str | Sequence[str], rank: int) -> PeftModel:
    """PEFT's LoRA as its users make it: dropout, parameters in float32 on a base of any dtype; B at random."""
    config = LoraConfig(
        r=rank,
        lora_alpha=16,
        lora_dropout=DROPOUT,
        target_modules=targets if isinstance(targets, str) else list(targets),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config, autocast_adapter_dtype=True)


def x_lora(base: nn.Module, targets: Sequence[str]) -> PeftModel:
    """X-LoRA over two of PEFT's LoRA adapters of rank 8, which have to be files first."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = {str(i): f"{folder}/{i}" for i in range(2)}
        for path in adapters.values():
            lora(share(base), targets, 8).save_pretrained(path)
        hidden = base.get_input_embeddings().embedding_dim
        config = XLoraConfig(hidden_size=hidden, adapters=adapters, task_type="CAUSAL_LM")
        return get_peft_model(base, config)
