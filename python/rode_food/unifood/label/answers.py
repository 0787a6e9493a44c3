"""From what the server sent to what the ledger keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rode_food.unifood.label.client import Fault
from rode_food.unifood.label.errors import LabelError
from rode_food.unifood.label.ledger import Change, Ledger, Reply
from rode_food.unifood.label.price import Estimate, price, usage_of
from rode_food.unifood.label.settings import LabelSettings
from rode_food.unifood.label.work import Item, judge


class Misses:
    """Stops a job whose requests all fail: each by itself might be the record's fault, all of them are not."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0

    def count(self, fault: Fault | None) -> None:
        """The error of a request that has ended; None if it was answered. Raises LabelError when it is enough."""
        if fault is None or fault.kind == "record":
            self.in_a_row = 0
            return
        if fault.kind == "picture":  # was not sent
            return
        self.in_a_row += 1
        if fault.kind == "job":
            raise LabelError(f"the endpoint refuses the job: {fault.detail}; mend that and run again")
        if self.in_a_row >= self.limit:
            raise LabelError(
                f"{self.in_a_row} contents in a row got no answer, the last: {fault.detail}; see to the endpoint "
                "and run again"
            )


def make_reply(raw: dict[str, Any], asked: Estimate, settings: LabelSettings) -> Reply:
    text = raw["choices"][0]["message"].get("content") or ""
    prompt_tokens, answer_tokens, estimated = usage_of(raw, text, asked, settings)
    cost = price(prompt_tokens, answer_tokens, settings)
    return Reply(raw, prompt_tokens, answer_tokens, estimated, cost, settings.max_tokens)


def change_by_reply(
    ledger: Ledger, item: Item, reply: Reply, settings: LabelSettings, attempts: int = 1, lost: float = 0.0
) -> Change:
    """The status that follows from the answers so far and this one: "open" if it is to be asked again."""
    before = ledger.get(item.key)
    assert before is not None, "marked before it was sent"
    verdict = judge(
        replace(before, status="open", replies=(*before.replies, reply)), item.ingredients, settings
    )
    status = "open" if verdict.state == "ask" else verdict.state
    return Change(item.key, status, verdict.reason or None, verdict.detail or None, reply, attempts, lost)


def change_by_fault(item: Item, fault: Fault, attempts: int = 1, lost: float = 0.0) -> Change:
    """Final for a content that the server refuses for its own sake; what else got no answer is asked in another run."""
    if fault.kind == "job":
        return Change(item.key, "open", attempts=attempts, lost=lost)
    status = "refused" if fault.kind == "record" else "no answer"
    reasons = {"record": "refused by the server", "unclear": "refused by the server", "picture": "picture"}
    return Change(item.key, status, reasons.get(fault.kind, "no answer"), fault.detail, None, attempts, lost)
