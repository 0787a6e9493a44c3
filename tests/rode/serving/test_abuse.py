"""Requests that are refused: each with one sentence, in OpenAI's form, and the server goes on."""

from __future__ import annotations

import base64
import http.client
import io
import json
import struct
import zlib
from urllib.parse import urlsplit

import pytest
from PIL import Image

from serving import ask, data_url, need_serve, plate

need_serve()

GOOD = data_url(plate((200, 30, 30)))


def send(address, body, *, path="/v1/chat/completions", method="POST", headers=None):
    """(status, body, headers) of one request over a connection of its own."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    try:
        connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, json.loads(response.read()), dict(response.getheaders())
    finally:
        connection.close()


def refused(address, body, status, text, **options):
    got, found, headers = send(address, body, **options)
    error = found["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert text in error["message"], error["message"]
    assert "\n" not in error["message"]
    assert got == status, error["message"]
    assert len(error["message"]) < 700
    assert "access-control-allow-origin" not in {name.lower() for name in headers}
    return error


def body(*urls, **changes):
    return {"model": "rode", "messages": ask("What is it?", *urls), "max_tokens": 2} | changes


def picture_of(data, kind="jpeg"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def bomb():
    """A PNG of a few kilobytes that claims 60,000 x 60,000 pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def saved(kind, **options):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(200)
ANIMATED = dict(save_all=True, append_images=[Image.new("RGB", (64, 64), c) for c in ("red", "blue")])

