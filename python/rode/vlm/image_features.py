"""Features that a frozen tower and projector make of a picture, stored once and used many times.

They serve any model with `get_image_features`.

The features go where the pixels went: `accept_image_features` makes `get_image_features` take them back, so that everything
after it stays transformers' code. LLaVA's tower is stored before its projector instead, see `rode.vlm.features`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import ProcessorMixin

from rode.vlm.families import family_of
from rode.vlm.features import FeatureSource, FeatureStore, PictureShape, PixelSource, digest_of
from rode.vlm.load import base_model, language_model
from rode.vlm.prompts import PromptEncoder, StoredPicture

if TYPE_CHECKING:
    from rode.vlm.load import Model

_DIMENSIONS = 8  # of stored features: no processor's pixels have as many


class _TakesImageFeatures(torch.nn.Module):
    """Mixed into a model's class: `pixel_values` of eight dimensions are what `get_image_features` gave before."""

    _takes: frozenset[str]
    """Names of what the method under this one takes."""
    _stored: _Kind

    def get_image_features(self, pixel_values: Any, *args: Any, **kwargs: Any) -> Any:
        if pixel_values is None or pixel_values.dim() != _DIMENSIONS:
            return super().get_image_features(pixel_values, *args, **kwargs)  # type: ignore[misc]
        kind = self._stored
        first, *deep = pixel_values.reshape(pixel_values.shape[: kind.dimensions]).chunk(
            1 + kind.deep, dim=-1
        )
        layers = [[layer] if kind.deep_listed else layer for layer in deep]
        more = {"deepstack_features": layers} if deep else {}
        return kind.output(pooler_output=[first] if kind.listed else first, **more)


@dataclass(frozen=True)
class _Kind:
    """The kind of thing that a model's `get_image_features` gives.

    Attributes:
        output: its class. listed: a tensor for each picture, in a list. dimensions: of the tensor, or of those joined.
        deep: how many further layers' features there are (Qwen3-VL's). deep_listed: whether those are lists.
    """

    output: type[Any]
    listed: bool
    dimensions: int
    deep: int
    deep_listed: bool


def accept_image_features(model: Model) -> None:
    """Let `pixel_values` be stored features. The model's class is extended, so that parameter names stay the checkpoint's."""
    inner = base_model(model).model
    if not isinstance(inner, _TakesImageFeatures):
        cls = type(inner)
        takes = frozenset(inspect.signature(cls.get_image_features).parameters)
        values = {"__module__": cls.__module__, "_takes": takes}
        inner.__class__ = type(cls.__name__, (_TakesImageFeatures, cls), values)


class ImageFeatureSource(FeatureStore):
    """Features of frozen tower and projector: `source(path)` gives a `StoredPicture`.

    Pictures are told apart by content. Each goes through the tower alone, so that what is stored depends on nothing else.

    Args:
        model: of any family with `get_image_features`; its tower and projector are frozen.
        processor: of the model.
        directory: where to keep the features, one safetensors file for each picture, in a folder named after weights and
            preprocessing; None keeps them in memory.
        shape: of pictures, see `rode.vlm.features.PixelSource`.

    Raises:
        ValueError: the model's family cannot have its features stored, and why.
    """

    def __init__(
        self,
        model: Model,
        processor: ProcessorMixin,
        directory: str | Path | None = None,
        shape: PictureShape = "processor",
    ) -> None:
        base = base_model(model)
        family = family_of(base)
        why = family.stored_features
        if why is None and not hasattr(base.model, "get_image_features"):
            why = "it has no get_image_features"
        if why is not None:
            raise ValueError(f"model.vision_features: expected live for {base.config.model_type!r}: {why}")
        accept_image_features(base)
        self.base: Any = base
        self.encoder: Any = PromptEncoder(processor, family=family)
        super().__init__(PixelSource(processor, shape), directory)
        self._features(Image.new("RGB", (56, 56)))  # to know of what kind they are

    def __getstate__(self) -> dict[str, Any]:  # a data-loader worker reads what is there, it runs no tower
        return {**self.__dict__, "base": None, "encoder": None}

    @property
    def computes(self) -> bool:
        return self.base is not None

    def _fingerprint(self) -> str:
        facts = [
            self.base.config.to_dict(),
            self.pictures.processor.image_processor.to_dict(),
            self.pictures.shape,
        ]
        text = {*language_model(self.base).parameters(), *self.base.get_output_embeddings().parameters()}
        weights = {name: tensor for name, tensor in self.base.named_parameters() if tensor not in text}
        return digest_of(facts, weights)

    @torch.inference_mode()
    def _features(self, picture: Image.Image) -> torch.Tensor:
        inner = self.base.model
        made = self.encoder.encode_prompt("?", [picture]).vision
        training = inner.training
        inner.eval()  # a frozen tower drops nothing
        out = inner.get_image_features(
            **{name: value.to(self.base.device) for name, value in made.items() if name in inner._takes},
            return_dict=True,
        )
        inner.train(training)
        pooled, deep = out.pooler_output, list(getattr(out, "deepstack_features", None) or [])
        listed = isinstance(pooled, (list, tuple))  # a tensor for each picture
        layers = [
            torch.cat(list(layer)) if isinstance(layer, (list, tuple)) else layer for layer in (pooled, *deep)
        ]
        features = torch.cat(layers, dim=-1)
        inner._stored = _Kind(
            type(out),
            listed,
            features.dim(),
            len(deep),
            any(isinstance(layer, (list, tuple)) for layer in deep),
        )
        return features.reshape(*features.shape, *[1] * (_DIMENSIONS - features.dim())).cpu()

    def _compute(self, path: str) -> dict[str, torch.Tensor]:
        picture = self.pictures(path)
        return {"features": self._features(picture).clone(), "size": torch.tensor(picture.size)}

    def _picture(self, stored: dict[str, torch.Tensor]) -> StoredPicture:
        width, height = stored["size"].tolist()
        return StoredPicture(stored["features"], (width, height))


def feature_source(
    model: Model,
    processor: ProcessorMixin,
    directory: str | Path | None = None,
    shape: PictureShape = "processor",
    *,
    projector_trained: bool = False,
    pool: int = 1,
) -> FeatureStore:
    """The store for a model's family.

    Args:
        model, processor, directory, shape: see `FeatureStore` and `PixelSource`.
        projector_trained: whether the projector is, behind which most families' features are taken.
        pool: see `rode.vlm.features.FeatureSource`.

    Raises:
        ValueError: the model's features cannot be stored, and why.
    """
    base = base_model(model)
    if base.config.model_type == "llava":
        return FeatureSource(model, processor, directory, shape, pool)
    if pool != 1:
        raise ValueError(
            f"model.picture_pool: expected 1 for {base.config.model_type!r}, got {pool}: only LLaVA's features are pooled"
        )
    if projector_trained:
        raise ValueError(
            f"model.vision_features: expected live for {base.config.model_type!r} with a trained projector: its features are "
            "stored behind the projector"
        )
    return ImageFeatureSource(model, processor, directory, shape)
