"""Memory over many requests."""

from __future__ import annotations

import gc
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving import ask, data_url, need_serve, plate

need_serve()

MIB = 2**20


def resident() -> int:
    """Bytes of this process's memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="no /proc/self/statm here")
def test_memory_stays_flat_over_2000_requests(client):
    """Pictures, questions and options are all different, some streams are left and some requests are wrong.

    Lengths are few: kernels keep what they prepared for a shape, up to 4,096 of them, and that is not what is looked for.
    """
    import openai

    def one(index):
        draw = random.Random(index)
        colour = tuple(draw.randrange(256) for _ in range(3))
        pictures = [data_url(plate(colour, 200 + index % 50))] * (index % 3)
        question = f"What is it? {index:05d} " + "x" * draw.choice((0, 50, 100))
        options = {"max_tokens": 1 + index % 7, "model": ("rode", "lora")[index % 2]}
        if index % 5 == 0:
            options |= {"temperature": 1.0, "stop": f"{index}"}
        if index % 11 == 0:
            kind = {"type": "object", "properties": {f"key{index}": {"type": "integer"}}}
            options["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": kind},
            }
        if index % 13 == 0:
            options["max_tokens"] = 100_000
        try:
            found = client.chat.completions.create(
                messages=ask(question, *pictures), stream=index % 7 == 0, **options
            )
            if index % 7 == 0:
                if index % 2:
                    found.close()
                else:
                    list(found)
        except openai.BadRequestError:
            assert index % 13 == 0

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(1000)))
        half = resident()
        list(pool.map(one, range(1000, 2000)))
        last = resident()
    print(f"resident: {half / MIB:.1f} MiB after 1,000 requests, {last / MIB:.1f} MiB after 2,000")
    # pictures alone were 250 MB of bytes in the second half
    assert last - half < 8 * MIB
