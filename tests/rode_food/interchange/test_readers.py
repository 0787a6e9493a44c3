"""What others' files hold becomes records; what cannot is left out and counted, what changes form is noted."""

from __future__ import annotations

import base64
import gzip
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from odd_dishes import picture
from rode.cli import main
from rode_food import read_records
from rode_food.readers import read_source
from rode_food.readers.common import Broken
from rode_food.readers.log import ReadLog
from rode_food.readers.picture_files import PictureFiles
from rode_food.records import Turn


def said(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def read(kind: str, path: Path, **options):
    log = ReadLog()
    return list(read_source(kind, path, log, **options)), log


def write_array(path: Path, *entries: object) -> Path:
    path.write_text(json.dumps(entries))
    return path


def test_llava_instruct(tmp_path: Path) -> None:
    path = write_array(
        tmp_path / "mix.json",
        {"id": "a", "image": "coco/1.jpg", "conversations": said("<image>\nWhat?", "Soup.", "Hot?", "Yes.")},
        {"id": 7, "image": ["1.jpg", "/far/2.jpg"], "conversations": said("Differ?\n<image><image>", "Yes.")},
        {"id": "a", "conversations": said("1 + 1?", "2"), "model": "x", "source": "sums", "split": "val"},
        {"image": "3.jpg", "conversations": said("<image> Why?", "So.", "And?")},
        {"id": "s", "conversations": [{"from": "system", "value": "Be short."}, *said("Q", "A")]},
        {
            "id": "m",
            "image": "3.jpg",
            "conversations": said("Left <image> of it?", "No.", "Now <image>?", "Yes."),
        },
    )
    records, log = read("llava-instruct", path)
    base = str(tmp_path)
    assert [(r.id, r.images, r.source, r.split) for r in records] == [
        ("a", (f"{base}/coco/1.jpg",), "mix", None),
        ("7", (f"{base}/1.jpg", "/far/2.jpg"), "mix", None),
        ("a_2", (), "sums", "val"),
        ("mix-3", (f"{base}/3.jpg",), "mix", None),
        ("s", (), "mix", None),
        ("m", (f"{base}/3.jpg",), "mix", None),
    ]
    assert [[(t.question, t.answer) for t in r.conversation] for r in records] == [
        [("What?", "Soup."), ("Hot?", "Yes.")],
        [("Differ?", "Yes.")],
        [("1 + 1?", "2")],
        [("Why?", "So.")],
        [("Be short.\n\nQ", "A")],
        [("Left  of it?", "No."), ("Now ?", "Yes.")],
    ]
    assert not log.counts
    assert log.notes == {
        "an id that stands twice, now numbered": 1,
        "a field that records have no place for: model": 1,
        "a last question without an answer, left out": 1,
        "a system message, now before the first question": 1,
        "a picture inside the text, now before it": 2,
        "a picture shown in a later turn, now before the first": 1,
        "another number of marks than of pictures": 1,
    }
    moved, _ = read("llava-instruct", path, image_folder="/pictures")
    assert moved[0].image == "/pictures/coco/1.jpg"


BROKEN = [
    ({"conversations": "x"}, "no conversations", "expected a list, got 'x'"),
    ({"conversations": []}, "no answered question", ""),
    ({"conversations": said("Why?")}, "no answered question", ""),
    ({"conversations": said("<image>\nWhy?", "So.")}, "a picture's mark, and no picture", ""),
    ({"conversations": said("Why?", " ")}, "an empty question or answer", ""),
    ({"image": "a.jpg", "conversations": said("<image>", "So.")}, "an empty question or answer", ""),
    ({"image": "a.jpg", "conversations": said("Why?", "<image>")}, "a picture in an answer", "'<image>'"),
    ({"conversations": said("a", "b")[::-1]}, "speakers out of turn", "assistant"),
    ({"conversations": [{"from": "tool", "value": "x"}]}, "an unknown speaker", "'tool'"),
    ({"conversations": [{"from": "human", "value": 3}]}, "a message that is no text", "3"),
    ({"conversations": ["x"]}, "a message that is no object", "'x'"),
    ({"image": "http://x.org/a.jpg", "conversations": said("a", "b")}, "a picture at a URL, which is not fetched",
     "'http://x.org/a.jpg'"),
    ({"image": 3, "conversations": said("a", "b")}, "a picture of an unknown form", "3"),
    ({"image": "a", "images": ["b"], "conversations": said("a", "b")}, "both image and images", ""),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "reason", "detail"), BROKEN, ids=[reason for _, reason, _ in BROKEN])
def test_what_cannot_be_used_is_counted(tmp_path: Path, entry: dict, reason: str, detail: str) -> None:
    good = {"id": "good", "conversations": said("a", "b")}
    path = tmp_path / "mix.json"
    path.write_text("[\n" + json.dumps(good) + ",\n" + json.dumps(entry) + "\n]")
    records, log = read("llava-instruct", path)
    assert [record.id for record in records] == ["good"]
    assert log.counts == log.broken == {reason: 1}
    (problem,) = log.problems
    assert (problem.line, problem.detail) == (3, detail)


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6, 5), (number, 0, 9)).save(out, "PNG")
    return out.getvalue()


TEXT = [{"type": "image"}, {"type": "text", "text": "What?"}]


