"""A tiny LLaVA with two adapters, served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TARGETS = r".*language_model.*\.(q_proj|v_proj)"


@pytest.fixture(scope="session")
def adapters(llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters `lora` and `rode`."""
    from rode.tuner import RodeConfig
    from serving import save_adapter

    folder = tmp_path_factory.mktemp("adapters")
    save_adapter(
        llava_dir, folder / "rode", RodeConfig(ranks=(2, 4), target_modules=TARGETS, task_type="CAUSAL_LM"), 1
    )
    lora = RodeConfig(ranks=(4,), gate="none", target_modules=TARGETS, task_type="CAUSAL_LM")
    save_adapter(llava_dir, folder / "lora", lora, 2)
    return folder


def load(llava_dir: Path, adapters: Path) -> dict[str, Any]:
    from rode.serving.models import Found, adapters_in, load_models

    found = [Found(folder, None) for folder in adapters_in(adapters)]
    return load_models(str(llava_dir), found, dtype="float32", device="cpu", prompt="vicuna")


@pytest.fixture(scope="session")
def models(llava_dir: Path, adapters: Path) -> dict[str, Any]:
    """The served models by name, in float32. While the server runs, its thread alone may touch them."""
    return load(llava_dir, adapters)


@pytest.fixture(scope="session")
def reference(llava_dir: Path, adapters: Path) -> dict[str, Any]:
    """The same models once more, for tests to ask by themselves."""
    return load(llava_dir, adapters)


@pytest.fixture(scope="session")
def base_name(llava_dir: Path) -> str:
    return llava_dir.name


@pytest.fixture(scope="session")
def server(models: dict[str, Any]) -> Any:
    from rode.serving.app import Server
    from rode.serving.limits import Limits

    return Server(models, Limits(max_new_tokens=200, timeout=60))


@pytest.fixture(scope="session")
def address(server: Any) -> Iterator[str]:
    """Of the running server."""
    from serving import serving

    with serving(server) as found:
        yield found


@pytest.fixture
def client(address: str) -> Any:
    """The official client of the running server, which asks once."""
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
