"""Live mode over real HTTP, against a server that misbehaves: records, ledger and number of requests are right."""

from __future__ import annotations

import base64
import io
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from label_job import dish, make_job, stage_of
from rode_food.records import Ingredient, read_records
from rode_food.unifood.label import LabelError
from rode_food.unifood.label.run import run
from vision_server import VisionServer


def outcome(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Ids that were labelled, and id -> reason of those set aside."""
    labelled = [record.id for record in read_records(folder / "label" / "records.jsonl")]
    lines = (folder / "label" / "set_aside.jsonl").read_text().splitlines()
    return labelled, {entry["id"]: entry["reason"] for entry in map(json.loads, lines)}


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(folder / "label" / "ledger.sqlite")) as ledger:
        return ledger.execute(query).fetchall()


def test_values(tmp_path):
    """Every number of the answer stands where it belongs, in the input's order, and nothing else has changed."""
    folder = make_job(tmp_path)
    with VisionServer() as server:
        report = run(stage_of(folder, base_url=server.url))
    before = list(read_records(folder / "source.jsonl"))
    after = list(read_records(folder / "label" / "records.jsonl"))
    assert [record.id for record in after] == [f"d{i:02d}" for i in range(6)]
    assert [(r.image, r.title, r.source, r.nutrition) for r in after] == [
        (r.image, r.title, r.source, None) for r in before
    ]
    for record in after:
        food, rice = record.ingredients
        assert (food.mass, food.text) == (100.0, f"100 g food{record.id[1:]}")
        assert rice.mass == rice.nutrition.mass == 50.0
        kind = sum(b"rice") % 7
        assert (rice.nutrition.fat, rice.nutrition.protein, rice.nutrition.carb) == pytest.approx(
            ((2 + kind) / 2, (5 + kind) / 2, (30 - kind) / 2)
        )
        assert rice.nutrition.energy == pytest.approx(
            9 * rice.nutrition.fat + 4 * rice.nutrition.protein + 4 * rice.nutrition.carb
        )
        sodium = rice.nutrition.micronutrients["sodium"]
        assert (sodium.value, sodium.unit) == (1.5, "mg")
    assert report["labelled"] == report["records"] == report["answers"] == 6
    assert report["tokens"] == {"input": 6000, "output": 600, "answers_with_estimated_tokens": 0}
    assert len(server.requests) == 6
    assert server.most_at_once <= 4


def test_what_is_sent(tmp_path):
    """The picture upright and small, the lines with amounts, no recipe and no title."""
    picture = Image.new("RGB", (200, 100), (250, 0, 0))
    exif = picture.getexif()
    exif[0x0112] = 6
    record = dish(tmp_path, 1, "2 cups  flour\n(sifted)", "pinch of salt")
    picture.save(record.image, exif=exif)
    folder = make_job(tmp_path, records=[record])
    with VisionServer() as server:
        run(stage_of(folder, base_url=server.url, extra_body={"top_k": 1}))
    body = server.requests[0].body
    system, user = body["messages"]
    assert "kilocalories" in system["content"]
    assert user["content"][0]["text"] == "Ingredients:\n1. 2 cups flour (sifted)\n2. pinch of salt"
    kind, _, data = user["content"][1]["image_url"]["url"].partition(",")
    assert kind == "data:image/jpeg;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (sent.format, sent.size) == ("JPEG", (32, 64))
    assert sent.getpixel((5, 50))[0] > 240
    assert "dish 1" not in json.dumps(body)
    assert (body["model"], body["temperature"], body["max_completion_tokens"], body["top_k"]) == (
        "gpt-4o",
        0.0,
        4096,
        1,
    )
    form = body["response_format"]
    assert form["type"] == "json_schema"
    assert form["json_schema"]["strict"] is True
    entry = form["json_schema"]["schema"]["properties"]["ingredients"]["items"]
    assert entry["required"] == list(entry["properties"])
    assert entry["additionalProperties"] is False


@pytest.mark.parametrize("structured", ["json_object", "none"])
def test_servers_without_schemas_are_told_in_words(tmp_path, structured):
    folder = make_job(tmp_path, 1)
    settings = dict(
        structured=structured, max_tokens_field="max_tokens", micronutrients=False, temperature=None
    )
    with VisionServer(faults={"food": ["fenced"]}) as server:
        run(stage_of(folder, base_url=server.url, **settings))
    body = server.requests[0].body
    assert body.get("response_format") == ({"type": "json_object"} if structured == "json_object" else None)
    assert '"carbohydrate_g": 0.0' in body["messages"][0]["content"]
    assert body["max_tokens"] == 4096
    assert not {"max_completion_tokens", "temperature"} & set(body)
    assert outcome(folder) == (["d00"], {})


def test_key(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    folder = make_job(tmp_path, 1)
    with VisionServer() as server:
        run(stage_of(folder, base_url=server.url, api_key_env="A_KEY"))
        assert server.requests[0].headers["authorization"] == "Bearer secret"
    monkeypatch.delenv("A_KEY")
    run(stage_of(folder, api_key_env="A_KEY"))  # all is in the ledger: no key is needed
    for mode in ("live", "batch"):
        with pytest.raises(LabelError, match=r"no API key for https://api.openai.com/v1: set A_KEY"):
            run(stage_of(folder, api_key_env="A_KEY", model="another", mode=mode))
    assert rows(folder, "SELECT count(*) FROM contents WHERE status = 'in flight'") == [(0,)]


# fault of the first request -> reason in the ledger while it is asked again, and words that the model is told
ANSWERED_BADLY = {
    "truncated": ("truncated", "cut off"),
    "half": ("not JSON", "not one JSON object"),
    "prose": ("not JSON", "not one JSON object"),
    "empty": ("not JSON", "empty answer"),
    "refusal": ("refusal", "refusal"),
    "content filter": ("refusal", "refusal"),
    "missing": ("missing ingredient", "no entry for ingredient 2"),
    "duplicate": ("duplicate ingredient", "ingredient 1: more than one entry"),
    "unknown": ("unknown ingredient", "ingredient 99: the list ends at 2"),
    "kilojoules": ("kilojoules", "give kilocalories"),
    "negative": ("negative", "mass_g: -100 is negative"),
    "NaN": ("not finite", "NaN"),
    "text for a number": ("wrong form", "mass_g: expected a number"),
    "heavy": ("not the stated mass", "its line states 100 g"),
}


@pytest.mark.parametrize("fault", ANSWERED_BADLY)
def test_a_bad_answer_is_asked_again_once_then_set_aside(tmp_path, fault):
    reason, words = ANSWERED_BADLY[fault]
    folder = make_job(tmp_path, 3)
    with VisionServer(faults={"food01": [fault], "food02": fault}) as server:
        report = run(stage_of(folder, base_url=server.url))
        assert outcome(folder) == (["d00", "d01"], {"d02": reason})
        assert [server.asked(f"food0{i}") for i in range(3)] == [1, 2, 2]
        again = next(seen for seen in server.requests if seen.turn == 2 and "food01" in seen.question)
        assert words in again.body["messages"][-1]["content"]
        assert again.body["messages"][-2]["role"] == "assistant"
        assert again.body["messages"][-2]["content"]
        run(stage_of(folder, base_url=server.url))  # settled: nothing is asked any more
        assert len(server.requests) == 5
    assert report["set_aside"] == {reason: 1}
    assert report["answers"] == 5
    assert rows(folder, "SELECT status, attempts FROM contents ORDER BY record") == [
        ("answered", 1),
        ("answered", 2),
        ("set aside", 2),
    ]
    assert rows(folder, "SELECT count(*), sum(price) FROM replies") == [(5, 0.0)]
    aside = json.loads((folder / "label" / "set_aside.jsonl").read_text())
    assert f"(at first: {reason})" in aside["detail"]


@pytest.mark.parametrize(
    "fault", ["429", "429 after", "500", "503", "hang", "cut", "drop", "html", "error in 200"]
)
def test_a_passing_fault_is_tried_again(tmp_path, fault):
    folder = make_job(tmp_path, 3)
    with VisionServer(faults={"food01": [fault, fault]}) as server:
        run(stage_of(folder, base_url=server.url, timeout=0.15))
        assert outcome(folder) == (["d00", "d01", "d02"], {})
        assert [server.asked(f"food0{i}") for i in range(3)] == [1, 3, 1]
        assert all(seen.turn == 1 for seen in server.requests)
    assert rows(folder, "SELECT attempts FROM contents ORDER BY record") == [(1,), (3,), (1,)]
    assert rows(folder, "SELECT count(*) FROM replies") == [(3,)]


@pytest.mark.parametrize(
    ("fault", "detail"),
    [
        ("500", "HTTP 500: The server had an error"),
        ("hang", "no answer within 0.1 s"),
        ("html", "not a chat completion"),
    ],
)
def test_tries_end_and_another_run_asks_again(tmp_path, fault, detail):
    folder = make_job(tmp_path, 3)
    with VisionServer(faults={"food01": [fault] * 4}) as server:
        report = run(stage_of(folder, base_url=server.url, timeout=0.1))
        assert outcome(folder) == (["d00", "d02"], {"d01": "no answer"})
        assert detail in (folder / "label" / "set_aside.jsonl").read_text()
        assert report["set_aside"] == {"no answer": 1}
        assert server.asked("food01") == 4
        run(stage_of(folder, base_url=server.url))
        assert outcome(folder) == (["d00", "d01", "d02"], {})
        assert [server.asked(f"food0{i}") for i in range(3)] == [1, 5, 1]


@pytest.mark.parametrize("fault", ["400 image", "400 words", "400"])
def test_a_refused_picture_is_its_records_fault(tmp_path, fault):
    folder = make_job(tmp_path, 3)
    with VisionServer(faults={"food01": fault}) as server:
        run(stage_of(folder, base_url=server.url))
        assert outcome(folder) == (["d00", "d02"], {"d01": "refused by the server"})
        assert server.asked("food01") == 1  # not tried again
        run(stage_of(folder, base_url=server.url))
        # one of which it is not said that it is the picture's is asked once more in another run
        assert server.asked("food01") == (2 if fault == "400" else 1)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("401", "HTTP 401: Incorrect API key provided"),
        ("403", "HTTP 403: Country not supported"),
        ("404", "HTTP 404: The model `none` does not exist"),
        ("400 parameter", "HTTP 400: Unsupported parameter: 'max_tokens'"),
        ("400 blind", "HTTP 400: llava-text is not a multimodal model"),
        ("429 quota", "HTTP 429: You exceeded your current quota"),
    ],
)
def test_a_fault_of_the_job_stops_it(tmp_path, fault, told):
    """At once, with one error; what was answered before, or is under way, is kept."""
    folder = make_job(tmp_path, 24)
    with VisionServer(faults={"food03": fault}) as server:
        with pytest.raises(LabelError) as error:
            run(stage_of(folder, base_url=server.url, concurrency=2))
        assert str(error.value) == f"the endpoint refuses the job: {told}; mend that and run again"
        assert not (folder / "label" / "records.jsonl").exists()
        first = len(server.requests)
        # one of the first three may have been in preparation still, and the other worker went on for a moment
        assert 3 <= first < 24
        assert rows(folder, "SELECT count(*) FROM replies") == [(first - 1,)]
        assert rows(folder, "SELECT count(*) FROM contents WHERE status = 'in flight'") == [(0,)]
        server.faults.clear()
        run(stage_of(folder, base_url=server.url))
        assert len(server.requests) == 25
    assert outcome(folder)[0] == [f"d{i:02d}" for i in range(24)]


