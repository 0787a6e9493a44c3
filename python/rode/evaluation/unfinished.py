"""The answers of an evaluation that has not ended: kept batch by batch, so that a killed one goes on where it was.

`predictions.partial.jsonl` begins with what was asked of which weights; each further line has the answers of one batch. Its name
says that it is no result. `gates.partial.json` has the sums of the gates up to some batch. Both go when the evaluation ends.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rode.evaluation import PARTIAL
from rode.training.lock import folder_lock
from rode_food import Example
from rode_food.atomic import write_json

GATES = "gates.partial.json"
_VALUES = 16  # of each parameter


def questions_digest(examples: Sequence[Example]) -> str:
    """SHA-256 of what is asked, of which pictures, in which order, and of the true answers."""
    digest = hashlib.sha256()
    for e in examples:
        asked = [e.record_id, e.source, e.task, e.question, list(e.images), e.answer, e.reference]
        digest.update(
            json.dumps(asked, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass") + b"\n"
        )
    return digest.hexdigest()


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes and shapes of a model's parameters, and of some values of each."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        if not p.is_meta and p.numel():
            flat = p.detach().reshape(-1)
            at = torch.arange(_VALUES, device=flat.device) * max(1, flat.numel() // _VALUES) % flat.numel()
            digest.update(flat[at].cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Unfinished:
    """The file of one evaluation's answers so far.

    Attributes:
        answers: of the batches that are kept, in the order in which questions are asked.
        gates: the state of the gate statistics after them, or None.
    """

    def __init__(self, directory: Path, run: dict[str, Any], resume: bool, with_gates: bool) -> None:
        self.file, self.gates_file = directory / PARTIAL, directory / GATES
        self.answers: list[str] = []
        self.gates: dict[str, Any] | None = None
        self._batches = 0
        lines = self.file.read_bytes().splitlines(keepends=True) if self.file.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # the last one may be torn
        end = 0
        if len(whole) > 1:  # there are answers
            if not resume:
                raise FileExistsError(
                    f"{self.file}: an evaluation stopped here before its end; --resume goes on with it, or remove the file to "
                    "begin anew"
                )
            end = self._take(whole, run, with_gates)
        self._opened = self.file.open("r+b" if self.file.exists() else "w+b")
        self._opened.truncate(end)
        self._opened.seek(end)
        if not end:
            self.gates_file.unlink(missing_ok=True)
            self._write(run)

    def _take(self, whole: list[bytes], run: dict[str, Any], with_gates: bool) -> int:
        """Takes the answers from the file's whole lines, and gives the number of bytes that they were."""
        begun = json.loads(whole[0])
        differs = sorted(key for key in run.keys() | begun.keys() if run.get(key) != begun.get(key))
        if differs:
            raise ValueError(
                f"{self.file}: the evaluation that stopped here had other {', '.join(differs)}; evaluate with the same, write to "
                "another folder, or remove the file to begin anew"
            )
        batches = [json.loads(line)["answers"] for line in whole[1:]]
        if with_gates:
            try:
                state = json.loads(self.gates_file.read_bytes())
            except FileNotFoundError:
                state = {"batches": 0, "sums": None}
            batches, self.gates = batches[: state["batches"]], state["sums"]
        self.answers = [text for batch in batches for text in batch]
        self._batches = len(batches)
        return sum(map(len, whole[: 1 + len(batches)]))

    def add(self, answers: Sequence[str], gates: dict[str, Any] | None) -> None:
        """Keeps one more batch. Raises OSError, with the file named."""
        self._write({"answers": list(answers)})
        self._batches += 1
        if gates is not None:
            write_json(self.gates_file, {"batches": self._batches, "sums": gates})

    def _write(self, value: Any) -> None:
        try:
            self._opened.write(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            self._opened.flush()
            os.fsync(self._opened.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.file)) from error

    def close(self) -> None:
        """Keeps the files, to go on with them."""
        self._opened.close()

    def remove(self) -> None:
        """Removes the files: the results are written."""
        self.close()
        self.file.unlink(missing_ok=True)
        self.gates_file.unlink(missing_ok=True)


@contextmanager
def unfinished(
    directory: str | os.PathLike[str], run: dict[str, Any], *, resume: bool, with_gates: bool
) -> Iterator[Unfinished]:
    """The file of an evaluation's answers, held against other processes; removed when the block ends well.

    Args:
        directory: where results go; made if need be.
        run: what must be the same for the answers to be the same, as JSON values.
        resume: go on with what is there, if anything is.
        with_gates: go on only as far as the gates were counted.

    Raises:
        FileExistsError: an evaluation stopped there before, and `resume` was not asked for.
        ValueError: it stopped with another `run`.
        BlockingIOError: another process evaluates into this folder.
    """
    directory = Path(directory)
    with folder_lock(directory):
        kept = Unfinished(directory, run, resume, with_gates)
        try:
            yield kept
        except BaseException:
            kept.close()
            raise
        kept.remove()
