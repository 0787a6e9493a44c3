from __future__ import annotations

import json
import os
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rode_food.images import (
    MAX_PIXELS,
    ImageError,
    PixelBudget,
    decode_picture,
    open_image,
    picture_size,
    wrong_suffix,
)
from rode_food.inspect import inspect
from rode_food.readers import read_source
from rode_food.readers.common import Broken, safe_name
from rode_food.readers.log import ReadLog
from rode_food.unifood.select import hash_pictures


def hashed(*paths: Path) -> list[str]:
    return [
        json.loads(row)["hash"] for row in hash_pictures([json.dumps(["r", str(path)]) for path in paths])
    ]


def scene(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((256, 192), Image.Resampling.BICUBIC)


def distance(a: str, b: str) -> int:
    return (int(a, 16) ^ int(b, 16)).bit_count()


def test_a_rotated_copy_is_the_same_picture(tmp_path: Path) -> None:
    upright = scene(0)
    upright.save(tmp_path / "a.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    upright.rotate(90, expand=True).save(tmp_path / "b.jpg", exif=exif, quality=95)
    assert distance(*hashed(tmp_path / "a.jpg", tmp_path / "b.jpg")) <= 4
    assert open_image(tmp_path / "b.jpg").size == (256, 192)


def test_cut_outs_lie_on_white(tmp_path: Path) -> None:
    for number in (0, 1):
        alpha = Image.new("L", (256, 192), 0)
        alpha.paste(255, (20, 20, 120, 150) if number else (130, 60, 240, 180))
        image = Image.new("RGB", (256, 192), "black")
        image.putalpha(alpha)
        image.save(tmp_path / f"{number}.png")
    assert distance(*hashed(tmp_path / "0.png", tmp_path / "1.png")) > 4
    opened = open_image(tmp_path / "0.png")
    assert (opened.mode, opened.getpixel((0, 0)), opened.getpixel((150, 100))) == (
        "RGB",
        (255,) * 3,
        (0,) * 3,
    )
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30] * 256)
    palette.save(tmp_path / "p.png", transparency=0)
    assert open_image(tmp_path / "p.png").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    grey = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "g.png")
    assert np.asarray(open_image(tmp_path / "g.png"))[..., 0].tolist() == [[0, 100], [200, 255]]


def test_whatever_pillow_raises_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.dds").write_bytes(b"DDS " + (124).to_bytes(4, "little") + bytes(range(120)) * 4)
    with pytest.raises(ImageError, match=r"a\.dds"):
        decode_picture(tmp_path / "a.dds")
    with pytest.raises(OSError, match=r"a\.dds: not a readable picture"):
        open_image(tmp_path / "a.dds")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name")
def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    """To open one waits until somebody writes into it."""
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", Path("/dev/zero")):
        with pytest.raises(OSError, match="expected a file, got a pipe, a socket or a device"):
            open_image(path)
        with pytest.raises(ImageError, match="expected a file"):
            decode_picture(path)


def test_threads_decode_only_so_many_pixels_at_a_time() -> None:
    """Eight threads took gigabytes for a few pictures of 63 megapixels."""
    budget, most, lock = PixelBudget(100), [0], threading.Lock()
    now = 0

    def decode(size: tuple[int, int]) -> None:
        nonlocal now
        pixels = min(size[0] * size[1], 100)
        with budget.holding(size):
            with lock:
                now += pixels
                most[0] = max(most[0], now)
            time.sleep(0.002)
            with lock:
                now -= pixels

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, [(1, 1), (10, 10), (50, 50), (5, 6), (7, 8), (3, 3)] * 6))
    assert (now, budget._used) == (0, 0)
    assert 60 < most[0] <= 100


def test_a_budget_is_let_go_of_by_a_broken_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    scene(1).save(tmp_path / "b.png")
    cut = (tmp_path / "b.png").read_bytes()[:900]
    (tmp_path / "b.png").write_bytes(cut)
    for name in ("a.png", "b.png"):
        with pytest.raises(ImageError):
            decode_picture(tmp_path / name)
    from rode_food import images

    assert (images._decoding.total, images._decoding._used) == (MAX_PIXELS, 0)


