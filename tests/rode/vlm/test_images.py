"""Pictures that cannot be read are found, named with their record, and left out or fatal."""

from __future__ import annotations

import dataclasses

import pytest
from PIL import Image

from rode.vlm import drop_bad_images, open_image
from tiny_llava import draw


@pytest.fixture
def broken(tmp_path):
    """Paths of a missing, a cut, an empty and a textual "picture"."""
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((200, 200), 80).convert("RGB").save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    png = draw(tmp_path / "whole.png", (9, 99, 200), 200).read_bytes()
    (tmp_path / "spoiled.png").write_bytes(png[:60] + b"\0" * 40 + png[100:])
    return [str(tmp_path / name) for name in ("gone.jpg", "cut.jpg", "empty.png", "text.png", "spoiled.png")]


def test_each_is_refused(broken):
    for path in broken:
        with pytest.raises(OSError, match=path):
            open_image(path)


def test_skip_and_error(broken, examples):
    mixed = [
        *examples[:2],
        *(dataclasses.replace(examples[i + 2], image=path) for i, path in enumerate(broken)),
    ]
    mixed.append(
        dataclasses.replace(mixed[2], task="recipe")
    )  # a second question about the first bad picture
    kept, lines = drop_bad_images(mixed, "skip")
    assert kept == examples[:2]
    assert len(lines) == 5
    assert lines[0] == f"record dish2: {broken[0]}: no such picture"
    with pytest.raises(
        OSError, match=r"record dish2: .*gone.jpg: no such picture \(and 4 more\).*on_bad_image=skip"
    ):
        drop_bad_images(mixed, "error")
    assert drop_bad_images(examples, "error") == (examples, [])
    with pytest.raises(ValueError, match="on_bad_image: expected 'error' or 'skip', got 'ignore'"):
        drop_bad_images(mixed, "ignore")


def test_a_picture_is_rgb_and_upright(tmp_path):
    image = Image.new("L", (4, 2), 7)
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    opened = open_image(tmp_path / "turned.png")
    assert (opened.mode, opened.size) == ("RGB", (2, 4))
