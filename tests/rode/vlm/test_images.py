"""Pictures that cannot be read are found and named; pictures made square."""

from __future__ import annotations

import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from rode.vlm import PixelSource, image_problems, open_image
from rode.vlm.images import pad_to_square
from rode_food.images import picture_size
from tiny_llava import draw, tiny_processor


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


@pytest.mark.parametrize("size", [(20, 10), (10, 20), (15, 15), (7, 4)])
def test_a_padded_picture_is_all_there_in_the_middle_of_a_square(size):
    picture = Image.new("RGB", size, (200, 30, 60))
    square = pad_to_square(picture, (1, 2, 3))
    side = max(size)
    assert square.size == (side, side)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    for x in range(side):
        for y in range(side):
            inside = left <= x < left + size[0] and top <= y < top + size[1]
            assert square.getpixel((x, y)) == ((200, 30, 60) if inside else (1, 2, 3))


def test_the_sides_of_a_wide_picture_are_seen_if_it_is_padded(tmp_path):
    """The processor's centre crop shows nothing of the outer fifths; the colour beside a padded picture is zero to the model."""
    path = tmp_path / "wide.png"
    picture = Image.new("RGB", (100, 50), (122, 116, 104))
    picture.paste((255, 0, 0), (0, 0, 20, 50))
    picture.save(path)
    crop = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = tiny_processor()
    processor.image_processor = crop
    red = 2.0  # normalised red of pure red is about 1.93, and less elsewhere
    seen = {shape: PixelSource(processor, shape).pixels(str(path))[0] for shape in ("processor", "pad")}
    assert float(seen["processor"].max()) < 0.5
    assert float(seen["pad"].max()) == pytest.approx(red, abs=0.1)
    assert float(seen["pad"][0].abs().max()) < 0.05  # the first row is padding


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_pictures_size_is_that_of_the_upright_picture(tmp_path, orientation):
    picture = Image.new("RGB", (30, 10))
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert picture_size(str(tmp_path / "a.jpg")) == open_image(tmp_path / "a.jpg").size
