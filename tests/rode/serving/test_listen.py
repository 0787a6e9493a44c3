"""uvicorn beside other libraries."""

from __future__ import annotations

import logging

from serving import need_serve

need_serve()


def test_handlers_of_other_libraries_stay_open():
    """logging.config closes every handler that there is, and absl's closes the stream that it was given, such as a test's."""
    from fastapi import FastAPI

    from rode.serving.limits import Limits
    from rode.serving.listen import server

    closed = []

    class Handler(logging.StreamHandler):
        def close(self):
            closed.append(self)
            super().close()

    handler = Handler()
    server(FastAPI(), Limits())
    assert not closed
    handler.close()
