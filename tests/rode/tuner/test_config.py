"""RodeConfig: what it refuses, what it keeps."""

from __future__ import annotations

import dataclasses
import json

import pytest
from peft import PeftConfig

from rode.tuner import RodeConfig


def test_defaults_are_the_papers():
    config = RodeConfig()
    assert config.ranks == (2, 4, 8, 16)
    assert config.expert_scaling(config.ranks, config.alpha) == (8.0, 4.0, 2.0, 1.0)
    assert (config.alpha, config.dropout, config.gate, config.router_bias) == (16.0, 0.05, "relu", False)


def test_every_field_has_a_help_line():
    assert all(field.metadata.get("help") for field in dataclasses.fields(RodeConfig))


def test_json_round_trip_keeps_every_field(tmp_path):
    config = RodeConfig(
        ranks=[3, 1],
        alpha=7,
        dropout=0.25,
        target_modules=["v_proj", "q_proj"],
        exclude_modules=["layers.0.self_attn.q_proj"],
        gate="softmax",
        router_bias=True,
        router_init="normal",
        scaling=[0.5, 2],
        rank_pattern={"v_proj": [4, 4]},
        alpha_pattern={"q_proj": 3},
        layers_to_transform=[0, 2],
        layers_pattern="layers",
        modules_to_save=["lm_head"],
        init_weights=False,
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is RodeConfig
    assert loaded == config
    assert loaded.rank_pattern == {"v_proj": (4, 4)}
    assert loaded.scaling == (0.5, 2.0)
    first = (tmp_path / "adapter_config.json").read_text()
    assert json.loads(first)["target_modules"] == ["q_proj", "v_proj"]
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").read_text() == first


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"ranks": ()}, TypeError, "ranks: expected one rank per expert"),
        ({"ranks": 8}, TypeError, "ranks: expected one rank per expert"),
        ({"ranks": (4, 0)}, ValueError, "ranks: expected positive whole numbers, got 0"),
        ({"ranks": (4, 2.5)}, ValueError, "got 2.5"),
        ({"ranks": (True,)}, ValueError, "got True"),
        ({"alpha": 0}, ValueError, "alpha: expected a positive number, got 0"),
        ({"alpha": float("nan")}, ValueError, "alpha"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected a number in \[0, 1\), got 1.0"),
        ({"gate": "top1"}, ValueError, "gate: expected one of 'relu', 'softmax', 'topk', 'sigmoid'"),
        ({"router_init": "zeros"}, ValueError, "router_init: expected one of"),
        ({"router_init": "open"}, ValueError, "router_bias=True"),
        (
            {"router_init": "open", "router_bias": True, "gate": "softmax"},
            ValueError,
            "got gate='softmax'",
        ),
        ({"gate": "none", "router_bias": True}, ValueError, "no router"),
        ({"gate": "none", "router_init": "normal"}, ValueError, "no router"),
        ({"scaling": "alpha"}, ValueError, "scaling: expected one of 'alpha/r'"),
        ({"scaling": (1.0, 2.0)}, ValueError, "got 2 for the 4 experts of ranks"),
        (
            {"scaling": (1.0,) * 4, "rank_pattern": {"q_proj": (1,)}},
            ValueError,
            r"got 4 for the 1 experts of rank_pattern\[.q_proj.\]",
        ),
        ({"rank_pattern": [2]}, TypeError, "rank_pattern: expected a mapping"),
        ({"rank_pattern": {"q(": (2,)}}, ValueError, "not a regular expression"),
        ({"alpha_pattern": {"q": -1}}, ValueError, r"alpha_pattern\['q'\]: expected a positive number"),
        ({"target_modules": "q_proj("}, ValueError, "target_modules: .* is not a regular expression"),
        ({"target_modules": [""]}, TypeError, "target_modules: expected module names"),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": [0]},
            ValueError,
            "layers_to_transform selects among names",
        ),
        ({"layers_pattern": "layers"}, ValueError, "set both or neither"),
    ],
)
def test_bad_fields_are_named(fields, error, words):
    with pytest.raises(error, match=words):
        RodeConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"router_input": "image"}, "router_input: expected one of 'token', 'sequence', 'task'"),
        ({"gate": "none", "router_input": "task", "num_ids": 2}, "router_input: gate='none' has no router"),
        ({"gate": "none", "aux_loss": "l1"}, "aux_loss: gate='none' has no router"),
        ({"router_input": "task"}, "say how many tasks there are in num_ids"),
        ({"router_input": "cluster"}, "how many clusters"),
        ({"num_ids": 3}, "num_ids: router_input='token' reads no ids"),
        (
            {"router_input": "constant", "embedding_dim": 3},
            "embedding_dim: router_input='constant' reads no ids",
        ),
        ({"num_ids": 0}, "num_ids: expected a positive whole number, got 0"),
        ({"router_input": "task", "num_ids": 2, "router_bias": True}, "a table of logits, which is all bias"),
        ({"gate": "topk"}, "say how many experts each token gets in top_k"),
        ({"gate": "topk", "top_k": 5}, "top_k: expected at most the 4 routed experts, got 5"),
        ({"gate": "topk", "top_k": 4, "universal_expert": True}, "at most the 3 routed experts"),
        ({"gate": "topk", "top_k": 1, "normalize": True, "scale_by_gate": False}, "set one of them"),
        ({"top_k": 1}, "top_k: gate='relu' chooses no k experts, so it must stay None; got 1"),
        ({"scale_by_gate": False}, "scale_by_gate: gate='relu' chooses no k"),
        ({"temperature": 0.5}, "temperature: gate='relu' divides by no temperature"),
        ({"gate": "softmax", "temperature": 0}, "temperature: expected a positive number, got 0"),
        ({"gate": "softmax", "normalize": True}, "normalize: gate='softmax' is not normalised afterwards"),
        ({"normalize": 1}, "normalize: expected True or False, got 1"),
        ({"max_threshold": 0.1}, "max_threshold: gate='relu' has no threshold"),
        (
            {"gate": "threshold", "router_input": "task", "num_ids": 2},
            "learns a threshold for each token, got router_input='task'",
        ),
        ({"gate": "expert-choice", "router_input": "sequence"}, "experts choose among tokens"),
        ({"capacity": 2}, "capacity: gate='relu' has no capacity"),
        ({"universal_expert": True}, "universal_expert: its gate is 1 minus the largest"),
        (
            {"gate": "softmax", "universal_expert": True, "ranks": (4, 4)},
            "needs two routed experts beside it",
        ),
        (
            {"gate": "topk", "top_k": 1, "scale_by_gate": False, "universal_expert": True},
            "its gate would always be 0",
        ),
        ({"gate": "topk", "top_k": 1, "normalize": True, "universal_expert": True}, "top-1 gate is always 1"),
        ({"gate": "topk", "top_k": 1, "scale_by_gate": False}, "it would never learn"),
        (
            {"gate": "topk", "top_k": 1, "scale_by_gate": False, "aux_loss": "importance"},
            "leaves the router to aux_loss='load-balance' alone, got aux_loss='importance'",
        ),
        ({"router_input": "constant", "router_per": "block"}, "shares what is computed from an input"),
        ({"shared_A": True}, r"shared_A: experts that share A have its rank, got ranks=\(2, 4, 8, 16\)"),
        (
            {"shared_A": True, "ranks": (2, 2), "rank_pattern": {"v_proj": (1, 2)}},
            r"got rank_pattern\['v_proj'\]=\(1, 2\)",
        ),
        (
            {"norm_experts": True, "gate": "softmax", "router_input": "constant"},
            "normalised activations are no matrix",
        ),
        ({"combine": "factors", "ranks": (2, 2)}, "router_input='token' has gates for each token"),
        (
            {"combine": "factors", "router_input": "task", "num_ids": 2},
            "averages matrices of one shape, got ranks",
        ),
        (
            {"combine": "factors", "router_input": "task", "num_ids": 2, "ranks": (2, 2), "shared_A": True},
            "goes with none of shared_A",
        ),
        (
            {
                "combine": "factors",
                "router_input": "task",
                "num_ids": 2,
                "ranks": (2, 2),
                "scaling": (1.0, 2.0),
            },
            "one scaling for the averaged pair",
        ),
        ({"expert_per": "block"}, "it needs gate='topk', normalize=True"),
        ({"aux_weight": 0.1}, "aux_weight: aux_loss='none'"),
        ({"aux_loss": "load-balance"}, "balances a softmax, got gate='relu'"),
        ({"aux_loss": "l1", "gate": "softmax"}, "closes gates that nothing else bounds, got gate='softmax'"),
        ({"aux_loss": "l1", "aux_weight": -1}, "aux_weight: expected a number >= 0, got -1"),
        ({"target_sparsity": 0.5}, "target_sparsity steers aux_loss='l1' on relu gates"),
        ({"aux_loss": "l1", "target_sparsity": 1.5}, "expected a share between 0 and 1, got 1.5"),
        ({"aux_loss": "l1", "target_sparsity": 0.5, "aux_weight": 0}, "0 stays 0; start above 0"),
        ({"aux_groups": (0, 1)}, "aux_groups: aux_loss='none' has no groups"),
        ({"aux_loss": "importance", "aux_groups": (0, 2)}, r"expected 0 or 1 for each task, got \(0, 2\)"),
        ({"aux_loss": "importance", "aux_delta": 0.2}, "without aux_groups"),
        (
            {"aux_loss": "importance", "aux_groups": (0, 1), "aux_delta": 2},
            r"aux_delta: expected a number in \[0, 1\]",
        ),
        (
            {"aux_loss": "importance", "aux_groups": (0, 1), "router_input": "task", "num_ids": 3},
            "one for each of 3 tasks, got 2",
        ),
    ],
)
def test_combinations_that_make_no_sense_are_refused_with_the_reason(fields, words):
    with pytest.raises((TypeError, ValueError), match=words):
        RodeConfig(**fields)


def test_whole_numbers_of_numpy_are_saved(tmp_path):
    np = pytest.importorskip("numpy")
    RodeConfig(gate="topk", top_k=np.int64(2)).save_pretrained(tmp_path)
    assert RodeConfig.from_pretrained(tmp_path).top_k == 2


def test_unknown_field_is_refused():
    with pytest.raises(TypeError, match="rank"):
        RodeConfig(rank=8)
