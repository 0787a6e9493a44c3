"""Loading checkpoints, projectors and adapters, and what is said about those that do not fit."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from rode import RodeConfig
from rode.vlm import load_adapter, load_projector, load_vlm, open_image, save_projector
from rode.vlm.families.llava import fit_processor
from rode.vlm.load import get_projector, match_projector_input
from tiny_llava import save_tiny_llava, tiny_model, tiny_processor


@pytest.mark.parametrize("tower", ["clip", "dinov2", "siglip"])
def test_a_checkpoint_comes_back(tmp_path, tower, examples):
    save_tiny_llava(tmp_path, tower=tower)
    model, processor = load_vlm(tmp_path, dtype="float32", device="cpu")
    for name, tensor in tiny_model(tower).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert not model.training
    assert processor.image_token_id == model.config.image_token_id
    inputs = processor(images=open_image(examples[0].image), text="<image>\nWhat?", return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 4
    with torch.no_grad():
        model(**inputs)  # which counts the picture's tokens itself
    half, _ = load_vlm(tmp_path, dtype="bfloat16", device="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_an_old_processor_is_made_to_count_as_the_model(caplog):
    processor = tiny_processor()
    processor.num_additional_image_tokens, processor.patch_size = 0, None
    with caplog.at_level(logging.WARNING):
        fit_processor(processor, tiny_model().config)
    assert (processor.num_additional_image_tokens, processor.patch_size) == (1, 14)
    assert len(caplog.records) == 2


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model directory"):
        load_vlm(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"expected a vision-language model .* got the type 'llama'"):
        load_vlm(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, float16, got 'int8'"):
        load_vlm(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="device: expected auto, cpu"):
        load_vlm(tmp_path, device="gpu")
    with pytest.raises(FileNotFoundError, match=r"no adapter here"):
        load_adapter(tiny_model(), tmp_path)


def test_projector_round_trip(tmp_path, llava_dir):
    trained = tiny_model(seed=5)
    file = save_projector(trained, tmp_path)
    for path in (file, tmp_path):
        model, _ = load_vlm(llava_dir, device="cpu", projector=path)  # the rest of it is bfloat16
        for name, tensor in get_projector(trained).state_dict().items():
            assert torch.equal(get_projector(model).state_dict()[name], tensor), name
    with torch.no_grad():  # float32 between two 16-bit parts
        model(input_ids=torch.tensor([[1, 4, 4, 4, 4]]), pixel_values=torch.randn(1, 3, 28, 28))
    with pytest.raises(FileNotFoundError, match="no such projector"):
        load_projector(model, tmp_path / "nowhere")
    get_projector(trained).linear_2 = torch.nn.Linear(32, 8)
    save_projector(trained, tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"the model's projector has .*\(32, 32\).*, the file .*\(8, 32\)"):
        load_projector(model, tmp_path / "narrow")


def test_an_adapter_brings_its_projector_back_unrounded(tmp_path, llava_dir):
    model, _ = load_vlm(llava_dir, device="cpu")
    match_projector_input(model)
    get_projector(model).float()
    config = RodeConfig(ranks=(2, 3), init_weights=False, modules_to_save=["multi_modal_projector"])
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in get_projector(model).parameters():
            parameter += torch.randn_like(parameter) / 3
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": torch.tensor([[1, 4, 4, 4, 4, 9]]), "pixel_values": torch.randn(1, 3, 28, 28)}
    with torch.no_grad():
        expected = model(**inputs).logits
        base, _ = load_vlm(llava_dir, device="cpu")
        plain = base(**inputs).logits
        loaded = load_adapter(base, tmp_path)
        assert torch.equal(loaded(**inputs).logits, expected)
    assert not torch.equal(plain, expected)


@pytest.mark.parametrize("lost", ["rode_adapters.B", "multi_modal_projector"])
def test_an_adapter_without_all_its_tensors_is_refused_by_name(tmp_path, llava_dir, lost):
    model, _ = load_vlm(llava_dir, dtype="float32", device="cpu")
    config = RodeConfig(ranks=(2,), modules_to_save=["multi_modal_projector"])
    get_peft_model(model, config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if lost in n)
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    with pytest.raises(ValueError, match=rf"^{tmp_path}: .*missing") as refused:
        load_adapter(load_vlm(llava_dir, dtype="float32", device="cpu")[0], tmp_path)
    assert lost in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected JSON, got something else"),
        ('{"peft_type": "RODE", ', "expected JSON, got something else"),
        ("\xff", "expected JSON, got something else"),
        ("[]", "expected a mapping, got list"),
        ("{}", "peft_type: expected a method of PEFT such as RODE or LORA, got None"),
        ('{"peft_type": "RODO"}', "peft_type: expected a method of PEFT .*, got 'RODO'"),
        ('{"peft_type": ["RODE"]}', "peft_type: expected a method of PEFT"),
        (
            '{"peft_type": "RODE", "modules_to_save": 3}',
            "modules_to_save: expected a list of names or null, got 3",
        ),
    ],
)
def test_a_broken_adapter_config_is_a_sentence(tmp_path, text, words):
    file = tmp_path / "adapter_config.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"^{file}: {words}"):
        load_adapter(tiny_model(), tmp_path)


@pytest.mark.parametrize("key", ["ranks", "alpha", "target_modules", "gate"])
def test_a_value_of_another_type_is_a_sentence(tmp_path, key):
    get_peft_model(tiny_model(), RodeConfig(ranks=(2, 4))).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: {"a": 1}}))
    with pytest.raises(ValueError, match=f"^{tmp_path}: .*{key}"):
        load_adapter(tiny_model(), tmp_path)
