"""A server of `rode serve` on a free port, in a thread of its own."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image


def need_serve() -> None:
    """Skips a module whose tests need what `rode[serve]` installs."""
    for name in ("fastapi", "uvicorn", "llguidance", "prometheus_client"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'rode[serve]'")


def save_adapter(checkpoint: Path, folder: Path, config: Any, seed: int) -> Path:
    """An adapter with random weights, large enough to be heard."""
    from peft import get_peft_model
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(seed)
    model = get_peft_model(LlavaForConditionalGeneration.from_pretrained(checkpoint), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(str(folder))
    return folder


@contextmanager
def serving(server: Any, *, key: str | None = None, hosts: tuple[str, ...] = ()) -> Iterator[str]:
    """The address of a running server, such as http://127.0.0.1:40123; it is stopped at the end."""
    from rode.serving import listen
    from rode.serving.app import make_app
    from rode.serving.guard import host_names

    bound = listen.bind("127.0.0.1", 0)
    app = make_app(server, host_names("127.0.0.1", hosts), key)
    running = listen.server(app, server.limits, quiet=True)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not running.started:
            assert thread.is_alive(), "the server has ended"
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.01)
        yield "http://{}:{}".format(*bound.getsockname()[:2])
    finally:
        running.should_exit = True
        thread.join()


def data_url(image: Image.Image, kind: str = "png", **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "jpeg"}.get(kind, kind), **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def plate(colour: tuple[int, int, int], size: int = 40) -> Image.Image:
    """A picture of one colour with a darker square."""
    image = Image.new("RGB", (size, size), colour)
    image.paste(tuple(c // 2 for c in colour), (size // 4, size // 4, size // 2, size // 2))
    return image


def ask(question: str, *urls: str) -> list[dict[str, Any]]:
    """The messages of a question about pictures."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]
