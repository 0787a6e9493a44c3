"""Loading a vision-language model, a stage-1 projector and an adapter."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file

from rode.finite import refuse_not_finite
from rode.vlm.families import family_of
from rode.vlm.pretrained import from_pretrained
from rode.vlm.processor import load_processor
from rode_food.atomic import written_aside

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

    Model = PreTrainedModel | PeftModel
    """A vision-language model, under PEFT or not."""

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROJECTOR_FILE = "projector.safetensors"
BASE_FILE = "base_model.safetensors"
"""Weights of the base model that were trained with an adapter (`training.train_base`), beside it."""
_PROJECTOR = re.compile(r"(multi_modal|mm)_projector|connector|aligner|merger")  # last part of its name


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" is the process's own GPU if torch sees one, else the CPU."""
    if name != "auto":
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.type == "cuda" and (device.index or 0) >= count:
            built = "" if torch.version.cuda or torch.version.hip else ", which was built without CUDA,"
            raise ValueError(
                f"device: got {name!r}, and torch {torch.__version__}{built} sees {count} GPUs; use auto or cpu"
            )
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def pick_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def read_processor(path: str | Path) -> tuple[ProcessorMixin, PretrainedConfig]:
    """The processor of a vision-language model and the model's configuration, without its weights.

    Raises:
        FileNotFoundError, ValueError: see `load_vlm`.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    path = os.path.expanduser(str(path))
    if not os.path.isdir(path) and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        raise FileNotFoundError(f"{path}: no such model directory (nor a hub name like owner/name)")
    config = from_pretrained(AutoConfig, path)
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(
            f"{path}: expected a vision-language model (LLaVA, Qwen-VL, Gemma 3, ...), got the type {config.model_type!r}"
        )
    processor = load_processor(path, config)
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ValueError(
            f"{path}: expected a processor with tokenizer and image processor, got {type(processor).__name__}; is a file missing?"
        )
    prepare = family_of(config).prepare
    if prepare is not None:
        prepare(config, processor)
    return processor, config


def load_vlm(
    path: str | Path,
    *,
    dtype: str = "bfloat16",
    device: str = "auto",
    attention: str | None = None,
    projector: str | Path | None = None,
    processor: ProcessorMixin | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a vision-language model and its processor: whatever transformers' AutoModelForImageTextToText and AutoProcessor take.

    Args:
        path: a checkpoint directory as `save_pretrained` writes it, or a hub name "owner/name".
        dtype: "float32", "bfloat16" or "float16"; what the frozen weights are held in.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        attention: transformers' `attn_implementation`; None for its own choice.
        projector: a `projector.safetensors` of stage 1, or the folder that holds it; replaces the checkpoint's.
        processor: of this path, if it was read already (`read_processor`).

    Returns:
        The model in eval mode, and the processor.

    Raises:
        FileNotFoundError: no such directory. ValueError: no vision-language model, or processor and model do not fit, or they need
            code of their own.
    """
    from transformers import AutoModelForImageTextToText

    torch_dtype, where = pick_dtype(dtype), pick_device(device)
    if processor is None:
        processor, _ = read_processor(path)
    extra: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    # Any: transformers wraps `to` in a way that hides its types
    model: Any = from_pretrained(
        AutoModelForImageTextToText, os.path.expanduser(str(path)), dtype=torch_dtype, **extra
    )
    model.to(where).eval()
    if projector is not None:
        load_projector(model, projector)
    match_projector_input(model)
    return model, processor


