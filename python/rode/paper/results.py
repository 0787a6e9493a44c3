"""The result of a run: one small JSON file for each variant and seed, meant to be kept and compared."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rode.training.config import ConfigError, Experiment, adapter_config, with_new_names
from rode_food.settings import assign, build
from rode_food.shards.index import open_shards

Result = dict[str, Any]
PACKAGES = ("rode", "torch", "transformers", "peft")
LOSSES = 200
"""Points of the loss kept at most."""
OF_A_RUN = frozenset({"name", "training.seed", "output_dir"})
"""What runs of one table may differ in, besides their adapters."""


def result_path(results: Path, base: str, variant: str, seed: int) -> Path:
    return results / base / variant / f"seed-{seed}.json"


def differences(now: Mapping[str, Any], then: Mapping[str, Any], ignore: Collection[str] = ()) -> list[str]:
    """ "key.sub: 20 (was 30)" for everything in which two nested mappings differ, but for the keys to ignore."""

    def flat(values: Any, prefix: str = "") -> dict[str, Any]:
        if prefix in ignore:
            return {}
        if not isinstance(values, Mapping) or not values:
            return {prefix: values}
        out: dict[str, Any] = {}
        for key, value in values.items():
            out |= flat(value, f"{prefix}.{key}" if prefix else str(key))
        return out

    a, b = flat(now), flat(then)
    missing = object()

    def said(value: Any) -> str:
        return "nothing" if value is missing else json.dumps(value, ensure_ascii=False)

    pairs = [(key, a.get(key, missing), b.get(key, missing)) for key in dict.fromkeys([*a, *b])]
    return [
        f"{key}: {said(x)} (was {said(y)})" for key, x, y in pairs if x is missing or y is missing or x != y
    ]


def plain(experiment: Experiment) -> dict[str, Any]:
    """A config as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(experiment)))


def settings(experiment: dict[str, Any], data: Mapping[str, str]) -> dict[str, Any]:
    """A recorded config for comparison, without its adapter: keys that came later at their defaults, and for files of records
    and the vocabulary their hashes, for what they hold counts and not where they lie."""
    try:
        experiment = plain(build(Experiment, with_new_names(experiment, say=False)))
    except ConfigError:  # keys that are no more show as a difference
        experiment = json.loads(json.dumps(experiment))
    experiment.pop("adapter", None)
    for source in experiment["data"]["sources"]:
        source["path"] = data.get(source["path"], source["path"])
    vocabulary = experiment["evaluation"].get("vocabulary")
    experiment["evaluation"]["vocabulary"] = data.get(vocabulary, vocabulary)
    return experiment


def adapter_differences(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """`differences` of two recorded configs' adapters; a default is the same whether it is written out or not."""
    if now["adapter"] == then["adapter"]:
        return []
    try:
        pair = [
            adapter_values(build(Experiment, with_new_names(experiment, say=False)))
            for experiment in (now, then)
        ]
    except ConfigError:  # keys that are no more
        pair = [now["adapter"], then["adapter"]]
    return [f"adapter.{text}" for text in differences(*pair)]


def adapter_values(experiment: Experiment) -> dict[str, Any]:
    """The adapter's whole configuration as JSON gives it back."""
    from peft import PeftConfig

    config = adapter_config(experiment)
    values = config.to_dict() if isinstance(config, PeftConfig) else dataclasses.asdict(config)
    return json.loads(json.dumps(values, default=str))


def file_hash(path: str, what: str = "file of records", key: str = "data.sources.0.path") -> str:
    """SHA-256 of a file that a config names; the pictures that records name are not read. For a
    folder of shards it is the hash of its shards' digests, pictures included.

    Args:
        what, key: for the error: what the file is, and the config's key that names it.

    Raises:
        FileNotFoundError: naming the override that mends it. ShardError: for a folder of no or damaged shards.
    """
    if Path(path).is_dir():
        return hashlib.sha256(
            " ".join(shard.sha256 for shard in open_shards(path).shards).encode()
        ).hexdigest()
    try:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        return digest.hexdigest()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such {what}; {key}=FILE or --base CONFIG names another"
        ) from None


