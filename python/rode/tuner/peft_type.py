"""The name under which PEFT knows the method.

`peft.PeftType` is a closed enum, but PEFT and transformers only ever use a type as a dictionary key, compare it, print it and read
`.value`. A str with those manners registers without changing PEFT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from peft import PeftType


class _RodeType(str):
    """A str that behaves as a member of `peft.PeftType`."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str.__str__(self)

    @property
    def name(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"

    def __repr__(self) -> str:
        return f"<PeftType.{self.value}: {self.value!r}>"

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.value,)


RODE = cast("PeftType", _RodeType("RODE"))
