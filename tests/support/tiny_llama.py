"""A tiny Llama with random weights and an adapter that changes its output."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rode.tuner import RodeConfig


def adapted_llama(dtype: torch.dtype, target_modules: Any = "all-linear", **options: Any) -> PeftModel:
    """Two blocks of width 24 with a bias on q, k, v and o, and a vocabulary of 64; `options`: of `RodeConfig`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    options = {"ranks": (1, 2, 4), "init_weights": False, **options}
    config_of_adapter = RodeConfig(task_type="CAUSAL_LM", target_modules=target_modules, **options)
    return get_peft_model(LlamaForCausalLM(config).to(dtype), config_of_adapter)
