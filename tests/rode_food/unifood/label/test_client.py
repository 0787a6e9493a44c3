"""What an HTTP status means for the job, and how long a server asks to wait."""

from __future__ import annotations

import sys

import pytest

from rode_food.unifood.label.client import (
    RequestFailed,
    check_completion,
    fault_of_status,
    make_client,
    retry_after,
)
from rode_food.unifood.label.settings import LabelSettings


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (401, {"message": "no"}, "job"),
        (402, "pay", "job"),
        (404, {"message": "no such model"}, "job"),
        (429, {"code": "insufficient_quota"}, "job"),
        (400, {"message": "x", "code": "invalid_image_format"}, "record"),
        (400, {"message": "x", "code": "content_filter"}, "record"),
        (400, {"message": "This model's maximum context length is 4096 tokens"}, "record"),
        (
            400,
            {"message": "You uploaded an unsupported image. Please make sure your image is valid."},
            "record",
        ),
        (400, {"message": "cannot identify image file"}, "record"),
        (413, "Request Entity Too Large", "record"),
        (400, {"message": "image input is not supported - hint: you may need to provide the mmproj"}, "job"),
        (500, {"message": "image input is not supported - hint: you may need to provide the mmproj"}, "job"),
        (400, {"message": "this model does not support image input"}, "job"),
        (400, {"message": "bad", "param": "response_format"}, "job"),
        (400, {"message": "something"}, "unclear"),
        (418, {"message": "a teapot"}, "unclear"),
        (408, None, "retry"),
        (409, None, "retry"),
        (429, {"message": "slow down"}, "retry"),
        (500, "oops", "retry"),
        (529, "overloaded", "retry"),
    ],
)
def test_kind(status, error, kind):
    assert fault_of_status(status, error).kind == kind


def test_retry_after():
    assert retry_after({"retry-after": "7"}) == 7.0
    assert retry_after({"retry-after-ms": "250", "retry-after": "1"}) == 0.25
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, now=1445412470.0) == 10.0
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    for nonsense in ({}, {"retry-after": "soon"}, {"retry-after": "inf"}, {"retry-after": "-3"}):
        assert retry_after(nonsense) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"choices": []}',
        '{"choices": [{}]}',
        '{"choices": [{"message": {"content": 3}}]}',
    ],
)
def test_what_is_no_completion_is_tried_again(text):
    with pytest.raises(RequestFailed) as failed:
        check_completion(text)
    assert (failed.value.fault.kind, failed.value.fault.lost) == ("retry", True)


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"needs the openai client: pip install 'rode\[data\]'"):
        make_client(LabelSettings())
