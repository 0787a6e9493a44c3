"""Mllama: text reads pictures by cross-attention, whose mask has a row for each token."""

from rode.vlm.families import Family

_WHY = "its text reads pictures by cross-attention and has no tokens of theirs"
FAMILY = Family(packing=_WHY, stored_features=_WHY)
