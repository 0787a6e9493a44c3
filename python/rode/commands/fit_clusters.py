"""`rode fit-clusters CONFIG`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rode_food.commands.options import ParserOptions, Subparsers

if TYPE_CHECKING:
    from typing import Unpack

DESCRIPTION = """\
Group the training questions of a config into clusters, for an adapter with router_input: cluster (MoCLE).

A question's embedding is the mean of its tokens' input embeddings in the config's own language model, or with --encoder the mean
of the last hidden states of a sentence encoder; k-means (scikit-learn) finds the centres. Name the file in model.clusters.

example:
  rode fit-clusters configs/own-records.yaml --clusters 4 --out runs/clusters.safetensors
"""


def add_parser(commands: Subparsers, **options: Unpack[ParserOptions]) -> None:
    """Adds `rode fit-clusters`."""
    sub = commands.add_parser(
        "fit-clusters", help="group questions, for cluster routers", description=DESCRIPTION, **options
    )
    sub.set_defaults(run=run)
    sub.add_argument("config", metavar="CONFIG", help="YAML file")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change the config")
    sub.add_argument("--clusters", type=int, required=True, metavar="N", help="how many")
    sub.add_argument("--encoder", metavar="DIR", help="sentence encoder in place of the model's embeddings")
    sub.add_argument("--out", metavar="FILE", help="default: runs/clusters.safetensors")
    sub.add_argument("--seed", type=int, default=0, help="of k-means (default 0)")


def run(args: argparse.Namespace) -> int:
    from rode.training.clusters import FILE, Embedder, fit_clusters
    from rode.training.config import load_experiment
    from rode.vlm import load_vlm
    from rode.vlm.load import input_embeddings
    from rode_food.data_mixture import load_examples
    from rode_food.source import Source

    experiment = load_experiment(args.config, args.overrides)
    if args.clusters < 2:
        raise ValueError(f"--clusters: expected at least 2, got {args.clusters}")
    sources = [Source(**vars(source)) for source in experiment.data.sources]
    questions = [e.question for e in load_examples(sources, "train", wording="all").examples]
    m = experiment.model
    model, processor = load_vlm(m.path, dtype=m.dtype, device=m.device, attention=m.attention)
    embed = Embedder(processor.tokenizer, input_embeddings(model), args.encoder)
    clusters, ids = fit_clusters(questions, embed, args.clusters, args.seed)
    file = clusters.save(args.out or Path("runs") / FILE)
    for number in range(len(clusters)):
        members = [q for q, i in zip(dict.fromkeys(questions), ids, strict=True) if i == number]
        print(f"{number}: {len(members)} questions, such as: {' | '.join(members[:3])}")
    print(f"clusters in {file}")
    return 0
