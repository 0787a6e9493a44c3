"""Settings of the label stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rode_food.settings import SettingsError


@dataclass
class LabelSettings:
    """How nutrition is asked for ([labelling.md](labelling.md)). Times are in seconds, prices in whatever currency the endpoint
    bills."""

    base_url: str = "https://api.openai.com/v1"
    """Address of any OpenAI-compatible server, a local one as well."""
    model: str = "gpt-4o"
    """Its name at that server."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the key; a local server needs none."""
    mode: Literal["live", "batch"] = "live"
    """One request at a time for each of `concurrency`, or OpenAI's Batch API: half the price, within a day."""
    ledger: str | None = None
    """The SQLite file that keeps every answer; None: `ledger.sqlite` in the stage's folder."""

    structured: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How far the server can be made to answer in JSON; what it cannot enforce is asked for in words."""
    micronutrients: bool = True
    """Ask for them as well."""
    image_side: int = 768
    """Pictures are sent as JPEG, the longest side at most so many pixels."""
    image_detail: Literal["high", "low", "auto"] = "high"
    """OpenAI's own; others ignore it."""
    temperature: float | None = 0.0
    """None: not sent, for models that refuse it."""
    max_tokens: int = 4096
    """Tokens of one answer, hidden reasoning included."""
    max_tokens_field: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    """OpenAI's name for that limit; local servers may know only the older `max_tokens`."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Further fields of each request, such as `{reasoning_effort: low}`."""

    concurrency: int = 8
    """Requests under way at once (live); pictures encoded at once (batch)."""
    timeout: float = 120.0
    """How long the server may send nothing."""
    retries: int = 6
    """Tries beyond the first, where a later one may succeed."""
    backoff: float = 1.0
    """Longest wait before the second try; doubles with every further one; the wait is drawn from 0 up to it."""
    backoff_limit: float = 60.0
    """The longest such wait."""
    retry_after_limit: float = 600.0
    """A server that asks for a longer pause (Retry-After) stops the job."""
    give_up_after: int = 20
    """Contents in a row that got no answer, after which the job stops."""

    wait: bool = True
    """Batch: poll until all is done; false: submit, fetch what is there, and return."""
    poll: float = 60.0
    """Batch: how often the server is asked."""
    batch_requests: int = 2000
    """Requests of one batch; OpenAI allows 50,000."""
    batch_bytes: int = 90_000_000
    """Bytes of one batch's file; OpenAI allows 200 MB."""
    batches_at_once: int = 10
    """Batches under way at the server."""

    price_input: float | None = None
    """For a million tokens of requests; needed for `budget`, with `price_output`."""
    price_output: float | None = None
    """For a million tokens of answers."""
    batch_price_factor: float = 0.5
    """What mode batch costs of the live price."""
    tokens_per_image: int | None = None
    """None: gpt-4o's rule, 85 tokens and 170 for each tile of 512 pixels; other models count otherwise."""
    budget: float | None = None
    """What the ledger's answers may cost in all; a request that could pass it is not sent."""

    energy_over: float = 0.2
    """Energy may exceed 4/9/4 kcal/g of protein, fat and carbohydrate by this share ..."""
    energy_under: float = 0.3
    """... or fall short of it: fibre gives less than 4."""
    energy_slack: float = 10.0
    """kcal by which it may miss in any case."""
    mass_slack: float = 0.05
    """Share of the mass by which fat, protein and carbohydrate together may exceed it (and 1 g)."""
    stated_mass_tolerance: float = 0.5
    """Share by which the mass may differ from one that the ingredient's line states (and 5 g): peel, bones, a tin's water."""

    @property
    def price_factor(self) -> float:
        return self.batch_price_factor if self.mode == "batch" else 1.0

    def check(self) -> None:
        """Raises SettingsError for a value that cannot be meant."""
        at_least = {
            1: "image_side max_tokens concurrency give_up_after batch_requests batch_bytes batches_at_once",
            0: "retries backoff backoff_limit retry_after_limit poll price_input price_output batch_price_factor "
            "tokens_per_image budget energy_over energy_under energy_slack mass_slack stated_mass_tolerance",
        }
        for least, names in at_least.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not value >= least:
                    raise SettingsError(f"label.{name}: expected at least {least}, got {value}")
        if not self.timeout > 0:
            raise SettingsError(f"label.timeout: expected seconds above 0, got {self.timeout}")
        if self.budget is not None and (self.price_input is None or self.price_output is None):
            raise SettingsError("label.budget: needs label.price_input and label.price_output")
