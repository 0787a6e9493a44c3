"""From examples to the side inputs that an adapter's router reads: the task of each row, or the cluster of its question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftConfig, PolyConfig
from torch import Tensor

from rode.training.clusters import FILE, Clusters, Embedder
from rode.tuner import RodeConfig
from rode.vlm.load import input_embeddings
from rode_food import TASKS

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from rode.vlm.load import Model

_MOST_KNOWN = 100_000  # questions whose clusters are remembered; a server is asked questions without end


class Routes:
    """Makes side inputs; nothing for an adapter that needs none.

    Args:
        config: the adapter's PEFT configuration, or None.
        clusters: for router_input "cluster". embed: texts to embeddings, with clusters.

    Raises:
        ValueError: the adapter has another number of tasks or clusters.
    """

    def __init__(
        self, config: PeftConfig | None, clusters: Clusters | None = None, embed: Embedder | None = None
    ) -> None:
        self.clusters, self.embed = clusters, embed
        self.task_input: str | None = None
        if isinstance(config, PolyConfig):
            self.task_input = "task_ids"  # PEFT's own name for them
            self._count("n_tasks", config.n_tasks)
        by_id = config.id_input if isinstance(config, RodeConfig) else None
        groups = config.aux_groups if isinstance(config, RodeConfig) else None
        ids = config.num_ids if isinstance(config, RodeConfig) else None
        self.reads_tasks = self.task_input is not None or by_id == "rode_task_ids"
        if by_id == "rode_task_ids" or groups is not None:
            self.task_input = "rode_task_ids"
            if by_id == "rode_task_ids":
                self._count("num_ids", ids)
            if groups is not None:
                self._count("aux_groups", len(groups))
        self.cluster_input = "rode_cluster_ids" if by_id == "rode_cluster_ids" else None
        if self.cluster_input is not None:
            if clusters is None or embed is None:
                raise ValueError(
                    "adapter: router_input 'cluster' reads the cluster of each question; name the file of `rode fit-clusters` in "
                    "model.clusters"
                )
            if len(clusters) != ids:
                raise ValueError(
                    f"adapter.num_ids: expected the {len(clusters)} clusters of the file, got {ids}"
                )
        self._known: dict[str, int] = {}  # cluster of each question seen

    @staticmethod
    def _count(name: str, count: int | None) -> None:
        if count != len(TASKS):
            raise ValueError(
                f"adapter.{name}: expected {len(TASKS)}, for the tasks {', '.join(TASKS)}; got {count}"
            )

    def __call__(self, tasks: Sequence[str | None], questions: Sequence[str]) -> dict[str, Tensor]:
        """Side inputs (rows,) int64 for rows with these tasks and questions.

        Raises:
            ValueError: a row without a task, where the router reads it.
        """
        inputs: dict[str, Tensor] = {}
        if self.task_input is not None and (self.reads_tasks or None not in tasks):
            if None in tasks:
                raise ValueError(
                    f"this adapter's router reads the task of a question: say which of {', '.join(TASKS)} it is (--task)"
                )
            if unknown := sorted(set(filter(None, tasks)) - set(TASKS)):
                raise ValueError(
                    f"this adapter's router knows the tasks {', '.join(TASKS)}, and got {unknown[0]!r}: leave it out of the "
                    "source's tasks"
                )
            inputs[self.task_input] = torch.tensor([TASKS.index(task) for task in tasks])
        if self.cluster_input is not None:
            assert self.clusters is not None, "checked when this was made"
            assert self.embed is not None, "checked when this was made"
            if len(self._known) > _MOST_KNOWN:
                self._known.clear()
            new = [q for q in dict.fromkeys(questions) if q not in self._known]
            if new:
                self._known.update(zip(new, self.clusters.ids(self.embed(new)).tolist(), strict=True))
            inputs[self.cluster_input] = torch.tensor([self._known[q] for q in questions])
        return inputs


def make_routes(
    config: PeftConfig | None, model: Model, processor: ProcessorMixin, clusters: str | Path | None = None
) -> Routes:
    """The routes of an adapter on a model; `clusters` is a file of `rode fit-clusters`, or a folder that may hold one."""
    if not isinstance(config, RodeConfig) or config.id_input != "rode_cluster_ids":
        return Routes(config)
    if clusters is None or (Path(clusters).is_dir() and not (Path(clusters) / FILE).is_file()):
        return Routes(config)  # says what is missing
    found = Clusters.load(clusters)
    return Routes(config, found, Embedder(processor.tokenizer, input_embeddings(model), found.encoder))
