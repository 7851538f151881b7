"""Images of every kind a catalog holds, read as they look; and every kind of broken file, refused by name."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from recllm.mllm.vision.images import ImageError, image_size, load_image, resolve_image, survey


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: turned and mirrored pictures are all different."""
    red = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    green = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 60)], -1).astype(np.uint8))


def close(one: Image.Image, other: Image.Image, within: float = 3) -> bool:
    assert one.mode == other.mode == "RGB" and one.size == other.size
    return np.abs(np.asarray(one, float) - np.asarray(other, float)).mean() < within


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_images_are_read_upright_and_the_header_says_the_same_size(tmp_path, suffix, orientation):
    upright = gradient(60, 40)
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(stored, tmp_path / f"a.{suffix}", exif=exif)
    assert image_size(path) == (60, 40)
    assert close(load_image(path), upright)
    assert load_image(path, max_pixels=600).size == (30, 20)


def test_every_mode_becomes_what_a_viewer_shows(tmp_path):
    plain = gradient(64, 48)
    gray = plain.convert("L").convert("RGB")
    holes = plain.convert("RGBA")
    holes.putalpha(Image.fromarray(np.where(np.arange(64) < 32, 0, 255).astype(np.uint8)[None].repeat(48, 0)))
    seen = plain.copy()
    seen.paste((255, 255, 255), (0, 0, 32, 48))
    flat = Image.new("RGB", (64, 48), (200, 30, 60))
    paletted = flat.convert("P", palette=Image.Palette.ADAPTIVE)
    see_through = paletted.getpixel((0, 0))
    white = Image.new("RGB", (64, 48), "white")
    deep = Image.fromarray(np.asarray(plain.convert("L")).astype(np.uint16) * 257)
    cases = [
        (saved(plain, tmp_path / "rgb.png"), plain),
        (saved(plain.convert("L"), tmp_path / "gray.png"), gray),
        (saved(plain.convert("L"), tmp_path / "gray.jpg", quality=95), gray),
        (saved(plain.convert("CMYK"), tmp_path / "cmyk.jpg", quality=95), plain),
        (saved(plain.convert("CMYK"), tmp_path / "cmyk.tif"), plain),
        (saved(holes, tmp_path / "alpha.png"), seen),
        (saved(holes, tmp_path / "alpha.webp", lossless=True), seen),
        (saved(holes.convert("LA"), tmp_path / "gray_alpha.png"), seen.convert("L").convert("RGB")),
        (saved(flat.convert("P", palette=Image.Palette.ADAPTIVE), tmp_path / "palette.png"), flat),
        (saved(paletted, tmp_path / "palette_clear.png", transparency=see_through), white),
        (saved(paletted, tmp_path / "palette_clear.gif", transparency=see_through), white),
        (saved(flat, tmp_path / "rgb_clear.png", transparency=(200, 30, 60)), white),
        (saved(deep, tmp_path / "deep.png"), gray),
        (saved(deep, tmp_path / "deep.tif"), gray),
        (saved(plain.convert("1"), tmp_path / "bits.png"), plain.convert("1").convert("RGB")),
    ]
    frames = [flat, white]
    cases.append((saved(flat, tmp_path / "moving.gif", save_all=True, append_images=frames[1:]), flat))
    mislabelled = tmp_path / "really_a_png.jpg"
    plain.save(mislabelled, format="PNG")
    cases.append((mislabelled, plain))
    for path, expected in cases:
        assert image_size(path) == (64, 48), path
        assert close(load_image(path), expected, 6), path


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.integers(1, 200_000),
    st.sampled_from(["JPEG", "PNG"]),
)
def test_the_pixel_budget_holds_and_keeps_the_shape(tmp_path_factory, width, height, max_pixels, kind):
    if max(width, height) > 200 * min(width, height):
        return
    path = tmp_path_factory.getbasetemp() / "budget.img"
    gradient(width, height).save(path, format=kind)
    got = load_image(path, max_pixels=max_pixels).size
    assert got[0] * got[1] <= max_pixels
    if width * height <= max_pixels:
        assert got == (width, height)
    elif (scale := (max_pixels / (width * height)) ** 0.5) * min(width, height) >= 1:
        assert abs(got[0] - width * scale) <= 1 and abs(got[1] - height * scale) <= 1


