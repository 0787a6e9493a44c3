"""Features that the frozen vision tower makes of a picture, computed once and used many times.

The tower's hidden states go where the pixels went: `accept_features` makes the tower take a tensor of three dimensions
for its own output, so that everything after it (choice of layer, CLS token, projector) stays transformers' code.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from rode.vlm.images import open_image
from rode.vlm.load import get_llava
from rode_food.atomic import written_aside
from rode_food.images import open_picture

if TYPE_CHECKING:
    from transformers import LlavaProcessor

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
    tower = get_llava(model).model.vision_tower
    if isinstance(tower, _TakesFeatures):
        return
    tower._feature_layers = model.config.vision_feature_layer
    cls = type(tower)
    # torch looks up `forward` on the class; a subclass under the old name keeps repr and config lookups as they were.
    tower.__class__ = type(cls.__name__, (_TakesFeatures, cls), {"__module__": cls.__module__})


class PixelSource:
    """Pictures as the tower wants them: `source(path)` gives float32 (3, H, W)."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self.processor = processor

    def __call__(self, path: str) -> torch.Tensor:
        return self.processor.image_processor(images=open_image(path), return_tensors="pt")["pixel_values"][0]

    def image_tokens(self, pixels: torch.Tensor) -> int:
        """How many tokens the picture takes in the language model, as the processor counts them.

        This is the count of `LlavaProcessor`, which has no method for it before transformers 5.10.
        """
        height, width = pixels.shape[-2:]
        patch = self.processor.patch_size
        patches = (height // patch) * (width // patch)
        dropped = self.processor.vision_feature_select_strategy == "default"
        return patches + self.processor.num_additional_image_tokens - dropped


class FeatureSource:
    """Hidden states of the frozen tower: `source(path)` gives (tower tokens, hidden x layers) in the tower's dtype.

    Pictures are told apart by content, so a file changed in place is computed anew. One picture goes through the tower
    at a time: what is stored does not depend on what else was in a batch.

    Args:
        model: the LLaVA (its `vision_tower` is used; nothing of it is kept but the tower).
        processor: its processor.
        directory: where to keep the states, one safetensors file for each picture, in a folder named after tower and
            preprocessing; None keeps them in memory.
    """

    def __init__(self, model: Model, processor: LlavaProcessor, directory: str | Path | None = None) -> None:
        accept_features(model)
        self.llava = get_llava(model)
        self.pixels = PixelSource(processor)
        self.crop_cls = self.llava.config.vision_feature_select_strategy == "default"
        self.directory = None if directory is None else Path(directory) / self._fingerprint(processor)
        self._by_path: dict[str, str] = {}  # path -> digest of the file
        self._states: dict[str, torch.Tensor] = {}  # digest -> (tower tokens, hidden x layers)

    def __getstate__(self) -> dict[str, Any]:  # a data-loader worker reads what is there, it runs no tower
        return {**self.__dict__, "llava": None}

    def _fingerprint(self, processor: LlavaProcessor) -> str:
        """Digest of the tower's weights and configuration and of the preprocessing."""
        tower = self.llava.model.vision_tower
        digest = hashlib.sha256()
        facts = [
            tower.config.to_dict(),
            self.llava.config.vision_feature_layer,
            processor.image_processor.to_dict(),
        ]
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
        for name, tensor in sorted(tower.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:32]

    @torch.inference_mode()
    def _compute(self, path: str) -> torch.Tensor:
        tower = self.llava.model.vision_tower
        layers = self.llava.config.vision_feature_layer
        pixels = self.pixels(path).unsqueeze(0).to(next(tower.parameters()).device)
        training = tower.training
        tower.eval()  # a frozen tower drops nothing
        states = tower(pixels, output_hidden_states=True).hidden_states
        tower.train(training)
        picked = states[layers] if isinstance(layers, int) else torch.cat([states[i] for i in layers], dim=-1)
        return picked[0].cpu().clone()  # (tower tokens, hidden x layers)

    def precompute(self, paths: Iterable[str], progress: bool = True) -> int:
        """See to it that every picture's states are at hand; the number that had to be computed."""
        computed = 0
        unique = list(dict.fromkeys(paths))
        for path in tqdm(unique, desc="vision features", unit="picture", disable=not progress):
            with open_picture(path) as file:
                key = hashlib.sha256(file.read()).hexdigest()
            self._by_path[path] = key
            if self.directory is None:
                if key not in self._states:
                    self._states[key] = self._compute(path)
                    computed += 1
            elif not (stored := self.directory / f"{key}.safetensors").exists():
                with written_aside(stored) as aside:
                    save_file({"states": self._compute(path).contiguous()}, aside)
                computed += 1
        return computed

    def __call__(self, path: str) -> torch.Tensor:
        if path not in self._by_path:
            if self.llava is None:
                raise KeyError(
                    f"{path}: its features were not computed before the data-loader workers started"
                )
            self.precompute([path], progress=False)
        key = self._by_path[path]
        if self.directory is None:
            return self._states[key]
        return load_file(self.directory / f"{key}.safetensors")["states"]

    def image_tokens(self, states: torch.Tensor) -> int:
        """How many tokens the picture takes in the language model: those of the tower, less CLS if that is dropped."""
        return states.shape[0] - int(self.crop_cls)