def test_a_stopped_job_does_not_try_again(tmp_path):
    """What waits for another try when the job stops is not sent any more."""
    folder = make_job(tmp_path, 2)
    with VisionServer(faults={"food00": "500", "food01": "401"}, delay=0.02) as server:
        with pytest.raises(LabelError, match="HTTP 401"):
            run(stage_of(folder, base_url=server.url, backoff=4.0, concurrency=2))
        assert server.asked("food00") <= 2
    assert rows(folder, "SELECT status, reason FROM contents") == 2 * [("open", None)]


def test_a_server_that_refuses_everything_stops_the_job(tmp_path):
    folder = make_job(tmp_path, 12)
    with VisionServer(faults={"food": "400"}) as server:
        with pytest.raises(LabelError, match="3 contents in a row got no answer, the last: HTTP 400"):
            run(stage_of(folder, base_url=server.url, give_up_after=3, concurrency=1))
        assert len(server.requests) == 3
        with pytest.raises(
            LabelError, match=r'none of 12 records could be labelled; the last: .*"refused by'
        ):
            run(stage_of(folder, base_url=server.url))


def test_no_server(tmp_path):
    with VisionServer() as server:
        url = server.url
    folder = make_job(tmp_path, 4)
    with pytest.raises(
        LabelError, match=r"2 contents in a row got no answer, the last: connection: .*refused"
    ):
        run(stage_of(folder, base_url=url, retries=1, give_up_after=2))
    assert rows(folder, "SELECT sum(lost) FROM contents") == [(0.0,)]


