from __future__ import annotations

import base64
import http.client
import io
import json
import re
import shutil
import subprocess
import threading

import pytest
from PIL import Image

from rode_food.records import FoodRecord
from rode_food.unifood.golden.check import thumbnail
from rode_food.unifood.golden.page import write_page
from rode_food.unifood.golden.run import run
from rode_food.unifood.golden.server import make_server


def inside(page: str, id: str):
    return json.loads(
        re.search(rf'<script type="application/json" id="{id}">(.*?)</script>', page, re.DOTALL)[1]
    )


def test_the_page_holds_everything_and_asks_nobody(make_stage):
    stage = make_stage()
    run(stage)
    page = (stage.folder / "review.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)|https?://|@import|url\(""", page)
    entries = {entry["id"]: entry for entry in inside(page, "entries")}
    assert len(entries) == 10
    good = entries["good"]
    assert good["image"].startswith("data:image/jpeg;base64,/9j/")
    assert good["numbers"]["usda"]["energy"] == 420
    [row] = good["ingredients"]
    assert (row["text"], row["mass"], row["grams"], row["food"]) == ("1 cup flour", 120, 120, "Flour, test")
    assert row["how"] == "1 cup = 120 g"
    broken = entries["broken"]
    assert broken["image"] is None
    assert "not a picture" in broken["problem"] or "decoded" in broken["problem"]


def test_a_picture_is_shown_as_a_person_sees_it(tmp_path):
    image = Image.new("RGBA", (64, 32), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 16, 32))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    data, problem = thumbnail(FoodRecord("a", str(tmp_path / "a.png"), "s"))
    assert problem is None
    shown = Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2])))
    # what is transparent is white, and the red side is at the right
    assert min(shown.getpixel((4, 16))) > 240
    red, green, blue = shown.getpixel((60, 16))
    assert red > 200
    assert max(green, blue) < 60


def test_words_of_a_record_cannot_end_the_script(tmp_path):
    evil = {"id": "</script><script>alert(1)</script>\u2028"}
    write_page(tmp_path / "p.html", [json.dumps(evil, ensure_ascii=False)], {evil["id"]: "accept"})
    page = (tmp_path / "p.html").read_text()
    assert page.count("</script>") == 3  # the page's own
    assert inside(page, "entries") == [evil]
    assert inside(page, "decided") == {evil["id"]: "accept"}


def test_an_empty_page(tmp_path):
    write_page(tmp_path / "p.html", [], {})
    assert inside((tmp_path / "p.html").read_text(), "entries") == []


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the page's script")
def test_the_script_decides_by_keyboard(tmp_path):
    entries = [
        {"id": id, "title": id, "category": None, "numbers": None, "ingredients": [], "image": None}
        for id in "abc"
    ]
    write_page(tmp_path / "p.html", map(json.dumps, entries), {"b": "accept"})
    script = (tmp_path / "p.html").read_text().rsplit("<script>", 1)[1].split("</script>")[0]
    harness = f"""
const texts = {{ entries: {json.dumps(json.dumps(entries))}, decided: '{{"b": "accept"}}' }};
const element = id => ({{ textContent: texts[id] || "", attributes: {{}}, setAttribute(k, v) {{ this.attributes[k] = v; }},
  replaceChildren() {{}}, append() {{}}, insertRow: () => element(""), lastChild: {{}}, checked: false }});
const elements = {{}};
let listener;
const store = {{}};
globalThis.document = {{ getElementById: id => elements[id] ||= element(id), createElement: () => element(""),
  addEventListener: (_, f) => {{ listener = f; }} }};
globalThis.location = {{ protocol: "file:" }};
globalThis.localStorage = {{ setItem: (k, v) => {{ store[k] = v; }}, getItem: k => store[k] || null }};
{script}
const press = key => listener({{ key, preventDefault() {{}} }});
const seen = [elements.place.textContent];
press("r"); seen.push(elements.place.textContent);
press("ArrowRight"); press("a"); seen.push(elements.place.textContent);
press("u"); seen.push(elements.place.textContent);
console.log(JSON.stringify([seen, JSON.parse(Object.values(store)[0])]));
"""
    done = subprocess.run(["node", "-e", harness], check=True, capture_output=True, text=True)
    seen, stored = json.loads(done.stdout)
    # it begins with the first undecided, and goes on after each decision
    assert seen == [
        "1 of 3; 1 accepted, 0 rejected, 2 undecided",
        "2 of 3; 1 accepted, 1 rejected, 1 undecided",
        "1 of 3; 2 accepted, 1 rejected, 0 undecided",
        "1 of 3; 2 accepted, 0 rejected, 1 undecided",
    ]
    assert stored == {"b": "accept", "c": "accept"}


@pytest.fixture
def server(tmp_path):
    (tmp_path / "review.html").write_text("<p>page")
    (tmp_path / "decisions.json").write_text('{"old": "accept"}')
    with make_server(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, method="GET", path="/decisions", body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    if body is not None:
        headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    status, text = answer.status, answer.read().decode()
    connection.close()
    return status, text


def decide(server, id, word, **headers):
    return ask(server, "POST", body=json.dumps({"id": id, "decision": word}), **headers)


def saved(server):
    return json.loads((server.folder / "decisions.json").read_text())


def test_every_decision_is_on_disk_at_once(server):
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, path="/") == (200, "<p>page")
    assert ask(server) == (200, '{"old": "accept"}')
    assert decide(server, "näw", "reject")[0] == 200
    assert saved(server) == {"old": "accept", "näw": "reject"}
    assert decide(server, "old", None)[0] == 200
    assert saved(server) == {"näw": "reject"}
    assert json.loads(ask(server)[1]) == {"näw": "reject"}


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (dict(path="/../decisions.json"), 404),
        (dict(method="POST", body="{"), 400),
        (dict(method="POST", body='{"id": 3, "decision": "accept"}'), 400),
        (dict(method="POST", body='{"id": "x", "decision": "maybe"}'), 400),
        (dict(method="POST", body="[]"), 400),
        (dict(method="POST", body='{"id": "x", "decision": "accept"}', Content_Type="text/plain"), 400),
        (dict(method="POST", body='{"id": "x", "decision": "accept"}', path="/elsewhere"), 400),
        (dict(method="POST", body="x" * 70_000), 400),
        (dict(method="POST", body="[" * 60_000), 400),
        (dict(method="POST", body='{"id": "\\ud800", "decision": "accept"}'), 400),
        (dict(method="POST", body='{"id": "x", "decision": "\\ud800"}'), 400),
        (dict(Host="evil.example"), 403),
        (dict(method="POST", body='{"id": "x", "decision": "accept"}', Host="evil.example"), 403),
    ],
)
def test_what_the_server_refuses(server, request_, status):
    assert ask(server, **request_)[0] == status
    assert saved(server) == {"old": "accept"}


def test_a_full_disk_is_said(server, monkeypatch):
    def full(folder, decisions):
        raise OSError(28, "No space left on device", str(folder / "decisions.json"))

    monkeypatch.setattr("rode_food.unifood.golden.server.write_decisions", full)
    status, text = decide(server, "x", "accept")
    assert status == 500
    assert "No space left" in text
    assert json.loads(ask(server)[1]) == {"old": "accept"}  # what is not written is not claimed


def test_no_page_no_server(tmp_path):
    with pytest.raises(
        ValueError, match=r"has no review.html; the golden stage of `rode data build-unifood` writes it"
    ):
        make_server(tmp_path)
