"""Clusters of instructions, for routers that read them (MoCLE): fitted once by k-means, looked up for every question."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from rode.vlm.pretrained import from_pretrained
from rode_food.atomic import written_aside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "clusters.safetensors"


def clusters_beside(adapter: str | Path) -> Path | None:
    """The folder with the clusters of an adapter's questions: its own, or, for a checkpoint, the one above; None without any."""
    folders = (Path(adapter), Path(adapter).parent)
    return next((folder for folder in folders if (folder / FILE).is_file()), None)


class Embedder:
    """Texts to unit vectors.

    Args:
        tokenizer: of the model. table: its input embeddings (vocabulary, D), for encoder None.
        encoder: directory of a transformers encoder with its tokenizer, such as a sentence-transformers model; None for the table.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, table: Tensor, encoder: str | None = None) -> None:
        # on the CPU: workers of a data loader embed too
        self.tokenizer, self.table, self.encoder = tokenizer, table.detach().cpu(), encoder
        if encoder is not None:
            from transformers import AutoModel, AutoTokenizer

            if not (Path(encoder) / "config.json").is_file():
                raise FileNotFoundError(f"{encoder}: no encoder here (config.json is missing)")
            self.tokenizer = from_pretrained(AutoTokenizer, encoder)
            self.model = from_pretrained(AutoModel, encoder).eval()

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(texts, D) float32 on the CPU; each text apart, so that it does not depend on its neighbours."""
        rows = []
        for text in texts:
            ids = torch.tensor([self.tokenizer(text, add_special_tokens=self.encoder is not None).input_ids])
            if self.encoder is None:
                rows.append(F.embedding(ids, self.table).float().mean(1))
            else:
                rows.append(self.model(input_ids=ids).last_hidden_state.float().mean(1))
        return F.normalize(torch.cat(rows), dim=1)


@dataclass
class Clusters:
    """Centres of clusters.

    Attributes:
        centres: (C, D) float32. encoder: see `Embedder`.
    """

    centres: Tensor
    encoder: str | None = None

    def __len__(self) -> int:
        return len(self.centres)

    def ids(self, embeddings: Tensor) -> Tensor:
        """The nearest centre of each embedding (texts, D): int64 (texts,).

        Raises:
            ValueError: they are of another model.
        """
        if embeddings.shape[1] != self.centres.shape[1]:
            raise ValueError(
                f"clusters: fitted on embeddings of size {self.centres.shape[1]}, got {embeddings.shape[1]}; fit them again with "
                "this model (rode fit-clusters)"
            )
        return torch.cdist(embeddings, self.centres).argmin(1)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file (aside, then renamed); its path."""
        with written_aside(path) as aside:
            save_file({"centres": self.centres}, aside, metadata={"encoder": json.dumps(self.encoder)})
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Clusters:
        """Raises FileNotFoundError; ValueError for a file of something else."""
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no clusters here; `rode fit-clusters` writes them")
        with safe_open(file, "pt") as opened:
            if "centres" not in opened.keys():  # noqa: SIM118  (no mapping)
                raise ValueError(
                    f"{file}: expected clusters of `rode fit-clusters`, found {list(opened.keys())}"
                )
            return cls(opened.get_tensor("centres"), json.loads((opened.metadata() or {})["encoder"]))


def fit_clusters(
    texts: Iterable[str], embed: Embedder, count: int, seed: int = 0
) -> tuple[Clusters, list[int]]:
    """k-means over the texts, each distinct one weighted by how often it occurs.

    Returns:
        The clusters, and the cluster of each distinct text in the order of first occurrence.

    Raises:
        ImportError: without scikit-learn. ValueError: fewer distinct texts than clusters.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("clusters are fitted by scikit-learn: pip install 'rode[clusters]'") from error
    counts = Counter(texts)
    if len(counts) < count:
        raise ValueError(
            f"clusters: {count} of them want as many different questions, and there are {len(counts)}; ask for fewer, or set "
            "data.wording: random"
        )
    vectors = embed(list(counts))
    found = KMeans(count, n_init=10, random_state=seed).fit(
        vectors.double().numpy(), sample_weight=list(counts.values())
    )
    clusters = Clusters(torch.from_numpy(found.cluster_centers_).float().contiguous(), embed.encoder)
    return clusters, clusters.ids(vectors).tolist()
