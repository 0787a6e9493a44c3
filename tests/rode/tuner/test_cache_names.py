"""The key-value cache under both of its names: `past_key_values`, and `cache` from transformers 5.24 on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from rode.tuner import RodeConfig

NAMES = ("past_key_values", "cache")


class Tokens:
    """A cache that counts the tokens it holds, all that the tuner asks of one."""

    def __init__(self) -> None:
        self.held = 0

    def get_seq_length(self) -> int:
        return self.held


class OldNames(nn.Module):
    """A decoder whose cache goes by the name of transformers up to 5.23."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lin = nn.Embedding(11, 8), nn.Linear(8, 5)

    def forward(self, input_ids, past_key_values=None):
        past_key_values.held += input_ids.shape[1]
        return SimpleNamespace(logits=self.lin(self.embed(input_ids)), past_key_values=past_key_values)


class NewNames(OldNames):
    """The same with the names of transformers 5.24."""

    def forward(self, input_ids, cache=None):
        out = super().forward(input_ids, cache)
        return SimpleNamespace(logits=out.logits, cache=cache)


def adapted(name, **fields):
    torch.manual_seed(1)
    base = {"past_key_values": OldNames, "cache": NewNames}[name]()
    config = RodeConfig(ranks=(2, 3), target_modules=["lin"], init_weights=False, dropout=0.0, **fields)
    return get_peft_model(base, config).eval()


@pytest.mark.parametrize("name", NAMES)
def test_expert_choice_refuses_a_filled_cache(name):
    model, cache = adapted(name, gate="expert-choice"), Tokens()
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), **{name: cache})
        with pytest.raises(RuntimeError, match="expert"):
            model(torch.tensor([[4]]), **{name: cache})


@pytest.mark.parametrize("name", NAMES)
def test_what_the_prompt_led_to_stays_with_its_cache(name):
    model = adapted(name, gate="softmax", router_input="sequence")
    prompt, step, cache = torch.tensor([[1, 2, 3]]), torch.tensor([[4]]), Tokens()
    with torch.no_grad():
        whole = model(
            torch.tensor([[1, 2, 3, 4]]), **{name: Tokens()}, rode_prompt_mask=torch.tensor([[1, 1, 1, 0]])
        )
        model(prompt, **{name: cache})
        model(torch.tensor([[7, 8]]), **{name: Tokens()})  # another prompt in between
        torch.testing.assert_close(model(step, **{name: cache}).logits, whole.logits[:, 3:])
