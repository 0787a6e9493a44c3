"""Gemma 3: a picture's tokens see each other, and some layers look back a fixed distance only."""

from rode.vlm.families import Family

FAMILY = Family(
    packing="its attention is not causal alone: pictures see themselves whole, and layers look back a fixed distance"
)