def test_downscaling_while_decoding_looks_like_decoding_then_downscaling(tmp_path):
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).resize((1500, 1000))
    path = saved(rough, tmp_path / "big.jpg", quality=95)
    small = load_image(path, max_pixels=150 * 100)
    assert close(small, load_image(path).resize(small.size, Image.Resampling.BICUBIC), 1)


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files by name, with the finding that each must give."""
    files = {}

    def put(name: str, content: bytes, finding: str) -> None:
        (folder / name).write_bytes(content)
        files[name] = (folder / name, finding)

    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8))
    for kind, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("GIF", "gif"), ("WEBP", "webp"), ("BMP", "bmp")):
        buffer = io.BytesIO()
        noise.save(buffer, kind)
        whole = buffer.getvalue()
        put(f"half.{suffix}", whole[: len(whole) // 2], "truncated")
        put(f"head.{suffix}", whole[:12], "truncated")
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG", progressive=True)
    put("half_progressive.jpg", buffer.getvalue()[: len(buffer.getvalue()) // 2], "truncated")
    put("empty.jpg", b"", "empty")
    put("text.jpg", b"<html>404 not found</html>", "not_an_image")
    put("vector.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image")
    put("thin.png", png_bytes(2010, 10), "extreme_aspect")
    put("bomb.png", png_header(60_000, 60_000), "huge")
    put("large.png", png_header(10_500, 10_500), "huge")
    files["absent.jpg"] = (folder / "absent.jpg", "missing")
    files["under_a_file"] = (folder / "text.jpg" / "under_a_file", "missing")
    files["x" * 300] = (folder / ("x" * 300), "unreadable")
    (folder / "folder.jpg").mkdir()
    files["folder.jpg"] = (folder / "folder.jpg", "not_an_image")
    os.mkfifo(folder / "pipe.jpg")
    files["pipe.jpg"] = (folder / "pipe.jpg", "not_an_image")
    return files


def png_bytes(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    gradient(width, height).save(buffer, "PNG")
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has almost no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_broken_files_are_refused_with_their_name_and_what_is_wrong(tmp_path):
    for name, (path, finding) in broken_files(tmp_path).items():
        for max_pixels in (None, 1000):
            with pytest.raises(ImageError) as caught:
                load_image(path, max_pixels=max_pixels)
            assert (name, caught.value.finding) == (name, finding)
            assert str(path) in str(caught.value)


def test_a_path_that_no_file_system_takes_is_refused_alike():
    for read in (load_image, image_size):
        with pytest.raises(ImageError, match="null byte"):
            read(Path("a\0b.jpg"))


def test_truncated_images_stay_refused_where_another_library_switched_that_off(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = tmp_path / "whole.jpg"
    gradient(300, 300).save(whole)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:-600])
    with pytest.raises(ImageError, match=r"cut\.jpg.*cut off"):
        load_image(cut)


def test_no_warning_of_pillow_reaches_the_user(tmp_path, monkeypatch):
    large = saved(gradient(64, 48), tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # 3,072 pixels: Pillow warns, and reads it
    clear = gradient(8, 8).convert("P")
    clear.info["transparency"] = bytes(range(256))
    odd = saved(clear, tmp_path / "clear.png", transparency=bytes(range(256)))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        survey([large, odd] * 20, workers=4)
        assert warnings.filters == before
        warnings.warn("the user's own", stacklevel=1)
    assert [str(one.message) for one in seen] == ["the user's own"]


def test_survey_counts_and_names_what_is_odd(tmp_path):
    broken = broken_files(tmp_path)
    plain = gradient(30, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    good = [
        saved(plain, tmp_path / "a.png"),
        saved(plain.convert("L"), tmp_path / "b.jpg"),
        saved(plain.convert("P"), tmp_path / "c.gif"),
        saved(plain.convert("CMYK"), tmp_path / "d.jpg", exif=exif),
        saved(plain.convert("RGBA"), tmp_path / "e.png"),
        saved(plain, tmp_path / "f.gif", save_all=True, append_images=[plain.convert("L").convert("RGB")]),
    ]
    wrong = tmp_path / "g.jpg"
    plain.save(wrong, "PNG")
    report = survey([*good, wrong, *(path for path, _ in broken.values())], workers=3, named=1)
    assert report.images == len(good) + 1 + len(broken)
    assert set(report.unusable) == {str(path) for path, _ in broken.values()}
    expected = {"ok": 1, "grayscale": 1, "palette": 2, "cmyk": 1, "rotated": 1, "alpha": 1}
    expected |= {"animated": 1, "mislabelled": 1}
    for _, finding in broken.values():
        expected[finding] = expected.get(finding, 0) + 1
    assert dict(report.counts) == expected
    assert report.examples["palette"] == [str(tmp_path / "c.gif")]
    assert report.examples["mislabelled"] == [str(wrong)]
    assert report.as_dict()["counts"] == expected


def test_survey_does_not_depend_on_the_number_of_threads(tmp_path):
    paths = [path for path, _ in broken_files(tmp_path).values()]
    assert survey(paths, workers=1) == survey(paths, workers=5)


@pytest.mark.parametrize("relative", ["../a.png", "/etc/passwd", "a/../../b.png", "", "C:\\a.png", "~/a.png"])
def test_paths_that_leave_the_folder_are_refused(tmp_path, relative):
    with pytest.raises(ImageError, match="leaves the folder"):
        resolve_image(tmp_path, relative)


def test_links_are_followed_only_inside_the_folder(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside.png"
    root.mkdir()
    gradient(8, 8).save(outside)
    gradient(8, 8).save(root / "inside.png")
    (root / "good.png").symlink_to("inside.png")
    (root / "bad.png").symlink_to(outside)
    (root / "up").symlink_to(tmp_path)
    assert load_image(resolve_image(root, "good.png")).size == (8, 8)
    for relative in ("bad.png", "up/outside.png"):
        with pytest.raises(ImageError, match="link leads out"):
            resolve_image(root, relative)
    (tmp_path / "alias").symlink_to(root)
    assert resolve_image(tmp_path / "alias", "inside.png") == (root / "inside.png").resolve()


@pytest.mark.data
def test_all_movielens_posters_pass_and_the_odd_ones_are_named(shared_data):
    posters = sorted((shared_data("ml-latest-small-posters") / "posters").iterdir())
    report = survey(posters, workers=2)
    assert report.images == len(posters) == 3605
    gray = []
    for path in posters:
        with Image.open(path) as image:
            if image.mode == "L":
                gray.append(str(path))
    assert not report.unusable
    assert report.examples == {"grayscale": gray}
    assert report.counts == {"ok": 3605 - len(gray), "grayscale": len(gray)}
