"""A vision endpoint on loopback that speaks OpenAI's chat completions and Batch API, and misbehaves where it is told to.

    python tests/support/vision_server.py --foods sr28_foods.csv --port 8100

serves plausible answers from a table of foods, for trying the label stage without a model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rode_food.lines.simple import parse_ingredient_line
from vision_answers import FAULTS, Nutrition, error_object, foods_of, plain_food, spoil

PROMPT_TOKENS, ANSWER_TOKENS = 1000, 100
"""Usage of every answer."""


@dataclass
class Seen:
    """One request for an answer.

    Attributes:
        question: its first user message.
        turn: 1, or 2 for one that is asked again.
        body: as it came.
        fault: what was done instead of answering well; None for a good answer.
        batch: it came in a batch.
        headers: of the HTTP request, lower case.
    """

    question: str
    turn: int
    body: dict[str, Any]
    fault: str | None
    batch: bool = False
    headers: dict[str, str] = field(default_factory=dict)


class VisionServer:
    """`with VisionServer(...) as server:` serves at `server.url`.

    Args:
        nutrition: (name, grams) -> what is in it.
        faults: words of a question -> faults of the requests that hold them: one after another from a list, then none;
            a single string is for all; with " at first" at its end, for those that are not asked again. See
            `vision_answers.FAULTS` and `vision_answers.spoil`.
        delay: seconds before each answer.
        polls: how often a batch is said to be under way.
        batch_faults: of the batches made, one after another; "token_limit_exceeded" and other codes fail it, "expired"
            answers the first half.
        hook: called as hook(event, number) at each event ("chat", "answered", "upload", "uploaded", "create", "created",
            "retrieve", "content", "list"), counted from 1 for each.
        retry_after: value of that header for "429 after".
        refuses: a path that it does not have.
    """

    def __init__(
        self,
        nutrition: Callable[[str, float], Nutrition] = plain_food,
        faults: Mapping[str, str | Sequence[str]] | None = None,
        *,
        delay: float = 0.0,
        polls: int = 0,
        batch_faults: Sequence[str] = (),
        hook: Callable[[str, int], None] = lambda event, number: None,
        retry_after: str = "0.05",
        refuses: str = "",
        port: int = 0,
    ) -> None:
        self.nutrition = nutrition
        self.faults = {
            words: plan if isinstance(plan, str) else list(plan) for words, plan in (faults or {}).items()
        }
        self.delay = delay
        self.polls = polls
        self.batch_faults = list(batch_faults)
        self.hook = hook
        self.retry_after = retry_after
        self.refuses = refuses
        self.requests: list[Seen] = []
        self.calls: list[str] = []
        """Method and path of every HTTP request."""
        self.times: list[float] = []
        """When each chat request came, in seconds of a monotonic clock."""
        self.most_at_once = 0
        self.files: dict[str, tuple[str, bytes]] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self._events: dict[str, int] = {}
        self._under_way = 0
        self._numbers = itertools.count(1)
        self.lock = threading.Lock()
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # clients are killed here
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> VisionServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def serve_forever(self) -> None:
        self._http.serve_forever()

    def asked(self, words: str) -> int:
        """Requests whose question holds the words."""
        return sum(words in seen.question for seen in self.requests)

    def event(self, name: str) -> None:
        with self.lock:
            self._events[name] = number = self._events.get(name, 0) + 1
        self.hook(name, number)

    def number(self) -> int:
        return next(self._numbers)

    def see(self, body: dict[str, Any], *, batch: bool, headers: Mapping[str, str] | None = None) -> Seen:
        """Notes a request and decides what is done with it."""
        users = [message for message in body["messages"] if message["role"] == "user"]
        question = next(part["text"] for part in users[0]["content"] if part["type"] == "text")
        with self.lock:
            fault = None
            for words, plan in self.faults.items():
                if words in question:
                    fault = plan if isinstance(plan, str) else plan.pop(0) if plan else None
                    break
            headers = {name.lower(): value for name, value in (headers or {}).items()}
            if fault and fault.endswith(" at first"):
                fault = None if len(users) > 1 else fault.removesuffix(" at first")
            seen = Seen(question, len(users), body, None if fault == "ok" else fault, batch, headers)
            self.requests.append(seen)
            self.times.append(time.monotonic())
        return seen

    def answer(self, seen: Seen) -> dict[str, Any]:
        """A chat completion, good or with the fault in its content."""
        micronutrients = "micronutrients" in json.dumps(seen.body)
        entries = []
        for line in seen.question.splitlines()[1:]:
            number, _, text = line.partition(". ")
            parsed = parse_ingredient_line(text)
            name, mass = (parsed.name, parsed.mass or 60.0) if parsed else (text, 60.0)
            values = dict(self.nutrition(name, mass))
            entry = {
                "number": int(number),
                "mass_g": mass,
                "energy_kcal": round(values["energy"], 4),
                "fat_g": round(values["fat"], 4),
                "protein_g": round(values["protein"], 4),
                "carbohydrate_g": round(values["carb"], 4),
            }
            if micronutrients:
                triples = values.get("micronutrients", [("sodium", 1.5, "mg")])
                entry["micronutrients"] = [{"name": n, "value": v, "unit": u} for n, v, u in triples]
            entries.append(entry)
        message: dict[str, Any] = {"role": "assistant", "refusal": None}
        finish, content = spoil(seen.fault, entries, message)
        message["content"] = content
        completion: dict[str, Any] = {
            "id": f"chatcmpl-{self.number()}",
            "object": "chat.completion",
            "created": 1,
            "model": seen.body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
        }
        if seen.fault != "no usage":
            total = PROMPT_TOKENS + ANSWER_TOKENS
            completion["usage"] = {
                "prompt_tokens": PROMPT_TOKENS,
                "completion_tokens": ANSWER_TOKENS,
                "total_tokens": total,
            }
        return completion

    def run_batch(self, batch: dict[str, Any]) -> None:
        """Answers a batch's file, once; as OpenAI does, errors go to a file of their own."""
        fault = batch.pop("fault")
        if fault and fault != "expired":
            batch["status"] = "failed"
            batch["errors"] = {
                "object": "list",
                "data": [{"code": fault, "message": f"told to fail: {fault}"}],
            }
            return
        good, bad = [], []
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]][1].splitlines()]
        for number, line in enumerate(lines):
            entry = {"id": f"line-{number}", "custom_id": line["custom_id"], "response": None, "error": None}
            if fault == "expired" and number >= len(lines) // 2:
                bad.append(entry | {"error": {"code": "batch_expired", "message": "not done in time"}})
                continue
            seen = self.see(line["body"], batch=True)
            if seen.fault == "no line":
                continue
            if seen.fault in FAULTS:
                status, error = FAULTS[seen.fault]
                bad.append(entry | {"response": {"status_code": status, "body": {"error": error}}})
            else:
                good.append(entry | {"response": {"status_code": 200, "body": self.answer(seen)}})
        # OpenAI keeps no order
        for name, rows in (("output_file_id", good[::-1]), ("error_file_id", bad)):
            if rows:
                batch[name] = f"file-{self.number()}"
                data = "".join(json.dumps(row) + "\n" for row in rows).encode()
                self.files[batch[name]] = (f"{batch['id']}_{name}.jsonl", data)
        batch["status"] = "expired" if fault == "expired" else "completed"


