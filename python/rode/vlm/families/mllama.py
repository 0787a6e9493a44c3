"""Mllama: text reads pictures by cross-attention, whose mask has a row for each token."""

from rode.vlm.families import Family

FAMILY = Family(packing="its text reads pictures by cross-attention and has no tokens of theirs to share")
