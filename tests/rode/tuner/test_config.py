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


def test_unknown_field_is_refused():
    with pytest.raises(TypeError, match="rank"):
        RodeConfig(rank=8)