class _Handler(BaseHTTPRequestHandler):
    owner: VisionServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body go out one by one: else 40 ms each

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        kind = "text/html" if data.startswith(b"<") else "application/json"
        self._head(status, len(data), {"Content-Type": kind} | dict(headers or {}))
        self.wfile.write(data)

    def _head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def do_POST(self) -> None:
        owner = self.owner
        owner.calls.append(f"POST {self.path}")
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/chat/completions":
            with owner.lock:
                owner._under_way += 1
                owner.most_at_once = max(owner.most_at_once, owner._under_way)
            try:
                self._chat(json.loads(data))
            finally:
                with owner.lock:
                    owner._under_way -= 1
        elif self.path == owner.refuses:
            self._send(404, {"error": error_object("no such path", "invalid_request_error")})
        elif self.path == "/v1/files":
            owner.event("upload")
            boundary = self.headers["Content-Type"].split("boundary=")[1].encode()
            part = next(p for p in data.split(b"--" + boundary) if b'name="file"' in p)
            head, _, content = part.partition(b"\r\n\r\n")
            name = re.search(rb'filename="([^"]*)"', head)[1].decode()
            ident = f"file-{owner.number()}"
            owner.files[ident] = (name, content.removesuffix(b"\r\n"))
            owner.event("uploaded")
            self._send(200, self._file(ident))
        elif self.path == "/v1/batches":
            owner.event("create")
            ident = f"batch-{owner.number()}"
            fault = owner.batch_faults.pop(0) if owner.batch_faults else None
            fault = None if fault == "ok" else fault
            owner.batches[ident] = json.loads(data) | {
                "id": ident,
                "object": "batch",
                "created_at": int(time.time()),
                "status": "validating",
                "fault": fault,
                "polls": 0 if fault else owner.polls,
            }
            owner.event("created")
            if fault == "drop":
                owner.batches[ident]["fault"] = None
                self._hang_up()
            else:
                self._send(200, owner.batches[ident])
        else:
            self._send(404, {"error": error_object("no such path", "invalid_request_error")})

    def _file(self, ident: str) -> dict[str, Any]:
        name, content = self.owner.files[ident]
        return {
            "id": ident,
            "object": "file",
            "bytes": len(content),
            "created_at": 1,
            "filename": name,
            "purpose": "batch",
            "status": "processed",
        }

    def _chat(self, body: dict[str, Any]) -> None:
        owner = self.owner
        seen = owner.see(body, batch=False, headers=dict(self.headers))
        owner.event("chat")
        if owner.delay:
            owner.closing.wait(owner.delay)
        fault = seen.fault
        if fault in FAULTS:
            status, error = FAULTS[fault]
            headers = {"Retry-After": owner.retry_after} if fault == "429 after" else {}
            self._send(status, {"error": error}, headers)
        elif fault == "hang":
            owner.closing.wait(5.0)
            self._hang_up()
        elif fault == "drop":
            self._hang_up()
        elif fault == "cut":
            data = json.dumps(owner.answer(seen)).encode()
            self._head(200, len(data), {"Content-Type": "application/json"})
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self._hang_up()
        elif fault == "html":
            self._send(200, b"<html>Bad gateway</html>")
        elif fault == "error in 200":
            self._send(200, {"error": {"message": "upstream", "code": 502}})
        else:
            self._send(200, owner.answer(seen))
            owner.event("answered")

    def do_GET(self) -> None:
        owner = self.owner
        owner.calls.append(f"GET {self.path}")
        path, _, query = self.path.partition("?")
        parts = path.strip("/").split("/")[1:]
        if parts[0] == "batches" and len(parts) == 2 and parts[1] in owner.batches:
            owner.event("retrieve")
            batch = owner.batches[parts[1]]
            if "fault" in batch:
                if batch["polls"]:
                    batch["status"] = "in_progress"
                    batch["polls"] -= 1
                else:
                    owner.run_batch(batch)
            self._send(200, batch)
        elif parts in (["batches"], ["files"]):
            owner.event("list")
            every = (
                list(owner.batches.values())[::-1]
                if parts == ["batches"]
                else [*map(self._file, owner.files)][::-1]
            )
            after = re.search(r"after=([^&]+)", query)
            start = next((i + 1 for i, row in enumerate(every) if after and row["id"] == after[1]), 0)
            page = every[start : start + 2]  # small, so that clients have to turn pages
            more = start + 2 < len(every)
            self._send(200, {"object": "list", "data": page, "has_more": more})
        elif parts[0] == "files" and parts[2:] == ["content"] and parts[1] in owner.files:
            owner.event("content")
            self._send(200, owner.files[parts[1]][1])
        else:
            self._send(404, {"error": error_object("no such thing", "invalid_request_error")})

    def do_DELETE(self) -> None:
        self.owner.calls.append(f"DELETE {self.path}")
        ident = self.path.rpartition("/")[2]
        self.owner.files.pop(ident, None)
        self._send(200, {"id": ident, "object": "file", "deleted": True})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--foods", type=Path, help="CSV with description, kcal, fat_g, protein_g, carb_g per 100 g"
    )
    parser.add_argument("--port", type=int, default=8100)
    args = parser.parse_args()
    server = VisionServer(foods_of(args.foods) if args.foods else plain_food, port=args.port)
    print(f"serving at {server.url}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
