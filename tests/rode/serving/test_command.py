"""`rode serve`: what it refuses to start with, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from rode.cli import main
from serving import ask, need_serve

need_serve()


def fails(capsys, argv, text):
    assert main(["serve", *argv]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert text in said, said


def test_what_it_does_not_start_with(capsys, adapters, tmp_path, monkeypatch):
    monkeypatch.delenv("RODE_API_KEY", raising=False)
    rode = str(adapters / "rode")
    fails(
        capsys,
        [rode, "--host", "0.0.0.0"],
        "--host 0.0.0.0: other machines may reach it, so that a key is needed",
    )
    fails(capsys, [rode, "--host", "::"], "a key is needed")
    fails(capsys, [rode, "--api-key", "süß"], "the key: expected printable ASCII")
    fails(capsys, [rode, "--port", "70000"], "--port: expected 0 to 65535")
    fails(capsys, [str(tmp_path)], "no adapter here (adapter_config.json), none in its folders, and no model")
    fails(capsys, [str(tmp_path / "gone")], "gone: no such model directory")
    fails(capsys, [rode, "--port", "0"], "no model: give --model DIR")
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        fails(capsys, [rode, "--port", port], f"--port {port}: cannot listen there")


def test_a_missing_extra_is_named(capsys, adapters, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    fails(capsys, [str(adapters / "rode")], "pip install 'rode[serve]'")


def test_adapters_of_different_models_are_not_served_together(adapters):
    from rode.serving.models import Found, load_models
    from rode.training.experiment import ModelConfig

    found = [Found(adapters / name, ModelConfig(path=f"/{name}")) for name in ("rode", "lora")]
    with pytest.raises(
        ValueError, match=r"different model\.path: /rode .* serve them apart, or give --model"
    ):
        load_models(None, found)


@pytest.mark.slow
def test_a_trained_run_is_served_and_sigterm_drains(llava_dir, adapters, tmp_path):
    """The command in a process of its own: it answers what it has taken on, and ends."""
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    argv = [str(adapters), "--model", str(llava_dir), "--port", "0", "--dtype", "float32", "--device", "cpu"]
    command = [sys.executable, "-m", "rode", "serve", *argv, "--prompt", "vicuna", "--batch-size", "1"]
    environment = os.environ | {"RODE_API_KEY": "k"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.match(r"(http://127\.0\.0\.1:\d+/v1) serves lora, rode, ", line)
        assert address, line
        client = openai.OpenAI(base_url=address[1], api_key="k", max_retries=50, timeout=60)
        client.models.list()
        client = client.with_options(max_retries=0)
        answers, first = [], threading.Event()

        def asks(index):
            stream = client.chat.completions.create(
                model="rode", messages=ask(f"What is it? {index}"), max_tokens=200, stream=True
            )
            for chunk in stream:
                first.set()
                reason = chunk.choices[0].finish_reason
            answers.append(reason)

        threads = [threading.Thread(target=asks, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        assert first.wait(60)
        time.sleep(0.5)  # the others are in the queue
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(120)
        assert len(answers) == 4
        assert set(answers) <= {"stop", "length"}
        assert process.wait(60) in (0, -signal.SIGTERM)
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