def conversation(content, answer="Soup."):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def test_messages_in_lines(tmp_path: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(png(1)).decode()
    rows = [
        {"id": "a", "messages": conversation(TEXT), "images": ["1.jpg"]},
        {"id": "b", "messages": conversation([{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": url}}])},
        {"id": "c", "messages": conversation("<image>\nHot?"), "image": {"path": "2.jpg", "bytes": None}},
        {"id": "d", "messages": conversation([{"type": "image", "image": "3.jpg"}, *TEXT]), "images": ["4.jpg"]},
        {"id": "e", "messages": [{"role": "system", "content": "Short."}, *conversation("Hi")]},
        {"id": "f", "messages": conversation([{"type": "audio"}])},
        {"id": "g", "messages": conversation(TEXT)},
        {"id": "h", "messages": conversation(TEXT), "images": ["data:image/png;base64,&"]},
        {"id": "i", "messages": conversation(TEXT), "images": [{"bytes": "abc"}]},
        [],
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl.gz"
    lines = b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\n" for row in rows).encode() + b"{\n"
    path.write_bytes(gzip.compress(lines))
    records, log = read("messages", path, pictures=tmp_path / "p")
    base = str(tmp_path)
    assert [record.id for record in records] == list("abcde")
    assert [record.images for record in records if record.id != "b"] == [
        (f"{base}/1.jpg",),
        (f"{base}/2.jpg",),
        (f"{base}/3.jpg", f"{base}/4.jpg"),
        (),
    ]
    assert Path(records[1].image).parent == tmp_path / "p"
    assert Path(records[1].image).read_bytes() == png(1)
    assert [record.conversation for record in records] == [
        (Turn("What?", "Soup."),),
        (Turn("x", "Soup."),),
        (Turn("Hot?", "Soup."),),
        (Turn("What?", "Soup."),),
        (Turn("Short.\n\nHi", "Soup."),),
    ]
    assert log.broken == {
        "a part of a message that is neither text nor image": 1,
        "a picture's mark, and no picture": 1,
        "a damaged data URL": 1,
        "a picture of an unknown form": 1,
        "an entry that is no object": 1,
        "invalid JSON": 1,
    }
    assert log.notes == {
        "a picture inside the text, now before it": 1,
        "a system message, now before the first question": 1,
    }


@pytest.fixture
def rows():
    """Of `datasets`: content as text, and one or two pictures as bytes."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture

    part = {"type": Value("string"), "text": Value("string")}
    message = {"role": Value("string"), "content": List(part)}
    features = Features({"messages": List(message), "images": List(Picture())})
    values = {
        "messages": [
            conversation([{"type": "image", "text": None}] * (1 + i % 2) + [{"type": "text", "text": f"{i}?"}],
                         [{"type": "text", "text": f"It is {i}."}])
            for i in range(70)
        ],
        "images": [[{"bytes": png(i), "path": None}] * (1 + i % 2) for i in range(70)],
    }  # fmt: skip
    return Dataset.from_dict(values, features=features)


@pytest.mark.parametrize("form", ["parquet", "saved", "dict", "folder"])
def test_datasets(tmp_path: Path, rows, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    from datasets import DatasetDict

    source = tmp_path / "food"
    if form == "parquet":
        source = tmp_path / "food.parquet"
        rows.to_parquet(source)
    elif form == "saved":
        rows.save_to_disk(source)
    elif form == "dict":
        split = {"train": rows.select(range(60)), "validation": rows.select(range(60, 70))}
        DatasetDict(split).save_to_disk(source)
    else:
        (source / "data").mkdir(parents=True)
        rows.select(range(60)).to_parquet(source / "data" / "train-00000-of-00001.parquet")
        rows.select(range(60, 70)).to_parquet(source / "data" / "validation-00000-of-00001.parquet")
    out = tmp_path / "out" / "r.jsonl"
    assert (
        main(
            [
                "data",
                "convert",
                "messages",
                str(source),
                str(out),
                "--train",
                "1",
                "--val",
                "0",
                "--test",
                "0",
            ]
        )
        == 0
    )
    records = sorted(read_records(out), key=lambda record: int(record.conversation[0].question[:-1]))
    assert len(records) == 70
    for number, record in enumerate(records):
        assert record.conversation == (Turn(f"{number}?", f"It is {number}."),)
        assert [Path(image).read_bytes() for image in record.images] == [png(number)] * (1 + number % 2)
        assert record.split == ("val" if form in ("dict", "folder") and number >= 60 else "train")
        assert record.source == "food"
    assert len(list((tmp_path / "out" / "r_pictures").iterdir())) == 70
    before = set(tmp_path.iterdir())
    kind = ["--kind", "messages"] if form == "folder" else []
    capsys.readouterr()
    assert main(["data", "inspect", str(source), "--images", "all", *kind]) == 0
    assert "pictures decoded: 105; bad: 0" in capsys.readouterr().out
    assert set(tmp_path.iterdir()) == before


def test_a_folder_without_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither state.json nor files that end in \.parquet"):
        read("messages", tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json: damaged"):
        read("messages", tmp_path)


def test_pictures_of_every_form(tmp_path: Path) -> None:
    files = PictureFiles(tmp_path / "base", tmp_path / "out")
    own = Path(picture(tmp_path / "own.jpg", 1))
    data = own.read_bytes()
    found = [files.path(data), files.path({"bytes": data, "path": "x.png"}), files.path(bytearray(data))]
    assert len(set(found)) == 1
    assert found[0].endswith(".jpg")
    assert Path(found[0]).read_bytes() == data
    assert (
        files.path("a.jpg")
        == files.path(Path("a.jpg"))
        == files.path({"path": "a.jpg"})
        == f"{tmp_path}/base/a.jpg"
    )
    assert files.path("file:///x/a%20b.jpg") == "/x/a b.jpg"
    for mode in ("RGB", "L", "P", "CMYK", "F"):
        image = Image.open(own).convert("L" if mode == "F" else "RGB").convert(mode)
        with Image.open(files.path(image)) as again:
            assert again.convert("RGB").tobytes() == image.convert("RGB").tobytes()
    with pytest.raises(Broken, match="bytes that are no picture"):
        files.path(b"text")
