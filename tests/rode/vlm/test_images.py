"""Pictures that cannot be read are found and named."""

from __future__ import annotations

import pytest
from PIL import Image

from rode.vlm import image_problems, open_image
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


def test_each_is_named_once(broken, tmp_path):
    whole = str(tmp_path / "whole.jpg")
    found = image_problems([whole, *broken, broken[0]])
    assert list(found) == broken
    assert found[broken[0]] == f"{broken[0]}: no such picture"


@pytest.mark.parametrize(("size", "fits"), [((1, 200), True), ((201, 1), False), ((1, 1), True)])
def test_absurd_shapes(tmp_path, size, fits):
    Image.new("RGB", size).save(tmp_path / "long.png")
    if fits:
        assert open_image(tmp_path / "long.png").size == size
        return
    with pytest.raises(
        OSError, match=r"long.png: .*201 x 1 pixels: expected sides above 0, one at most 200 times"
    ):
        open_image(tmp_path / "long.png")


def test_a_picture_is_rgb_and_upright(tmp_path):
    image = Image.new("L", (4, 2), 7)
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    opened = open_image(tmp_path / "turned.png")
    assert (opened.mode, opened.size) == ("RGB", (2, 4))
