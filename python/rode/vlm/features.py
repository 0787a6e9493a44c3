"""Pictures for a model, and features that the frozen vision tower makes of a picture, computed once and used many times.

The tower's hidden states go where the pixels went: `accept_features` makes the tower take a tensor of three dimensions
for its own output, so that everything after it (choice of layer, CLS token, projector) stays transformers' code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_outputs import BaseModelOutputWithPooling

from rode.vlm.images import open_image, pad_to_square
from rode.vlm.load import base_model
from rode.vlm.prompts import Features, StoredPicture
from rode_food.atomic import written_aside
from rode_food.images import open_picture
from rode_food.progress import Progress

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import ProcessorMixin

    from rode.vlm.load import Model

logger = logging.getLogger(__name__)


class _TakesFeatures(torch.nn.Module):
    """Mixed into a tower's class: `pixel_values` of three dimensions are the hidden states that were asked for."""

    _feature_layers: int | list[int]

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        if pixel_values is None or pixel_values.dim() != 3:
            return super().forward(pixel_values, **kwargs)
        layers = self._feature_layers
        states = [pixel_values] if isinstance(layers, int) else pixel_values.chunk(len(layers), dim=-1)
        keys = [layers] if isinstance(layers, int) else layers
        # Indexed like the usual tuple of hidden states, at the layers that LLaVA reads and nowhere else.
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1],
            hidden_states=cast("tuple[torch.Tensor, ...]", dict(zip(keys, states, strict=True))),
        )


def accept_features(model: Model) -> None:
    """Let `pixel_values` of a LLaVA be (batch, tower tokens, hidden x layers) hidden states instead of pictures.

    The class of the tower is extended rather than the tower wrapped: parameter names stay those of the checkpoint.
    """
    tower = base_model(model).model.vision_tower
    if isinstance(tower, _TakesFeatures):
        return
    tower._feature_layers = model.config.vision_feature_layer
    cls = type(tower)
    # torch looks up `forward` on the class; a subclass under the old name keeps repr and config lookups as they were.
    tower.__class__ = type(cls.__name__, (_TakesFeatures, cls), {"__module__": cls.__module__})


PictureShape = Literal["processor", "pad"]


