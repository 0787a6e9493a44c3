"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a token has three positions, which count a picture's rows and columns."""

from rode.vlm.families import Family

FAMILY = Family(packing="its tokens have positions in three dimensions, which are counted along one question")
