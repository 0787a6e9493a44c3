"""Registration with PEFT that does not import PEFT: `rode --help` and `rode data` start without torch.

`rode.tuner` registers the method when it is imported. A finder in front of `sys.meta_path` imports it as soon as somebody has
imported PEFT, so that `import rode` is enough, whichever of the two comes first.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_peft() -> None:
    """Registers "RODE" now if PEFT has been imported, else as soon as it is."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


def _register() -> None:
    """Imports `rode.tuner`, which registers. Versions are checked first: with another PEFT that import may fail."""
    from rode.versions import check_versions

    check_versions()
    import rode.tuner  # noqa: F401


class _AfterPeft(MetaPathFinder):
    """Finds PEFT as the other finders do, and has `rode.tuner` imported behind it. Used once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader = None if spec is None else spec.loader
        if loader is None:
            sys.meta_path.insert(0, self)  # PEFT is not installed yet
            return spec
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            try:
                execute(module)
            except BaseException:
                sys.meta_path.insert(0, self)  # the next try may succeed
                raise
            _register()

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
