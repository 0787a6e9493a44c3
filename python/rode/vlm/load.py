"""Loading a LLaVA checkpoint, a stage-1 projector and an adapter."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file

from rode.vlm.pretrained import from_pretrained
from rode_food.atomic import written_aside

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

    Model = PreTrainedModel | PeftModel
    """A LLaVA, under PEFT or not."""

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROJECTOR_FILE = "projector.safetensors"
# Tokens that a tower puts before its patches (CLS, registers), by model type.
_EXTRA_TOKENS = {"clip_vision_model": 1, "dinov2": 1, "siglip_vision_model": 0}


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" is the process's own GPU if torch sees one, else the CPU."""
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def pick_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def load_vlm(
    path: str | Path,
    *,
    dtype: str = "bfloat16",
    device: str = "auto",
    attention: str | None = None,
    projector: str | Path | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a LLaVA and its processor.

    Args:
        path: a checkpoint directory as `save_pretrained` writes it, or a hub name "owner/name".
        dtype: "float32", "bfloat16" or "float16"; what the frozen weights are held in.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        attention: transformers' `attn_implementation`; None for its own choice.
        projector: a `projector.safetensors` of stage 1, or the folder that holds it; replaces the checkpoint's.

    Returns:
        The model in eval mode, and the processor.

    Raises:
        FileNotFoundError: no such directory. ValueError: not a LLaVA, or processor and model do not fit, or they need code of
            their own.
    """
    from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

    path = os.path.expanduser(str(path))
    if not os.path.isdir(path) and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        raise FileNotFoundError(f"{path}: no such model directory (nor a hub name like owner/name)")
    torch_dtype, where = pick_dtype(dtype), pick_device(device)
    config = from_pretrained(AutoConfig, path)
    if config.model_type != "llava":
        raise ValueError(f"{path}: expected a model of type 'llava', got {config.model_type!r}")
    processor = from_pretrained(AutoProcessor, path)
    if not hasattr(processor, "vision_feature_select_strategy"):
        raise ValueError(
            f"{path}: expected a LLaVA processor, got {type(processor).__name__}; is a file missing?"
        )
    extra: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    # Any: transformers wraps `to` in a way that hides its types
    model: Any = from_pretrained(LlavaForConditionalGeneration, path, dtype=torch_dtype, **extra)
    model.to(where).eval()
    fit_processor(processor, model.config)
    if projector is not None:
        load_projector(model, projector)
    match_projector_input(model)
    return model, processor


def fit_processor(processor: LlavaProcessor, config: LlavaConfig) -> None:
    """Make the processor count a picture's tokens as the model does: older checkpoints lack the fields for it."""
    vision: Any = config.vision_config  # of the tower's own class, which transformers does not say
    wanted = {
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": _EXTRA_TOKENS.get(
            vision.model_type, processor.num_additional_image_tokens
        ),
    }
    for name, value in wanted.items():
        if (got := getattr(processor, name)) != value:
            logger.warning(
                "the processor's %s is %r; the model's configuration says %r, which is used", name, got, value
            )
            setattr(processor, name, value)


def get_llava(model: Model) -> LlavaForConditionalGeneration:
    """The LlavaForConditionalGeneration, under PEFT or not."""
    get_base_model = getattr(model, "get_base_model", None)
    llava = model if get_base_model is None else get_base_model()
    return cast("LlavaForConditionalGeneration", llava)


def get_projector(model: Model) -> torch.nn.Module:
    """The module between tower and language model."""
    return get_llava(model).model.multi_modal_projector


def input_embeddings(model: Model) -> torch.Tensor:
    """The table of token embeddings: (vocabulary, hidden)."""
    table = model.get_input_embeddings().weight
    assert isinstance(table, torch.Tensor), "an embedding's weight"
    return table


def _match_input(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    dtype = next(module.parameters()).dtype
    return (args[0].to(dtype), *args[1:])


def match_projector_input(model: Model) -> None:
    """Let the projector be float32 (when it is trained) between a tower and a language model in 16 bit: its input is
    cast here, its output by LLaVA itself."""
    projector = get_projector(model)
    if _match_input not in projector._forward_pre_hooks.values():
        projector.register_forward_pre_hook(_match_input)


def save_projector(model: Model, directory: str | Path) -> Path:
    """Write `projector.safetensors` (aside, then renamed); its path."""
    file = Path(directory) / PROJECTOR_FILE
    state = get_projector(model).state_dict()
    with written_aside(file) as aside:
        save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, aside)
    return file


def load_projector(model: Model, path: str | Path) -> None:
    """Load a projector of the same shape, in the precision in which it was saved (float32 from stage 1)."""
    file = Path(path) / PROJECTOR_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such projector; `rode train` with stage: projector writes one")
    state, projector = load_file(file), get_projector(model)
    own = projector.state_dict()
    if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in own.items()}:
        shapes = [{n: tuple(t.shape) for n, t in s.items()} for s in (own, state)]
        raise ValueError(f"{file}: the model's projector has {shapes[0]}, the file {shapes[1]}")
    projector.to(next(iter(state.values())).dtype).load_state_dict(state)


def load_adapter(model: Model, directory: str | Path, name: str = "default") -> Model:
    """Put a saved adapter on a model, for inference: a PeftModel in eval mode. A PeftModel gets one more, which is not active.

    An adapter that was trained with the projector carries it and gets it back in float32. A folder of MoE-LLaVA turns the model
    itself into the mixture.

    Raises:
        FileNotFoundError: no adapter in the folder. ValueError: its tensors are not those that its configuration wants here.
    """
    from peft import PeftModel

    import rode.tuner  # noqa: F401  (registers the RODE method with PEFT)
    from rode.baselines.moe_llava import MOE_CONFIG, load_moe

    if (Path(directory) / MOE_CONFIG).is_file():
        if (Path(directory) / PROJECTOR_FILE).is_file():
            load_projector(model, directory)
        load_moe(model, directory)
        return model.eval()

    file = Path(directory) / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{directory}: no adapter here (adapter_config.json is missing)")
    if json.loads(file.read_text()).get("modules_to_save"):
        get_projector(model).float()  # so that PEFT's copy takes the saved float32 values unrounded
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(directory), name)
            return model.eval()
        return PeftModel.from_pretrained(model, str(directory), adapter_name=name).eval()
    except (ValueError, KeyError) as error:  # KeyError: PEFT's, for a tensor of modules_to_save
        what = str(error) if isinstance(error, ValueError) else f"the tensor {error} is missing"
        raise ValueError(f"{directory}: {what}") from error
