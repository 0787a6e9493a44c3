"""Parameters that are held elsewhere and brought in by hooks: offloading, sharding, and modules to save; plain LoRA beside each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from rode import RodeConfig

TARGETS = ["q_proj", "v_proj", "up_proj"]
CONFIGS = {
    "relu": RodeConfig(ranks=(2, 4), target_modules=TARGETS, init_weights=False, dropout=0.0),
    "softmax": RodeConfig(
        ranks=(2, 4),
        gate="softmax",
        router_bias=True,
        target_modules=TARGETS,
        init_weights=False,
        dropout=0.0,
    ),
    "lora": LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False),
}
IDS = torch.arange(12).view(2, 6) % 32


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=32,
        )
    ).eval()


def adapted(name, **changes):
    torch.manual_seed(1)
    config = CONFIGS[name]
    return get_peft_model(llama(), type(config)(**{**config.to_dict(), **changes})).eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
def test_an_offloaded_model_computes_the_same(name, how, tmp_path):
    model = adapted(name)
    with torch.no_grad():
        want = model(IDS).logits
        if how == "cpu":
            cpu_offload(model, torch.device("cpu"))
        elif how == "disk":
            disk_offload(model, str(tmp_path), torch.device("cpu"))
        else:
            names = {
                name.split(".layers.")[1].split(".")[0]
                for name, _ in model.named_parameters()
                if ".layers." in name
            }
            places = {f"base_model.model.model.layers.{number}": "disk" for number in names}
            rest = ("embed_tokens", "norm", "rotary_emb")
            places |= {f"base_model.model.model.{part}": "cpu" for part in rest}
            dispatch_model(
                model, {**places, "base_model.model.lm_head": "cpu"}, main_device="cpu", offload_dir=tmp_path
            )
        assert torch.equal(model(IDS).logits, want)
    assert any(p.is_meta for n, p in model.named_parameters() if "layers.0" in n)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("module", ["norm", "router", "lin0"])
def test_modules_to_save_are_the_models_own(name, module, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
            self.router, self.lin0 = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.lin0(self.router(self.norm(self.up_proj(x))))

    torch.manual_seed(0)
    net = Net()
    config = CONFIGS[name]
    fields = {**config.to_dict(), "target_modules": ["up_proj"], "modules_to_save": [module]}
    model = get_peft_model(net, type(config)(**fields))
    x = torch.randn(3, 8)
    model(x).sum().backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "modules_to_save" in n} == {
        f"base_model.model.{module}.modules_to_save.default.{part}" for part in ("weight", "bias")
    }
    assert all(dict(model.named_parameters())[n].grad is not None for n in trained)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path)
    assert torch.equal(again(x), model.eval()(x))


def test_files_of_the_former_layout_load_to_the_same_bits(tmp_path):
    fields = dict(gate="threshold", router_bias=True)
    model = adapted("relu", **fields)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    former = {
        "A": "rode_A",
        "B": "rode_B",
        "router_weight": "rode_router",
        "router_bias": "rode_router_bias",
        "threshold_weight": "rode_threshold",
        "threshold_bias": "rode_threshold_bias",
    }
    tensors = load_file(file)
    names = {name: name.replace("rode_adapters.", "").rpartition(".") for name in tensors}
    save_file({f"{names[n][0]}.{former[names[n][2]]}": t for n, t in tensors.items()}, file)
    assert not any("rode_adapters" in name for name in load_file(file))
    with torch.no_grad():
        for low_memory in (False, True):
            again = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_memory).eval()
            assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CONFIGS)
def test_fsdp_with_flat_parameters_trains_as_without(name, one_rank):
    """PEFT's documentation asks for its own wrapping policy and use_orig_params=False."""
    model, other = adapted(name).train(), adapted(name).train()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    sharded = FullyShardedDataParallel(
        other,
        auto_wrap_policy=fsdp_auto_wrap_policy(other),
        use_orig_params=False,
        device_id=torch.device("cpu"),
    )
    got = sharded(IDS, labels=IDS).loss
    got.backward()
    assert torch.equal(got, loss)
    want = sorted(p.grad.abs().sum().item() for p in model.parameters() if p.requires_grad)
    assert sum(want) > 0
    total = sum(p.grad.abs().sum().item() for p in sharded.parameters() if p.requires_grad)
    assert total == pytest.approx(sum(want), rel=1e-6)


TWO_RANKS = """
import sys
sys.path.insert(0, {here!r})
import torch
import torch.distributed as dist
import test_placement as t
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, ShardingStrategy

dist.init_process_group("gloo")
for name in t.CONFIGS:
    whole, sharded = t.adapted(name).train(), t.adapted(name).train()
    sharded = FSDP(
        sharded,
        auto_wrap_policy=t.fsdp_auto_wrap_policy(sharded),
        use_orig_params=False,
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy.FULL_SHARD,
    )
    losses = []
    for model in (whole, sharded):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            loss = model(t.IDS, labels=t.IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[0] != losses[2]
    torch.testing.assert_close(losses[3:], losses[:3], rtol=1e-5, atol=0)
dist.destroy_process_group()
print("the same", flush=True)
"""


@pytest.mark.slow
def test_fsdp_of_two_ranks_shards_the_parameters_and_trains_as_one(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS.format(here=str(Path(__file__).parent)))
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("the same") == 2
