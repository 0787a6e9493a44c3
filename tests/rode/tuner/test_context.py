"""Side inputs on their way to the layers, and the state of a pass: copies, checkpointing, later adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import inject_adapter_in_model

from adapted_llava import BLOCK, COMMON, TASK, adapted, layers_of
from rode.tuner import RodeConfig, routing_inputs


def test_tasks_change_the_output_row_by_row(tiny_llava, llava_batch):
    model = adapted(tiny_llava, **TASK)
    ids = torch.tensor([0, 2])
    both = model(**llava_batch, rode_task_ids=ids).logits
    same = model(**llava_batch, rode_task_ids=torch.tensor([0, 0])).logits
    torch.testing.assert_close(both[0], same[0])
    assert (both[1, 2:] - same[1, 2:]).abs().max() > 1e-3
    by_token = model(**llava_batch, rode_task_ids=ids[:, None].expand(2, 9)).logits
    torch.testing.assert_close(by_token, both)
    with routing_inputs(model, task_ids=ids):
        torch.testing.assert_close(model(**llava_batch).logits, both)
    inner = model.get_base_model()
    with routing_inputs(inner, task_ids=ids):  # without PEFT around it
        torch.testing.assert_close(inner(**llava_batch).logits, both)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (
            None,
            r"rode_task_ids: router_input='task' needs the task of each row; pass rode_task_ids=\(batch,\)",
        ),
        (torch.tensor([0, 3]), "expected ids below num_ids=3, got 3"),
        (torch.tensor([0, -1]), "got -1"),
        (torch.tensor([0.0, 1.0]), r"expected int64 of shape \(2,\), got torch.float32"),
        (torch.tensor([0, 1, 2]), r"got torch.int64 \(3,\)"),
        (torch.zeros(2, 4, dtype=torch.int64), r"expected shape \(2,\) or \(2, 9\), got \(2, 4\)"),
    ],
)
def test_wrong_ids_are_named(tiny_llava, llava_batch, ids, words):
    model = adapted(tiny_llava, **TASK)
    model(
        **llava_batch, rode_task_ids=torch.tensor([0, 1])
    )  # what this pass was given does not help the next
    with pytest.raises(ValueError, match=words):
        model(**llava_batch, rode_task_ids=ids)


def test_unknown_routing_inputs(tiny_llava):
    with pytest.raises(ValueError, match="no RoDE layer"), routing_inputs(tiny_llava()):
        pass


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generation_knows_the_task(tiny_llava, llava_batch, num_beams):
    model = adapted(tiny_llava, **TASK)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": num_beams, "eos_token_id": None}
    ids = torch.tensor([1, 2])
    together = model.generate(**llava_batch, rode_task_ids=ids, **options)
    for row in range(2):
        alone = {name: t[row : row + 1] for name, t in llava_batch.items()}
        got = model.generate(**alone, rode_task_ids=ids[row : row + 1], **options)
        assert torch.equal(got[0], together[row])
    # each step's token is the argmax of a pass over the whole text so far
    if num_beams == 1:
        text = together[:, :-1]
        mask = torch.cat((llava_batch["attention_mask"], torch.ones(2, 3, dtype=torch.int64)), dim=1)
        logits = model(
            input_ids=text,
            attention_mask=mask,
            pixel_values=llava_batch["pixel_values"],
            rode_task_ids=ids,
        ).logits
        assert torch.equal(logits[:, 8:].argmax(-1), together[:, 9:])


@pytest.mark.parametrize("fields", [TASK, BLOCK, {"gate": "softmax", "router_input": "sequence"}])
def test_checkpointing_changes_no_bit(tiny_llava, llava_batch, fields):
    fields = {**fields, "ranks": (2, 3, 2)}
    ids = {"rode_task_ids": torch.tensor([0, 2])} if "num_ids" in fields else {}
    grads = []
    for checkpointing in (False, True):
        model = adapted(tiny_llava, **fields).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        labels = llava_batch["input_ids"].masked_fill(llava_batch["attention_mask"] == 0, -100)
        labels[:, :6] = -100
        model(**llava_batch, **ids, labels=labels).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[1][n], g) for n, g in grads[0].items())
    assert any(n.endswith(("table", "router_weight")) for n in grads[0])


@pytest.mark.parametrize("fields", [TASK, BLOCK])
def test_adapters_off_is_the_base_model(tiny_llava, llava_batch, fields):
    model = adapted(tiny_llava, **{**fields, "ranks": (2, 3)})
    with model.disable_adapter():
        off = model(**llava_batch).logits
    assert torch.equal(off, tiny_llava().eval()(**llava_batch).logits)


def test_a_copy_after_a_pass_is_a_model_of_its_own(tiny_llava, llava_batch):
    model = adapted(tiny_llava, **{**TASK, "router_per": "block"})
    ids = torch.tensor([0, 1])
    want = model(**llava_batch, rode_task_ids=ids).logits
    inner = model.get_base_model()
    other = copy.deepcopy(inner)
    assert layers_of(other)[0].context is not layers_of(model)[0].context
    assert len({id(m.context) for m in layers_of(other)}) == 1
    assert torch.equal(other(**llava_batch, rode_task_ids=ids).logits, want)


def test_unload_takes_the_hooks_away(tiny_llava, llava_batch):
    for fields in (TASK, BLOCK):
        model = adapted(tiny_llava, **fields)
        plain = model.unload()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
        assert torch.equal(plain(**llava_batch).logits, tiny_llava().eval()(**llava_batch).logits)


def test_transformers_loading_routes_too(tiny_llava, llava_batch, tmp_path):
    model = adapted(tiny_llava, **TASK)
    ids = torch.tensor([2, 0])
    want = model(**llava_batch, rode_task_ids=ids).logits
    model.save_pretrained(tmp_path)
    plain = tiny_llava().eval()
    plain.load_adapter(str(tmp_path))
    torch.testing.assert_close(plain(**llava_batch, rode_task_ids=ids).logits, want)


def test_two_adapters_share_the_state(tiny_llava, llava_batch):
    model = adapted(tiny_llava, **TASK)
    model.add_adapter("second", RodeConfig(**COMMON, **{**TASK, "num_ids": 2}))
    model.base_model.set_adapter(["default", "second"])
    model(**llava_batch, rode_task_ids=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="below num_ids=2, got 2"):
        model(**llava_batch, rode_task_ids=torch.tensor([0, 2]))
    injected = inject_adapter_in_model(RodeConfig(**COMMON, **TASK), tiny_llava())
    assert len({id(m.context) for m in layers_of(injected)}) == 1


@pytest.mark.parametrize("how", ["add", "load"])
def test_a_later_adapter_is_told_of_the_pass_too(tiny_llava, llava_batch, tmp_path, how):
    """PEFT's hook after injection runs for a model's first adapter alone."""
    ids = torch.tensor([0, 2])
    want = adapted(tiny_llava, **TASK)
    want.save_pretrained(tmp_path)
    model = adapted(tiny_llava, gate="relu")
    if how == "load":
        model.load_adapter(str(tmp_path), "later")
    else:
        model.add_adapter("later", RodeConfig(**{**COMMON, **TASK}))
        for mine, theirs in zip(layers_of(model), layers_of(want), strict=True):
            mine.adapter("later").load_state_dict(theirs.adapter("default").state_dict())
    model.set_adapter("later")
    model.eval()
    torch.testing.assert_close(
        model(**llava_batch, rode_task_ids=ids).logits, want(**llava_batch, rode_task_ids=ids).logits
    )
    model.add_adapter("l1", RodeConfig(**COMMON, aux_loss="l1", aux_weight=1.0))
    model.set_adapter("l1")
    assert model.train()(**llava_batch, labels=llava_batch["input_ids"]).aux_loss > 0


def test_ids_of_a_pass_are_gone_after_it(tiny_llava, llava_batch):
    model = adapted(tiny_llava, **TASK)
    with torch.no_grad():
        model(**llava_batch, rode_task_ids=torch.tensor([0, 1]))
        with pytest.raises(ValueError, match="needs the task"):  # past the hooks
            model.get_base_model().model(**llava_batch)
