"""`rode serve` under 1 to 16 clients, against `generate` called in a loop: requests and tokens a second, time to first token.

The model has the demo's shape and random weights: alone, with PEFT's LoRA merged into it, and with RoDE. Each question has a
picture. No token ends an answer, so that all are equally long. Clients are in a process of their own. Checked first: the logits as
`benchmarks generate` checks them, the logits of a padded batch against those of each row alone, and the number of tokens.
"""

from __future__ import annotations

import base64
import io
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig

from benchmarks import generate, write_json
from benchmarks.serve_clients import Answered, ask_all
from benchmarks.timing import headline, machine
from rode.serving import listen
from rode.serving.app import Server, make_app
from rode.serving.batch import Job, Piece, run
from rode.serving.guard import host_names
from rode.serving.limits import Limits
from rode.serving.models import ServedModel

IMAGE_TOKEN_ID = 49152  # of the demo's shape, see `benchmarks.generate`


class Endless(ServedModel):
    """A served model whose answers no token ends."""

    def settings(self, max_new_tokens: int) -> GenerationConfig:
        made = super().settings(max_new_tokens)
        made.eos_token_id = None
        return made


def tokenizer(vocabulary: int, image_token_id: int) -> Any:
    """A token for each byte, and a word of its own for every other id, so that answers can be told apart."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    table = {word: index for index, word in enumerate(words)}
    table |= {f"Ġw{i}": i for i in range(len(words), vocabulary) if i != image_token_id}
    table["<image>"] = image_token_id
    made = Tokenizer(models.BPE(vocab=table, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


def processor(model: Any, image_token_id: int) -> Any:
    """The demo's, with that tokenizer."""
    from transformers import LlavaProcessor

    from rode.demo.parts import CHAT_TEMPLATE, image_processor

    return LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer(model.get_input_embeddings().num_embeddings, image_token_id),
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def served(dtype: torch.dtype, device: str) -> dict[str, Endless]:
    """The three systems by the names under which they are served, on one set of weights.

    Raises:
        RuntimeError: logits that are wrong.
    """
    torch.manual_seed(0)
    build, targets = generate.MODELS["demo"]
    base = build(dtype).requires_grad_(False).to(device)
    base.generation_config.eos_token_id = None  # `generate` would take it where it is given none
    models = generate.systems(base, targets)
    ids = torch.randint(IMAGE_TOKEN_ID // 2, (1, generate.PROMPT), generator=torch.Generator().manual_seed(1))
    generate.check(models, ids.to(device))
    made = processor(base, base.config.image_token_id)
    names = {"base": "base", "lora-merged": "LoRA merged", "rode": "rode"}
    return {
        name: Endless(name, models[of], made, "default" if of == "rode" else None, "chat_template")
        for name, of in names.items()
    }


def questions(count: int) -> list[tuple[str, Image.Image]]:
    """Questions of different lengths, each about a picture of its own."""
    colours = [(37 * i % 256, 101 * i % 256, 53 * i % 256) for i in range(1, count + 1)]
    return [
        (f"What is on plate {i}?" + " Look again." * (i % 4), Image.new("RGB", (200, 200), colour))
        for i, colour in enumerate(colours)
    ]


@torch.inference_mode()
def check_batch(model: Endless, asked: Sequence[tuple[str, Image.Image]]) -> None:
    """The logits after the prompt: of a padded batch against those of each row alone.

    Raises:
        RuntimeError: they differ by more than rounding explains.
    """
    prepared = [model.prepare(question, None, [image]) for question, image in asked]
    rows = [model.row(each) for each in prepared]
    with model.active() as active:
        together = active(**model.batch(prepared, rows)).logits[:, -1].double()
        for index, (each, row) in enumerate(zip(prepared, rows, strict=True)):
            alone = active(**model.batch([each], [row])).logits[0, -1].double()
            error = ((together[index] - alone).norm() / alone.norm()).item()
            if not error < generate.BOUNDS[active.dtype]:
                raise RuntimeError(
                    f"{model.name}: row {index} of a batch is wrong (relative error {error:.2e}): nothing is timed"
                )


def loop(
    model: Endless, asked: Sequence[tuple[str, Image.Image]], tokens: int
) -> tuple[float, list[Answered]]:
    """`generate` for one question after the other, pictures and prompts included; the seconds that took."""
    answers: list[Answered] = []
    began = time.perf_counter()
    for number, (question, image) in enumerate(asked):
        started = time.perf_counter()
        pieces: list[tuple[float, str]] = []

        def note(event: Any, pieces: list[tuple[float, str]] = pieces) -> None:
            if isinstance(event, Piece):
                pieces.append((time.perf_counter(), event.text))

        job = Job(model, model.prepare(question, None, [image]), tokens, note)
        run([job])
        text = "".join(piece for _, piece in pieces)
        answers.append(
            Answered(number, pieces[0][0] - started, time.perf_counter() - started, text, job.tokens)
        )
    return time.perf_counter() - began, answers


@contextmanager
def running(models: dict[str, Endless], limits: Limits) -> Iterator[str]:
    """The address of a server of these models."""
    bound = listen.bind("127.0.0.1", 0)
    host, port = bound.getsockname()[:2]
    server = listen.server(make_app(Server(models, limits), host_names(host)), limits, quiet=True)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()


def row(
    system: str,
    how: str,
    clients: int,
    seconds: float,
    answers: Sequence[Answered],
    alone: Sequence[Answered],
) -> dict[str, Any]:
    """What is written of one measurement; `same` counts the answers whose text is the loop's."""
    tokens = sum(answer.tokens for answer in answers)
    firsts = sorted(answer.first for answer in answers)
    return {
        "system": system,
        "how": how,
        "clients": clients,
        "requests": len(answers),
        "requests_per_second": len(answers) / seconds,
        "tokens_per_second": tokens / seconds,
        "first_token_median": median(firsts),
        "first_token_highest": firsts[-1],
        "same": sum(a.text == b.text for a, b in zip(answers, alone, strict=True)),
    }


def line(found: dict[str, Any], tokens: float) -> str:
    how = "generate in a loop" if found["how"] == "loop" else f"{found['clients']:2} clients"
    return (
        f"  {found['system']:12} {how:18} {found['requests_per_second']:7.2f} requests/s "
        f"{found['tokens_per_second']:8.1f} tokens/s "
        f"({found['tokens_per_second'] / tokens:.2f}x)  first token {found['first_token_median']:.2f} s "
        f"(at most {found['first_token_highest']:.2f}); {found['same']} of {found['requests']} answers as in the loop"
    )


def messages(asked: Sequence[tuple[str, Image.Image]]) -> list[list[dict[str, Any]]]:
    """The questions as requests."""
    found = []
    for question, image in asked:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        found.append([{"role": "user", "content": content}])
    return found


def main(options: Namespace) -> None:
    """`options` as `python -m benchmarks serve` has them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = served(getattr(torch, options.dtype), device)
    asked = questions(options.requests)
    for model in models.values():
        check_batch(model, asked[:8])
    about = {"benchmark": "serve", **machine(device), "dtype": options.dtype, "tokens": options.tokens}
    about |= {"requests": options.requests, "batch_size": options.batch_size}
    print(
        f"{headline(about)}; {options.dtype}, answers of {options.tokens} tokens, batches of {options.batch_size}"
    )
    limits = Limits(
        batch_size=options.batch_size,
        timeout=3600,
        max_new_tokens=options.tokens,
        queue=max(options.clients),
    )
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for name, model in models.items():
            loop(model, asked[:1], 2)  # fills caches
            seconds, alone = loop(model, asked, options.tokens)
            measured = [row(name, "loop", 1, seconds, alone, alone)]
            with running({name: model}, limits) as address:
                pool.submit(ask_all, address, name, messages(asked[:1]), 1, 2).result()
                for clients in options.clients:
                    call = (address, name, messages(asked), clients, options.tokens)
                    seconds, answers = pool.submit(ask_all, *call).result()
                    if any(answer.tokens != options.tokens for answer in answers):
                        raise RuntimeError(
                            f"{name}: expected answers of {options.tokens} tokens, got {sorted({a.tokens for a in answers})}"
                        )
                    measured.append(row(name, "server", clients, seconds, answers, alone))
            for found in measured:
                print(line(found, measured[0]["tokens_per_second"]), flush=True)
            rows += measured
            if options.json:  # what was measured stays if a later system fails
                write_json(options.json, {**about, "rows": rows})