def test_retry_after_is_waited_for_by_all(tmp_path):
    """A pause that is asked for holds every request back; a longer one than is allowed ends the job."""
    folder = make_job(tmp_path, 6)
    with VisionServer(faults={"food00": ["429 after"]}, retry_after="0.3") as server:
        run(stage_of(folder, base_url=server.url, concurrency=1))
        gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
        assert gaps[0] >= 0.29
        server.faults["food99"] = ["429 after"]
        server.retry_after = "7200"
        folder = make_job(tmp_path / "late", records=[dish(folder, 99)])
        with pytest.raises(LabelError, match="the server asks for a pause of 7200 s"):
            run(stage_of(folder, base_url=server.url))


def test_the_same_content_is_asked_once(tmp_path):
    one, other = dish(tmp_path, 1), dish(tmp_path, 2)
    records = [
        one,
        other,
        type(one)(**{**vars(one), "id": "again", "title": "another title"}),
        type(one)(**{**vars(one), "id": "more", "ingredients": (*one.ingredients, Ingredient("salt"))}),
    ]
    folder = make_job(tmp_path, records=records)
    with VisionServer() as server:
        run(stage_of(folder, base_url=server.url))
        assert len(server.requests) == 3
        assert outcome(folder)[0] == ["d01", "d02", "again", "more"]
        run(stage_of(folder, base_url=server.url, model="another"))  # another question: asked anew
        assert len(server.requests) == 6
    first, _, again, _ = read_records(folder / "label" / "records.jsonl")
    assert first.ingredients == again.ingredients