def _versions() -> dict[str, str | None]:
    out: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            out[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            out[package] = None
    return out


def _gates(path: Path) -> dict[str, Any] | None:
    """Means by block and expert from an evaluation's gates.json, by kind of token; None if there is none."""
    if not path.is_file():
        return None
    from rode.tuner import GateReport, LayerGates

    layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
    report = GateReport(tuple(LayerGates(**layer) for layer in layers))

    def rounded(rows: list[list[float | None]]) -> list[list[float | None]]:
        return [[None if value is None else float(f"{value:.5g}") for value in row] for row in rows]

    out: dict[str, Any] = {}
    for kind in ("all", "image", "text"):
        blocks, means = report.heat_map("mean_gate", kind)
        opens = report.heat_map("open_rate", kind)[1]
        out[kind] = {"blocks": blocks, "mean_gate": rounded(means), "open_rate": rounded(opens)}
    return out


def _losses(history: list[dict[str, Any]]) -> list[list[float | None]]:
    """[step, loss] from Trainer's log, thinned evenly; the last one stays. JSON has no NaN: null stands for it."""
    points = [[entry["step"], entry["loss"]] for entry in history if "loss" in entry]
    every = max(1, math.ceil(len(points) / LOSSES))
    kept = points[::-1][::every][::-1]
    return [[step, float(f"{loss:.5g}") if math.isfinite(loss) else None] for step, loss in kept]


def collect(
    experiment: Experiment, base: str, data: Mapping[str, str], commands: list[dict[str, Any]]
) -> Result:
    """The result of a run from what training and evaluation left in its folder.

    Args:
        experiment: what was run.
        base: name of the config below the variant.
        data: file of records, or vocabulary -> hash.
        commands: {"command", "seconds", "exit_code"} of each process that the run took, failed ones too.
    """
    folder = experiment.run_dir

    def read(name: str) -> Any:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    training = read("training.json")
    return {
        "variant": experiment.name,
        "base": base,
        "seed": experiment.training.seed,
        "metrics": read("evaluation/metrics.json")["all"],
        **{key: training["metrics"][key] for key in ("trainable_parameters", "steps", "examples")},
        "seconds": round(sum(entry["seconds"] for entry in commands), 1),
        "commands": commands,
        "machine": training["machine"],
        "versions": _versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "adapter": adapter_values(experiment),
        "config": plain(experiment),
        "data": dict(data),
        "loss": _losses(read("history.json")),
        "gates": _gates(folder / "evaluation" / "gates.json"),
    }


def read_result(path: Path) -> Result:
    """Raises ValueError for what is no result, naming the file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if "recipe" in result:  # the key's name in older results
            result["config"] = result.pop("recipe")
        if not all(isinstance(result[key], dict) for key in ("metrics", "config", "data")):
            raise TypeError
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path}: not a result of `rode reproduce`; move it away") from None
    return result


def read_results(
    results: Path, base: str, variants: Iterable[str], seeds: Collection[int] | None = None
) -> dict[str, list[Result]]:
    """Variant -> what is there, by seed; variants with nothing have an empty list. `seeds` None takes all."""
    out: dict[str, list[Result]] = {}
    for variant in variants:
        found = [read_result(path) for path in (results / base / variant).glob("seed-*.json")]
        found = [result for result in found if seeds is None or result["seed"] in seeds]
        out[variant] = sorted(found, key=lambda result: result["seed"])
    return out


def incomparable(results: Mapping[str, list[Result]], swept: Iterable[str] = ()) -> list[str]:
    """A line for each result that was made otherwise than the first one (or, in its adapter, than its variant's first).

    Args:
        results: variant -> its results.
        swept: keys of the config in which variants are meant to differ.
    """
    every = [result for found in results.values() for result in found]
    lines = []
    for result in every:
        first, mine = every[0], results[result["variant"]][0]
        now, then = (settings(r["config"], r["data"]) for r in (result, first))
        for key in swept:
            for experiment in (now, then):
                assign(experiment, key, None, key)
        found = differences(now, then, OF_A_RUN) + adapter_differences(result["config"], mine["config"])
        if found:
            lines.append(
                f"{result['variant']} seed {result['seed']} was not run as {first['variant']} seed {first['seed']} was: "
                + "; ".join(found)
            )
    return lines
