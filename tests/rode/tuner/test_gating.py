"""Gates that a layer does not compute from its own tokens alone: of a sequence, of a block, of constants, of expert choice."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from adapted_llava import BLOCK, COMMON, FEED_FORWARD, adapted, layers_of
from rode.tuner import GateStatistics, RodeConfig
from rode.tuner.routers import expert_choice


def test_a_sequence_is_routed_by_its_prompt_alone(tiny_llava, llava_batch):
    model = adapted(tiny_llava, gate="softmax", router_input="sequence")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        out = model.generate(**llava_batch, **options, return_dict_in_generate=True, output_logits=True)
    answers = out.sequences
    # the same logits in one pass, where labels say what is the prompt
    labels = answers[:, :-1].clone()
    labels[:, :9] = -100
    mask = torch.cat((llava_batch["attention_mask"], torch.ones(2, 3, dtype=torch.int64)), dim=1)
    batch = {
        "input_ids": answers[:, :-1],
        "attention_mask": mask,
        "pixel_values": llava_batch["pixel_values"],
    }
    logits = model(**batch, labels=labels).logits
    torch.testing.assert_close(logits[:, 8:], torch.stack(out.logits, 1), rtol=1e-4, atol=1e-4)
    prompt = torch.arange(12).expand(2, 12) < 9
    torch.testing.assert_close(model(**batch, rode_prompt_mask=prompt).logits, logits)
    # without a cache each pass sees the answer too, and must not read it
    again = model.generate(**llava_batch, **options, use_cache=False)
    assert torch.equal(again, answers)
    # and neither padding nor a neighbour is read
    alone = {name: t[1:, 2:] if t.dim() == 2 else t[1:] for name, t in llava_batch.items()}
    torch.testing.assert_close(
        model(**alone).logits[0], model(**llava_batch).logits[1, 2:], rtol=1e-4, atol=1e-4
    )


def test_sequence_gates_are_the_means_formula(mlp):
    torch.manual_seed(3)
    fields = {"gate": "softmax", "router_input": "sequence", "target_modules": ["lin0"]}
    fields = {**COMMON, **fields, "task_type": None}
    model = get_peft_model(mlp(), RodeConfig(**fields))
    layer = model.base_model.model.lin0
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    prompt = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    layer.context.passes.last.prompt = prompt
    y = layer(x)
    adapter = layer.adapter("default")
    A, B, router = adapter.A, adapter.B, adapter.router_weight
    for b in range(2):
        mean = x[b, prompt[b]].mean(0)
        gates = (router @ mean).softmax(0)
        for t in range(4):
            want = layer.base_layer(x[b, t])
            want = want + 8 * gates[0] * (B[:, :2] @ (A[:2] @ x[b, t]))
            want = want + 16 / 3 * gates[1] * (B[:, 2:] @ (A[2:] @ x[b, t]))
            torch.testing.assert_close(y[b, t], want)


@pytest.mark.parametrize("gate", ["relu", "softmax", "sigmoid", "gumbel-sigmoid"])
def test_constant_gates_merge(mlp, gate):
    torch.manual_seed(3)
    fields = {"gate": gate, "router_input": "constant", "target_modules": ["lin0"]}
    fields = {**COMMON, **fields, "task_type": None}
    model = get_peft_model(mlp(), RodeConfig(**fields)).eval()
    layer = model.base_model.model.lin0
    with torch.no_grad():
        layer.adapter("default").table.copy_(torch.tensor([[0.4, -0.7]]))
    x = torch.randn(5, 12, dtype=torch.float64)
    want = model(x)
    h = layer.adapter("default").table[0]
    gates = {"relu": h.relu(), "softmax": h.softmax(0)}.get(gate, h.sigmoid())
    A, B = layer.adapter("default").A, layer.adapter("default").B
    delta = 8 * gates[0] * B[:, :2] @ A[:2] + 16 / 3 * gates[1] * B[:, 2:] @ A[2:]
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)
    model.merge_adapter()
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", ["relu", "softmax"])
def test_one_router_for_a_block(tiny_llava, llava_batch, gate):
    model = adapted(tiny_llava, gate=gate, router_per="block")
    q, v = layers_of(model)[:2]
    assert q.adapter("default").router_weight is not None
    assert v.adapter("default").router_weight is None
    seen = {}
    q.register_forward_hook(lambda m, args, out: seen.update(x=args[0]))
    v.register_forward_hook(lambda m, args, out: seen.update(y=out))
    model(**llava_batch)
    x = seen["x"]
    h = x @ q.adapter("default").router_weight.T
    gates = h.relu() if gate == "relu" else h.softmax(-1)
    A, B = v.adapter("default").A, v.adapter("default").B
    want = v.base_layer(x)
    want = want + 8 * gates[..., :1] * (x @ A[:2].T @ B[:, :2].T)
    want = want + 16 / 3 * gates[..., 1:] * (x @ A[2:].T @ B[:, 2:].T)
    torch.testing.assert_close(seen["y"], want, rtol=1e-4, atol=1e-5)


def test_blocks_experts_must_agree(tiny_llava):
    config = RodeConfig(**COMMON, router_per="block", rank_pattern={"v_proj": (2, 2, 2)})
    with pytest.raises(
        ValueError, match=r"v_proj: router_per='block' shares the gates of .*q_proj, which has 2"
    ):
        get_peft_model(tiny_llava(), config)


def test_whole_blocks_are_no_attention(tiny_llava):
    fields = {"gate": "topk", "top_k": 1, "normalize": True, "router_per": "block", "expert_per": "block"}
    with pytest.raises(ValueError, match="is or holds attention"):
        get_peft_model(tiny_llava(), RodeConfig(**COMMON, **fields))


def test_expert_choice_is_not_causal_says_so_and_does_not_generate(tiny_llava, llava_batch):
    model = adapted(tiny_llava, gate="expert-choice", capacity=1.0)
    batch = dict(llava_batch)
    first = model(**batch).logits
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][0, 8] = 60  # the last token changes what earlier ones get
    assert (model(**batch).logits[0, :8] - first[0, :8]).abs().max() > 0
    with pytest.raises(ValueError, match="cannot generate; it is a control"):
        model.generate(**llava_batch, max_new_tokens=2)
    with pytest.raises(RuntimeError, match="cannot generate"):  # past PEFT, at the first step with a cache
        model.get_base_model().generate(**llava_batch, max_new_tokens=2, eos_token_id=None)


def test_expert_choice_leaves_padding_out():
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 3, dtype=torch.float64)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]).bool()
    routed = expert_choice(logits, mask, 1.5)
    assert routed.open.sum(1).tolist() == [[3, 3, 3], [2, 2, 2]]  # ceil(1.5 * 6 / 3), ceil(1.5 * 4 / 3)
    alone = expert_choice(logits[1:, 2:], None, 1.5)
    assert torch.equal(routed.gates[1, 2:], alone.gates[0])
    assert routed.gates[1, :2].count_nonzero() == 0


@pytest.mark.parametrize("gate", ["softmax", "relu", "topk"])
def test_blocks_as_experts_leave_other_adapters_alone(tiny_llava, llava_batch, gate):
    k = {"top_k": 1} if gate == "topk" else {}
    model = adapted(tiny_llava, gate=gate, target_modules=FEED_FORWARD, **k)
    want = model(**llava_batch).logits
    model.add_adapter("blocks", RodeConfig(**{**COMMON, **BLOCK}))
    model.set_adapter("default")
    model.eval()
    torch.testing.assert_close(model(**llava_batch).logits, want)
    with GateStatistics().attach(model) as statistics:
        model(**llava_batch)
    assert all(layer.tokens["all"] == 16 for layer in statistics.report().layers)
    model.delete_adapter("blocks")
    torch.testing.assert_close(model(**llava_batch).logits, want)


def test_blocks_that_hold_attention_are_refused():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = OPTForCausalLM(OPTConfig(**sizes, vocab_size=50, word_embed_proj_dim=16))
    with pytest.raises(ValueError, match="is or holds attention"):
        get_peft_model(model, RodeConfig(**{**COMMON, **BLOCK, "target_modules": ["fc1", "fc2"]}))


def test_checkpointed_blocks_keep_nothing(tiny_llava, llava_batch):
    model = adapted(tiny_llava, **BLOCK).train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model(**llava_batch, labels=llava_batch["input_ids"]).loss.backward()
    for layer in layers_of(model):
        assert layer.info.block_pass._base == {}
        assert layer.info.block_pass._weights is layer.info.block_pass.whole is None
    copy.deepcopy(model.get_base_model())


@pytest.mark.parametrize("first", ["q_proj", "gate_proj"])
def test_a_layer_without_a_router_leads_no_block(tiny_llava, llava_batch, first):
    targets = ["q_proj", "v_proj"] if first == "q_proj" else FEED_FORWARD
    fields = {"ranks": (2, 3, 2), "gate": "softmax", "router_per": "block"}
    model = adapted(tiny_llava, **fields, target_modules=targets, rank_pattern={first: (4,)})
    assert layers_of(model)[1].adapter("default").router_weight is not None
    model(**llava_batch)


def test_sequence_logits_belong_to_their_cache(tiny_llava, llava_batch):
    model = adapted(tiny_llava, gate="softmax", router_input="sequence")
    first = {name: t[:1] for name, t in llava_batch.items()}
    other = dict(first, input_ids=first["input_ids"].clone())
    other["input_ids"][0, 5:] = torch.tensor([60, 61, 62, 63])
    step = torch.tensor([[33]])

    def next_logits(cache):
        return model(input_ids=step, past_key_values=cache, use_cache=True).logits

    with torch.no_grad():
        want = next_logits(model(**first, use_cache=True).past_key_values)
        cache = model(**first, use_cache=True).past_key_values
        model(**other, use_cache=True)  # another prompt in between
        torch.testing.assert_close(next_logits(cache), want)
        strange = copy.deepcopy(model(**first, use_cache=True).past_key_values)
        with pytest.raises(RuntimeError, match="which this cache was not filled with"):
            next_logits(strange)
    with_graph = model(**first, use_cache=True).past_key_values
    torch.testing.assert_close(next_logits(with_graph), want)


def test_sequence_routers_and_other_ways_to_generate(tiny_llava, llava_batch):
    model = adapted(tiny_llava, gate="softmax", router_input="sequence")
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    want = model.generate(**llava_batch, **options)
    static = model.generate(**llava_batch, **options, cache_implementation="static")
    assert torch.equal(static, want)
    lookup = {name: t[:1] for name, t in llava_batch.items()}
    assert torch.equal(model.generate(**lookup, **options, prompt_lookup_num_tokens=2), want[:1])
    prompt = llava_batch["attention_mask"].bool()
    for more in ({"num_beams": 2}, {"use_cache": False}):
        plain = model.generate(**llava_batch, **options, **more)
        assert torch.equal(model.generate(**llava_batch, **options, **more, rode_prompt_mask=prompt), plain)
    assert torch.equal(plain, want)
    with pytest.raises(ValueError, match="do not fill the cache in pieces"):
        model.generate(**llava_batch, **options, prefill_chunk_size=3)


def test_a_prompt_that_cannot_be_told_is_an_error(tiny_llava, llava_batch):
    model = adapted(tiny_llava, gate="softmax", router_input="sequence").train()
    with pytest.raises(ValueError, match="pass labels or rode_prompt_mask"):
        model(**llava_batch)
    with pytest.raises(ValueError, match="a row has none: labels learn every token"):
        model(**llava_batch, labels=llava_batch["input_ids"].clamp(min=1))
    four = llava_batch["attention_mask"][:, None, None].bool().expand(-1, 1, 9, 9)
    model = adapted(tiny_llava, gate="expert-choice")
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(batch, tokens\)"):
        model(**{**llava_batch, "attention_mask": four})


def test_adapters_off_may_generate(tiny_llava, llava_batch):
    model = adapted(tiny_llava, gate="expert-choice")
    options = {"max_new_tokens": 2, "do_sample": False}
    with model.disable_adapter():
        off = model.generate(**llava_batch, **options)
    assert torch.equal(off, tiny_llava().eval().generate(**llava_batch, **options))


def test_normalised_experts_of_one_need_no_norm(tiny_llava, llava_batch):
    fields = {"ranks": (2, 3), "gate": "softmax", "norm_experts": True, "rank_pattern": {"v_proj": (4,)}}
    model = adapted(tiny_llava, **fields).train()
    model(**llava_batch, labels=llava_batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_capacity_is_not_rounded_up_by_accident():
    routed = expert_choice(torch.randn(1, 21, 7), None, 2.0)
    assert routed.open.sum(1).tolist() == [[6] * 7]  # ceil(21 * 2 / 7)