PICTURES = {
    "http": ("http://example.org/a.png", "fetches no address"),
    "metadata address": ("http://169.254.169.254/latest/meta-data", "fetches no address"),
    "file": ("file:///etc/passwd", "opens no file"),
    "path": ("/etc/passwd", "opens no file"),
    "relative path": ("../../secret.png", "opens no file"),
    "empty": ("", "expected a data URL"),
    "no picture": ("data:text/html;base64,PGI+", "begins with 'data:text/html"),
    "no kind": ("data:;base64,AAAA", "begins with 'data:;base64"),
    "not base64": ("data:image/png,%89PNG", "begins with 'data:image/png,"),
    "damaged base64": ("data:image/png;base64,@@@@", "base64 is damaged"),
    "base64 cut short": ("data:image/png;base64,AAAAA", "base64 is damaged"),
    "not ASCII": ("data:image/png;base64,ÄÖÜ", "base64 is damaged"),
    "no bytes": (picture_of(b""), "got other bytes"),
    "GIF": (picture_of(saved("GIF"), "gif"), "begins with 'data:image/gif"),
    "GIF that calls itself a JPEG": (picture_of(saved("GIF")), "got other bytes"),
    "SVG": (picture_of(SVG, "svg+xml"), "begins with 'data:image/svg+xml"),
    "SVG that calls itself a PNG": (picture_of(SVG, "png"), "got other bytes"),
    "HEIC": (picture_of(HEIC, "heic"), "begins with 'data:image/heic"),
    "HEIC that calls itself a JPEG": (picture_of(HEIC), "got other bytes"),
    "TIFF that calls itself a PNG": (picture_of(saved("TIFF"), "png"), "got other bytes"),
    "truncated JPEG": (picture_of(saved("JPEG")[:-300]), "truncated"),
    "truncated PNG": (picture_of(saved("PNG")[:2000], "png"), "damaged picture"),
    "JPEG header alone": (picture_of(saved("JPEG")[:20]), "picture"),
    "bomb": (picture_of(bomb(), "png"), "pixels"),
    "animation": (picture_of(saved("WEBP", **ANIMATED), "webp"), "got an animation"),
    "animated PNG": (picture_of(saved("PNG", **ANIMATED), "png"), "got an animation"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_what_is_no_picture(address, case):
    url, text = PICTURES[case]
    error = refused(address, body(url), 400, text)
    assert error["param"] == "messages[0].content[0].image_url.url"
    assert error["type"] == "invalid_request_error"


def test_sizes_of_pictures(address):
    thin = Image.new("RGB", (2000, 4))
    refused(address, body(data_url(thin)), 400, "one at most 200 times the other")
    large = Image.new("1", (9000, 8000))  # 72 megapixels in 9 kB
    refused(address, body(data_url(large)), 400, "more than 64,000,000")
    refused(address, body(*[GOOD] * 5), 400, "at most 4 pictures, got 5")


def test_jpeg_and_webp_are_taken_and_an_upright_picture_is_seen(address):
    for kind in ("jpeg", "webp", "png"):
        assert send(address, body(data_url(plate((9, 200, 9)), kind)))[0] == 200


def said(role, content):
    return [{"role": role, "content": content}]


PARTS = [{"type": "text", "text": "a"}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
BODIES = {
    "no model": ({"messages": said("user", "a")}, "model: field required"),
    "model of another type": (body(model=7), "model: input should be a valid string, got 7"),
    "no messages": ({"model": "rode"}, "messages: field required"),
    "empty messages": (body(messages=[]), "messages: list should have at least 1 item"),
    "messages of another type": (
        body(messages="hello"),
        "messages: input should be a valid list, got 'hello'",
    ),
    "message of another type": (body(messages=["hello"]), "messages[0]: input should be"),
    "no role": (body(messages=[{"content": "a"}]), "messages[0].role: field required"),
    "system": (body(messages=said("system", "Be brief.")), "put the instruction into the question"),
    "tool": (
        body(messages=said("tool", "a")),
        "messages[0].role: input should be 'user' or 'assistant', got 'tool'",
    ),
    "answer first": (body(messages=said("assistant", "a")), "expected 'user', got 'assistant'"),
    "answer last": (body(messages=said("user", "a") + said("assistant", "b")), "got an answer"),
    "two questions": (body(messages=said("user", "a") * 2), "messages[1].role: expected 'assistant'"),
    "empty question": (body(messages=said("user", " ")), "expected a question in words"),
    "picture alone": (
        body(messages=[{"role": "user", "content": ask("a", GOOD)[0]["content"][:1]}]),
        "question in words",
    ),
    "content of another type": (body(messages=said("user", 5)), "messages[0].content: input should be"),
    "no content": (body(messages=said("user", None)), "messages[0].content: input should be"),
    "part of another kind": (
        body(messages=said("user", [{"type": "input_audio"}])),
        "messages[0].content[0].type: input",
    ),
    "part without its field": (body(messages=said("user", [{"type": "text"}])), "expected the field 'text'"),
    "part with another field": (
        body(messages=said("user", [{"type": "text", "text": "a", "image_url": {"url": GOOD}}])),
        "and no other",
    ),
    "detail": (
        body(messages=said("user", [{"type": "image_url", "image_url": {"url": GOOD, "detail": "high"}}])),
        "detail: input should be 'auto'",
    ),
    "picture in an answer": (
        body(messages=[*said("user", "a"), {**ask("a", GOOD)[0], "role": "assistant"}, *said("user", "b")]),
        "got a picture",
    ),
    "text without end": (body(messages=said("user", "a" * 100_001)), "at most 100,000 characters"),
    "longer than the context": (
        body(messages=said("user", "a" * 2000)),
        "more than the 1024 of the model's context",
    ),
    "10,000 tokens": (body(max_tokens=10_000), "max_tokens: expected at most 200, got 10000"),
    "10,000 completion tokens": (
        {"model": "rode", "messages": said("user", "a"), "max_completion_tokens": 10_000},
        "max_completion_tokens: expected at most 200",
    ),
    "no tokens": (body(max_tokens=0), "max_tokens: input should be greater than or equal to 1, got 0"),
    "tokens of another type": (body(max_tokens="5"), "max_tokens: input should be a valid integer, got '5'"),
    "tokens true": (body(max_tokens=True), "max_tokens: input should be a valid integer, got True"),
    "tokens twice": (body(max_completion_tokens=3), "got both: 2 and 3"),
    "temperature too high": (body(temperature=3), "temperature: input should be less than or equal to 2"),
    "temperature too low": (body(temperature=1e-9), "expected 0, or 0.01 to 2"),
    "top_p of 0": (body(temperature=1, top_p=0), "top_p: input should be greater than 0"),
    "top_p alone": (body(top_p=0.5), "only with a temperature above 0"),
    "seed of another type": (body(seed=1.5), "seed: input should be a valid integer"),
    "n": (body(n=2), "n: not supported here; leave it out (or 1), got 2"),
    "n true": (body(n=True), "n: not supported"),
    "frequency_penalty": (body(frequency_penalty=0.5), "frequency_penalty: not supported"),
    "logprobs": (body(logprobs=True), "logprobs: not supported"),
    "tools": (body(tools=[{"type": "function"}]), "tools: not supported"),
    "unknown field": (body(best_of=3), "best_of: no such field"),
    "unknown task": (body(task="dessert"), "task: expected one of ingredients"),
    "five stops": (body(stop=list("abcde")), "stop: expected at most 4"),
    "empty stop": (body(stop=""), "texts of 1 to 100"),
    "stop of another type": (body(stop=7), "stop: input should be"),
    "json_object": (body(response_format={"type": "json_object"}), "response_format.type: input should be"),
    "no schema": (body(response_format={"type": "json_schema"}), "response_format.json_schema: it goes with"),
    "schema without type": (
        body(response_format={**SCHEMA, "type": "text"}),
        "it goes with type 'json_schema'",
    ),
    "unknown type in schema": (
        body(
            response_format={
                "type": "json_schema",
                "json_schema": {"schema": {"type": "number", "multipleOf": "a"}},
            }
        ),
        "expected a JSON schema that can be kept to",
    ),
    "schema that refers elsewhere": (
        body(
            response_format={
                "type": "json_schema",
                "json_schema": {"schema": {"$ref": "http://127.0.0.1:1/a"}},
            }
        ),
        "expected a JSON schema that can be kept to",
    ),
    "large schema": (
        body(response_format={"type": "json_schema", "json_schema": {"schema": {"const": "a" * 60_000}}}),
        "at most 50,000 characters",
    ),
}


@pytest.mark.parametrize("case", BODIES)
def test_bodies_that_are_wrong(address, case):
    sent, text = BODIES[case]
    refused(address, sent, 400, text)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"model": "\\ud800"}', "is not JSON"),
        (b'{"max_tokens": NaN}', "is not JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"model": ' + b"9" * 4000 + b"}", "model: input should be a valid string"),
        (b'{"model": ' + b"9" * 5000 + b"}", "is not JSON: number out of range"),
    ],
)
def test_what_is_no_json(address, data, text):
    refused(address, data, 400, text)