def base_model(model: torch.nn.Module) -> Any:
    """The vision-language model itself, under PEFT or not."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def language_model(model: Model) -> PreTrainedModel:
    """The part of a vision-language model that reads tokens, with its embeddings and without its head."""
    base = base_model(model)
    for name in ("language_model", "text_model"):
        if (found := getattr(base.model, name, None)) is not None:
            return cast("PreTrainedModel", found)
    return cast("PreTrainedModel", base.get_decoder())


def projector_name(model: torch.nn.Module) -> str | None:
    """The name, within the vision-language model, of the module between tower and language model; None where there is none."""
    names = [
        name for name, _ in base_model(model).named_modules() if _PROJECTOR.fullmatch(name.rpartition(".")[2])
    ]
    return min(names, key=lambda name: name.count("."), default=None)


def get_projector(model: Model) -> torch.nn.Module:
    """The module between tower and language model.

    Raises:
        ValueError: the model has none that is known by its name.
    """
    name = projector_name(model)
    if name is None:
        raise ValueError(
            f"{type(base_model(model)).__name__} has no projector between tower and language model (no module named "
            "multi_modal_projector, connector, merger or aligner), so none can be trained or replaced"
        )
    found: torch.nn.Module = base_model(model).get_submodule(name)
    return found


def positions_of(config: PretrainedConfig) -> int | None:
    """Tokens that the language model has positions for; None where its configuration does not say."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


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
    cast here, its output by the model itself."""
    if projector_name(model) is None:
        return
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
    refuse_not_finite(state, str(file))
    own = projector.state_dict()
    if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in own.items()}:
        shapes = [{n: tuple(t.shape) for n, t in s.items()} for s in (own, state)]
        raise ValueError(f"{file}: the model's projector has {shapes[0]}, the file {shapes[1]}")
    projector.to(next(iter(state.values())).dtype).load_state_dict(state)


def plain_name(name: str) -> str:
    """The name of a base model's parameter without what an adapter puts around its layer."""
    return name.replace(".base_layer.", ".")


def load_base(model: Model, directory: str | Path) -> None:
    """Give a base model the weights that were trained with an adapter, where the adapter's folder holds some; each takes the
    precision that the model has.

    Raises:
        ValueError: they are another model's, or not finite.
    """
    file = Path(directory) / BASE_FILE
    if not file.is_file():
        return
    state = load_file(file)
    refuse_not_finite(state, str(file))
    own = {plain_name(name): parameter for name, parameter in base_model(model).named_parameters()}
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape or not own[name].is_floating_point():
            there = "no such weight" if name not in own else f"{tuple(own[name].shape)}, {own[name].dtype}"
            raise ValueError(
                f"{file}: expected weights of this model, got {name} of the shape {tuple(tensor.shape)} (the model has {there}); "
                "load it on the model that it was trained on"
            )
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def read_adapter_config(file: Path) -> dict[str, Any]:
    """The plain values of an adapter_config.json, of a method that PEFT knows.

    Raises:
        ValueError: it is damaged, or of another method.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import rode.tuner  # noqa: F401  (registers the RODE method with PEFT)

    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:  # also for bytes that are no text
        raise ValueError(
            f"{file}: expected JSON, got something else ({error}); the file is damaged"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{file}: expected a mapping, got {type(values).__name__}; the file is another's or damaged"
        )
    known = {str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    kind = values.get("peft_type")
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(
            f"{file}: peft_type: expected a method of PEFT such as RODE or LORA, got {kind!r}; the file is another's or damaged"
        )
    saved = values.get("modules_to_save")
    if not isinstance(saved, list | None):
        raise ValueError(f"{file}: modules_to_save: expected a list of names or null, got {saved!r}")
    return values


def load_adapter(model: Model, directory: str | Path, name: str = "default") -> Model:
    """Put a saved adapter on a model, for inference: a PeftModel in eval mode. A PeftModel gets one more, which is not active.

    An adapter that was trained with the projector carries it and gets it back in float32. One that was trained with the base model
    gives the model its weights. A folder of MoE-LLaVA turns the model
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
    if (weights := Path(directory) / "adapter_model.safetensors").is_file():
        refuse_not_finite(load_file(weights), str(weights))  # of any method of PEFT
    values = read_adapter_config(file)
    if isinstance(model, PeftModel) and (Path(directory) / BASE_FILE).is_file():
        raise ValueError(
            f"{directory}: its training changed the base model ({BASE_FILE}), under which other adapters would change too; load it "
            "alone"
        )
    load_base(model, directory)
    last = (projector_name(model) or "").rpartition(".")[2]
    if last in (values.get("modules_to_save") or []):
        get_projector(model).float()  # so that PEFT's copy takes the saved float32 values unrounded
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(directory), name)
            return model.eval()
        return PeftModel.from_pretrained(model, str(directory), adapter_name=name).eval()
    except (ValueError, KeyError, TypeError) as error:
        # KeyError: PEFT's, for a tensor of modules_to_save; TypeError: for a value in adapter_config.json of another type
        what = f"the tensor {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{directory}: {what}") from error
