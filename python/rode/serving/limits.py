"""How much one request, and all of them together, may ask for."""

from __future__ import annotations

from dataclasses import dataclass

MAX_CHARACTERS = 100_000
"""Characters of text in a request; a longer one is refused before it is tokenized."""


@dataclass(frozen=True)
class Limits:
    """Bounds of the server.

    Attributes:
        batch_size: requests that are answered together.
        queue: requests that may wait beside those that are answered.
        timeout: seconds from a request's arrival to the end of its answer.
        max_new_tokens: the longest answer that may be asked for, in tokens.
        default_new_tokens: the longest answer of a request that does not say.
        max_pictures: pictures of a request.
        max_bytes: of a request's body.
        gather: seconds for which a batch waits for requests whose pictures are just being read; one that is alone never waits.
    """

    batch_size: int = 8
    queue: int = 64
    timeout: float = 120.0
    max_new_tokens: int = 1024
    default_new_tokens: int = 256
    max_pictures: int = 4
    max_bytes: int = 20_000_000
    gather: float = 0.1