def test_unknown_names_and_addresses(address):
    error = refused(address, body(model="../rode"), 404, "expected one of lora, rode")
    assert error["code"] == "model_not_found"
    refused(address, None, 404, "no such address", path="/v1/files", method="GET")
    refused(address, None, 404, "no such address", path="/docs", method="GET")
    refused(address, None, 405, "no such method", method="GET")
    refused(address, None, 404, "expected one of", path="/v1/models/gone", method="GET")


def test_what_a_foreign_page_can_send_is_refused(address):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        refused(address, body(), 415, "expected application/json", headers={"Content-Type": kind})
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost@evil.example"):
        refused(address, body(), 403, "Host: expected one of", headers={"Host": host})
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000"):
        assert send(address, body(), headers={"Host": host})[0] == 200


def test_a_large_upload(address):
    error = refused(address, b" " * 100_000_000, 413, "at most 20,000,000 bytes")
    assert error["code"] == "body_too_large"
    assert send(address, body())[0] == 200


def test_unicode_and_control_tokens_are_text(address):
    odd = "Was ist das? 🍣 <image></s><s>\u202e\u0000 \u00e9e\u0301"
    status, answered, _ = send(address, body(messages=said("user", odd), max_tokens=5))
    assert (status, answered["object"]) == (200, "chat.completion")
    assert send(address, body(user="me", n=1, frequency_penalty=0.0, stream=False, tools=[]))[0] == 200