class PixelSource:
    """Pictures from files: `source(path)` gives an RGB picture, which the processor makes ready.

    Args:
        processor: of the model.
        shape: "processor" leaves the picture to it; "pad" makes it a square first, with the processor's mean colour on both
            sides, as LLaVA-1.5 does. (Its processor's centre crop cuts off what is outside of the middle square.)
    """

    def __init__(self, processor: ProcessorMixin, shape: PictureShape = "processor") -> None:
        self.processor, self.shape = processor, shape
        mean = getattr(processor.image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
        self.colour = tuple(int(255 * channel) for channel in mean)

    def __call__(self, path: str) -> Image:
        return self.shaped(open_image(path))

    def shaped(self, image: Image) -> Image:
        """The picture, a square if that is asked for."""
        return pad_to_square(image, self.colour) if self.shape == "pad" else image

    def pixels(self, path: str) -> torch.Tensor:
        """The picture as a tower of fixed size takes it: float32 (3, H, W)."""
        return self.pixels_of(self(path))

    def pixels_of(self, image: Image) -> torch.Tensor:
        """The same of a picture in its shape."""
        made = self.processor.image_processor(images=image, return_tensors="pt")
        pixels: torch.Tensor = made["pixel_values"][0]
        return pixels


def digest_of(facts: Sequence[Any], weights: Mapping[str, torch.Tensor]) -> str:
    """32 hexadecimal digits that change with the facts (JSON-able, or by their text) and with any weight."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


class FeatureStore(ABC):
    """Features of pictures, in memory or on disk: `source(path)` gives the picture's.

    Pictures are told apart by content, so a file changed in place is computed anew. One picture goes through the tower
    at a time: what is stored does not depend on what else was in a batch.

    Args:
        pictures: where they come from.
        directory: where to keep the features, one safetensors file for each picture, in a folder named after weights and
            preprocessing; None keeps them in memory.
    """

    def __init__(self, pictures: PixelSource, directory: str | Path | None) -> None:
        self.pictures = pictures
        self.directory = None if directory is None else Path(directory) / self._fingerprint()
        self._by_path: dict[str, str] = {}  # path -> digest of the file
        self._stored: dict[str, dict[str, torch.Tensor]] = {}  # digest -> tensors

    @property
    @abstractmethod
    def computes(self) -> bool:
        """Whether the tower is at hand; in a data-loader worker it is not."""

    @abstractmethod
    def _fingerprint(self) -> str:
        """Digest of everything that a picture's features depend on but the picture."""

    @abstractmethod
    def _compute(self, path: str) -> dict[str, torch.Tensor]:
        """The picture's tensors, to be stored."""

    @abstractmethod
    def _picture(self, stored: dict[str, torch.Tensor]) -> Features | StoredPicture:
        """Stored tensors as rows take them."""

    def precompute(self, paths: Iterable[str], progress: bool = True) -> int:
        """See to it that every picture's features are at hand; the number that had to be computed."""
        computed = 0
        unique = list(dict.fromkeys(paths))
        for path in Progress(unique, desc="vision features", unit="picture", show=progress):
            with open_picture(path) as file:
                key = hashlib.sha256(file.read()).hexdigest()
            self._by_path[path] = key
            if self.directory is None:
                if key not in self._stored:
                    self._stored[key] = self._compute(path)
                    computed += 1
            elif not (stored := self.directory / f"{key}.safetensors").exists():
                with written_aside(stored) as aside:
                    save_file({name: t.contiguous() for name, t in self._compute(path).items()}, aside)
                computed += 1
        return computed

    def __call__(self, path: str) -> Any:
        if path not in self._by_path:
            if not self.computes:
                raise KeyError(
                    f"{path}: its features were not computed before the data-loader workers started"
                )
            self.precompute([path], progress=False)
        key = self._by_path[path]
        if self.directory is None:
            return self._picture(self._stored[key])
        return self._picture(load_file(self.directory / f"{key}.safetensors"))


def pooled(states: torch.Tensor, size: int, skipped: int) -> torch.Tensor:
    """The means of squares of size x size patches.

    Args:
        states: (tower tokens, hidden) of a square picture, patches row by row.
        size: 1 leaves the states as they are.
        skipped: so many tokens in front (CLS) are no patches, and stay.

    Raises:
        ValueError: the patches cannot be cut into such squares.
    """
    if size == 1:
        return states
    front, patches = states[:skipped], states[skipped:]
    side = math.isqrt(len(patches))
    if side * side != len(patches) or side % size:
        raise ValueError(
            f"model.picture_pool: expected a divisor of the patches on a side of a square picture, got {size} for "
            f"{len(patches)} patches"
        )
    squares = patches.reshape(side // size, size, side // size, size, -1)
    return torch.cat([front, squares.float().mean((1, 3)).to(states.dtype).flatten(0, 1)])


class FeatureSource(FeatureStore):
    """Hidden states of a LLaVA's frozen tower: `source(path)` gives `Features` with (tower tokens, hidden x layers).

    They are those before the projector, which may be trained.

    Args:
        model: the LLaVA (its `vision_tower` is used; nothing of it is kept but the tower).
        processor: its processor.
        directory: see `FeatureStore`.
        shape: of pictures, see `PixelSource`.
        pool: squares of so many by so many patches are replaced by their mean, before the projector.

    Raises:
        ValueError: the patches of a picture cannot be cut into such squares.
    """

    def __init__(
        self,
        model: Model,
        processor: ProcessorMixin,
        directory: str | Path | None = None,
        shape: PictureShape = "processor",
        pool: int = 1,
    ) -> None:
        accept_features(model)
        self.llava: Any = base_model(model)
        self.crop_cls = self.llava.config.vision_feature_select_strategy == "default"
        self.pool = pool
        super().__init__(PixelSource(processor, shape), directory)

    def __getstate__(self) -> dict[str, Any]:  # a data-loader worker reads what is there, it runs no tower
        return {**self.__dict__, "llava": None}

    @property
    def computes(self) -> bool:
        return self.llava is not None

    def _fingerprint(self) -> str:
        tower = self.llava.model.vision_tower
        facts = [
            tower.config.to_dict(),
            self.llava.config.vision_feature_layer,
            self.pictures.processor.image_processor.to_dict(),
        ]
        if self.pictures.shape != "processor":
            facts.append(self.pictures.shape)
        if self.pool != 1:
            facts.append({"pool": self.pool})
        return digest_of(facts, tower.state_dict())

    def _compute(self, path: str) -> dict[str, torch.Tensor]:
        return {"states": self.states(self.pictures.pixels(path))}

    @torch.inference_mode()
    def states(self, pixels: torch.Tensor) -> torch.Tensor:
        """The tower's hidden states (tower tokens, hidden x layers) of one picture's (3, H, W)."""
        tower = self.llava.model.vision_tower
        layers = self.llava.config.vision_feature_layer
        pixels = pixels.unsqueeze(0).to(next(tower.parameters()).device)
        training = tower.training
        tower.eval()  # a frozen tower drops nothing
        states = tower(pixels, output_hidden_states=True).hidden_states
        tower.train(training)
        picked = states[layers] if isinstance(layers, int) else torch.cat([states[i] for i in layers], dim=-1)
        return pooled(picked[0], self.pool, int(self.crop_cls)).cpu().clone()

    def features(self, states: torch.Tensor) -> Features:
        """The picture with these hidden states: it takes as many tokens as the tower gives, less CLS if that is dropped."""
        return Features(states, len(states) - int(self.crop_cls))

    def _picture(self, stored: dict[str, torch.Tensor]) -> Features:
        return self.features(stored["states"])
