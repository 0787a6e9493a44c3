"""Batch mode over real HTTP: the same records as live mode, nothing asked twice, and every way in which a batch can end."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest

from label_job import dish, make_job, stage_of
from rode_food.unifood.label import LabelError, Unfinished
from rode_food.unifood.label.run import run
from vision_server import VisionServer


def written(folder, into="label"):
    return (folder / into / "records.jsonl").read_bytes(), (folder / into / "set_aside.jsonl").read_bytes()


def live(folder, server_faults=None):
    """What live mode writes for the same dishes."""
    with VisionServer(faults=server_faults) as server:
        run(stage_of(folder, into="live", base_url=server.url))
    return written(folder, "live")


def batch(folder, server, **settings):
    return run(stage_of(folder, base_url=server.url, mode="batch", **settings))


def test_as_live_mode(tmp_path):
    folder = make_job(tmp_path, 7)
    faults = {"food01": ["kilojoules"], "food02": "prose", "food03": "400 image", "food04": ["500", "429"]}
    with VisionServer(faults=faults, polls=2) as server:
        report = batch(folder, server, batch_requests=3)
        assert {path.split("?")[0] for path in server.calls} >= {"POST /v1/files", "POST /v1/batches"}
        assert not any("chat" in call for call in server.calls)
        assert [server.asked(f"food0{i}") for i in range(7)] == [1, 2, 2, 1, 3, 1, 1]
        assert [
            name for name, _ in server.files.values() if name.startswith("batch-") and "file_id" not in name
        ] == []
        again = next(seen for seen in server.requests if seen.turn == 2 and "food01" in seen.question)
        assert "kilocalories" in again.body["messages"][-1]["content"]
    assert report["set_aside"] == {"not JSON": 1, "refused by the server": 1}
    assert report["answers"] == 8
    assert live(folder, {"food02": "prose", "food03": "400 image"}) == written(folder)
    assert list((folder / "label").glob("batch-*")) == []


def test_split_by_requests_and_by_bytes(tmp_path):
    folder = make_job(tmp_path, 7)
    with VisionServer() as server:
        batch(folder, server, batch_requests=3)
        sizes = [len(content.splitlines()) for name, content in server.files.values() if "output" in name]
        assert sizes == [3, 3, 1]
    other = make_job(tmp_path / "other", 7)
    with VisionServer() as server:
        batch(other, server, batch_bytes=9000)
        files = [
            json.loads(line)
            for name, c in server.files.values()
            if "output" in name
            for line in c.splitlines()
        ]
        assert len(files) == 7
        assert len(server.batches) == 4  # a request of this job is between 3000 and 4500 bytes
    assert written(folder)[0].replace(b"images", b"") != b""
    with VisionServer(polls=1) as server:
        batch(make_job(tmp_path / "third", 7), server, batch_requests=1, batches_at_once=2)
        kinds = [call.split("?")[0] for call in server.calls if call.startswith("POST /v1/batches")]
        assert len(kinds) == 7
        under_way = most = 0
        for call in server.calls:  # a batch's output is fetched when it has ended
            under_way += (call == "POST /v1/batches") - call.endswith("/content")
            most = max(most, under_way)
        assert most == 2


def test_not_waiting(tmp_path):
    folder = make_job(tmp_path, 5)
    with VisionServer(polls=1) as server:
        with pytest.raises(
            Unfinished, match="4 requests are waiting at the server, 1 contents are still to be"
        ) as stop:
            batch(folder, server, wait=False, batch_requests=2, batches_at_once=2)
        assert stop.value.report["waiting"] == 4
        assert not (folder / "label" / "records.jsonl").exists()
        with pytest.raises(LabelError, match="2 batches of an earlier run are under way: finish them with"):
            run(stage_of(folder, base_url=server.url))
        for told in (
            "4 requests are waiting at the server, 1 contents",
            *2 * ["1 requests are waiting at the server; run"],
        ):
            with pytest.raises(Unfinished, match=told):
                batch(folder, server, wait=False, batch_requests=2, batches_at_once=2)
        report = batch(folder, server, wait=False, batch_requests=2)
        assert report["labelled"] == 5
        assert len(server.requests) == 5


def test_expired_lines_are_asked_again(tmp_path):
    folder = make_job(tmp_path, 4)
    with VisionServer(batch_faults=["expired"]) as server:
        batch(folder, server)
        assert len(server.batches) == 2
        assert len(server.requests) == 4  # the first half once, the others in a second batch
    assert live(folder) == written(folder)


def test_a_line_without_an_answer(tmp_path):
    """It is asked again, and set aside when tries end."""
    folder = make_job(tmp_path, 3)
    with VisionServer(faults={"food01": ["no line"], "food02": "no line"}) as server:
        report = batch(folder, server, retries=2)
        assert [server.asked(f"food0{i}") for i in range(3)] == [1, 2, 3]
    assert report["set_aside"] == {"no answer": 1}
    assert b"ended as completed without an answer" in written(folder)[1]


def test_a_full_queue_is_waited_for(tmp_path):
    folder = make_job(tmp_path, 4)
    with VisionServer(batch_faults=["ok", "token_limit_exceeded"], polls=3) as server:
        batch(folder, server, batch_requests=2)
        kinds = [
            call.split()[0] + call.split("/")[2]
            for call in server.calls
            if "content" in call or "POST" in call
        ]
        assert [kind for kind in kinds if kind != "POSTfiles"] == [
            "POSTbatches",
            "POSTbatches",
            "GETfiles",  # the first one is taken in; only then is there room
            "POSTbatches",
            "GETfiles",
        ]
        assert len(server.batches) == 3
        assert len(server.requests) == 4
    assert live(folder) == written(folder)
    folder = make_job(tmp_path / "never", 2)
    with (
        VisionServer(batch_faults=["token_limit_exceeded"] * 3) as server,
        pytest.raises(LabelError, match="3 batches found no room, the last: token_limit_exceeded"),
    ):
        batch(folder, server, give_up_after=3)


def test_a_failed_batch_stops_the_job(tmp_path):
    folder = make_job(tmp_path, 2)
    with VisionServer(batch_faults=["invalid_model"]) as server:
        with pytest.raises(LabelError, match=r"batch batch-\d+ failed: invalid_model: told to fail"):
            batch(folder, server)
        batch(folder, server)
        assert len(server.requests) == 2


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
def test_a_server_without_batches(tmp_path, path):
    """One error, and live mode is not barred by what never came to be."""
    folder = make_job(tmp_path, 2)
    with VisionServer(refuses=path) as server:
        with pytest.raises(LabelError, match="batch: HTTP 404: no such path; mend that and run again"):
            batch(folder, server)
        assert run(stage_of(folder, base_url=server.url))["labelled"] == 2


def test_faults_of_the_job_in_a_batch(tmp_path):
    folder = make_job(tmp_path, 3)
    with VisionServer(faults={"food01": ["404"]}) as server:
        with pytest.raises(LabelError, match="refuses the job: HTTP 404: The model `none` does not exist"):
            batch(folder, server)
        batch(folder, server)
        assert [server.asked(f"food0{i}") for i in range(3)] == [1, 2, 1]


def test_an_answer_to_create_that_gets_lost(tmp_path):
    """The batch was made, the connection broke: it is found by its metadata, and not made and paid for twice."""
    folder = make_job(tmp_path, 5)
    with VisionServer(batch_faults=["ok", "ok", "drop"]) as server:
        batch(folder, server, batch_requests=1)
        assert len(server.batches) == 5
        assert len(server.requests) == 5


def test_budget(tmp_path):
    """A batch takes only what the budget can pay for at worst."""
    folder = make_job(tmp_path, 6)
    prices = dict(
        price_input=0.0, price_output=1e6 / 100
    )  # the price of a full answer is 1, of a real one too
    with VisionServer() as server:
        with pytest.raises(Unfinished, match=r"the budget of 2.2 is reached: 2 contents are left"):
            batch(folder, server, budget=2.2, max_tokens=100, **prices)  # half price: 0.5 each
        assert len(server.requests) == 4
        batch(folder, server, budget=3.0, max_tokens=100, **prices)
        assert len(server.requests) == 6
    with closing(sqlite3.connect(folder / "label" / "ledger.sqlite")) as ledger:
        assert ledger.execute("SELECT total(price) FROM replies").fetchone() == (3.0,)
    # at worst 1 each, in truth 0.5: there is room for two, then for one more
    folder = make_job(tmp_path / "cheaper", 6)
    with VisionServer() as server:
        with pytest.raises(Unfinished, match=r"the budget of 2.2 is reached: 3 contents are left"):
            batch(folder, server, budget=2.2, max_tokens=200, **prices)
        assert (len(server.requests), len(server.batches)) == (3, 2)


def test_a_damaged_picture(tmp_path):
    records = [dish(tmp_path, i) for i in range(3)]
    damaged = tmp_path / "images" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:120])
    folder = make_job(tmp_path, records=records)
    with VisionServer() as server:
        report = batch(folder, server)
        assert len(server.requests) == 2
    assert report["set_aside"] == {"picture": 1}
