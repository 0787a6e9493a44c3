"""A refusal of weights that are not finite."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def refuse_not_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Check saved weights before they are loaded.

    Args:
        state: the tensors by their names.
        where: the beginning of the message: which file or adapter.

    Raises:
        ValueError: a tensor holds a value that is not finite; names the first.
    """
    bad = [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    if bad:
        more = f" (and {len(bad) - 1} more tensors)" if len(bad) > 1 else ""
        raise ValueError(
            f"{where}: {bad[0]}{more} holds values that are not finite, so its training had failed and its answers would mean "
            "nothing; take an earlier checkpoint, or train anew"
        )