def test_measured_records_pass_and_others_without_ingredients_do_not(tmp_path):
    with VisionServer() as server:
        folder = make_job(tmp_path, 1)
        run(stage_of(folder, base_url=server.url))
        measured = next(read_records(folder / "label" / "records.jsonl"))
        bare = type(measured)(**{**vars(measured), "id": "bare", "ingredients": ()})
        gone = type(measured)(**{**vars(dish(tmp_path, 5)), "image": str(tmp_path / "gone.jpg")})
        cut = dish(tmp_path, 6)
        Path(cut.image).write_bytes(Path(cut.image).read_bytes()[:120])
        folder = make_job(tmp_path / "second", records=[measured, bare, gone, cut])
        report = run(stage_of(folder, base_url=server.url))
        assert len(server.requests) == 1
    assert outcome(folder) == (["d00"], {"bare": "no ingredients", "d05": "picture", "d06": "picture"})
    assert report["labelled_by_source"] == 1
    assert list(read_records(folder / "label" / "records.jsonl")) == [measured]


def test_a_longer_answer_is_worth_another_try(tmp_path):
    """What was cut off at a smaller limit is asked again with a larger one; nothing else is."""
    folder = make_job(tmp_path, 2)
    with VisionServer(faults={"food01": ["truncated", "truncated"]}) as server:
        run(stage_of(folder, base_url=server.url, max_tokens=100))
        assert outcome(folder) == (["d00"], {"d01": "truncated"})
        run(stage_of(folder, base_url=server.url, max_tokens=200))
        assert outcome(folder) == (["d00", "d01"], {})
        assert [server.asked("food00"), server.asked("food01")] == [1, 3]
        assert server.requests[-1].turn == 1


def test_other_tolerances_need_no_new_answers(tmp_path):
    folder = make_job(tmp_path, 2)
    with VisionServer(faults={"food01": "heavy"}) as server:
        run(stage_of(folder, base_url=server.url))
        assert outcome(folder) == (["d00"], {"d01": "not the stated mass"})
        run(stage_of(folder, base_url=server.url, stated_mass_tolerance=1000.0))
        assert outcome(folder) == (["d00", "d01"], {})
        assert len(server.requests) == 3