def test_heic_without_its_library_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    expected = r"needs pillow-heif: pip install 'rode\[heic\]'|cannot be decoded|not a readable"
    with pytest.raises(ImageError, match=expected):
        decode_picture(tmp_path / "a.heic")
    with pytest.raises(OSError, match=expected):
        open_image(tmp_path / "a.heic")


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_heic_pictures_are_upright(tmp_path: Path, orientation: int) -> None:
    heif = pytest.importorskip("pillow_heif")
    # four colours in four corners, wider than high
    upright = Image.new("RGB", (128, 64), "white")
    corners = {(16, 16): "red", (112, 16): "lime", (16, 48): "blue", (112, 48): "black"}
    for (x, y), colour in corners.items():
        upright.paste(colour, (x - 16, y - 16, x + 16, y + 16))
    turned = {1: 0, 3: 180, 6: 90, 8: 270}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.rotate(turned, expand=True)
    heif.from_pillow(stored).save(tmp_path / "a.heic", exif=exif.tobytes(), quality=95)
    opened = open_image(tmp_path / "a.heic")
    assert opened.size == picture_size(tmp_path / "a.heic") == (128, 64)
    for at, colour in corners.items():
        expected = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
        assert max(abs(a - b) for a, b in zip(opened.getpixel(at), expected, strict=True)) < 24, (at, colour)
    assert decode_picture(tmp_path / "a.heic").format == "HEIF"
    assert wrong_suffix("a.heic", "HEIF") is None
    # a JPEG of the same scene is a near duplicate, so the hash sees it upright, too
    upright.save(tmp_path / "a.jpg", quality=95)
    assert distance(*hashed(tmp_path / "a.heic", tmp_path / "a.jpg")) <= 4


NAMES = [
    "IMG_2020~2.jpg",
    "Mom’s pie.jpg",
    "crème brûlée.jpg",
    "dish–1.jpg",
    "photo@2x.jpg",
    "a#1.jpg",
    "पनीर.jpg",
    "ผัดไทย.jpg",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_in_any_script(name: str) -> None:
    assert safe_name(name) == name


def test_pictures_of_such_names_are_read(tmp_path: Path) -> None:
    entries = []
    for number, name in enumerate(NAMES):
        (tmp_path / "images").mkdir(exist_ok=True)
        scene(number).save(tmp_path / "images" / name)
        lines = {"ingredients": ["2 eggs"], "instructions": ["Mix."]}
        entries.append({"id": f"k{number}", "title": "T", "image": f"images/{name}", **lines})
    (tmp_path / "photos.json").write_text(json.dumps(entries), encoding="utf-8")
    found = inspect(tmp_path, images="all")
    assert (found.records, found.images, found.bad_images, found.broken) == (len(NAMES), len(NAMES), 0, {})


@pytest.mark.parametrize(
    "name",
    ["../a", "a/b", "a\\b", "C:a", ".hidden", "~root", "a.", "a ", "", " a", "a\0b", "a\nb", "..", 'a"b'],
)
def test_names_that_lead_elsewhere(name: str) -> None:
    with pytest.raises(Broken):
        safe_name(name)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_is_looked_up_in_either_form_and_kept_as_it_is_on_disk(tmp_path: Path, form: str) -> None:
    other = "NFD" if form == "NFC" else "NFC"
    on_disk = unicodedata.normalize(form, "crème.jpg")
    (tmp_path / "images").mkdir()
    scene(1).save(tmp_path / "images" / on_disk)
    entry = {"id": "a", "title": "A", "image": "images/" + unicodedata.normalize(other, "crème.jpg")}
    (tmp_path / "photos.json").write_text(
        json.dumps([{**entry, "ingredients": ["salt"], "instructions": ["Mix."]}])
    )
    (record,) = read_source("food-photos", tmp_path, ReadLog())
    assert record.image == str(tmp_path / "images" / on_disk)
