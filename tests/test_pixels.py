# SPDX-License-Identifier: Apache-2.0

"""Files to pixels: deep colors, orientations, large and long photos, and whatever bytes there may be."""

import io
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from anomalib_resad.enrollment.decoding import PhotoError, check_bit_depth, decode_photo
from anomalib_resad.enrollment.photos import photo_problem, read_header, read_like, read_pixels
from anomalib_resad.enrollment.references import read_references
from anomalib_resad.enrollment.rotations import enrolled_rows, rotated

PIXELS = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
PIXELS[0, 0] = 255
WIDE = PIXELS.astype(np.uint16) * 16 + 15  # 12 bits
STATED = ("rgb12.ppm", "gray12.pgm")


def deep(folder: Path) -> dict[str, Path]:
    """Photos of 12 bits; those in files of 16 bits do not say so."""
    big = WIDE.astype(">u2")
    files = {
        "rgb12.ppm": b"P6\n# twelve bits\n32 24\n4095\n" + big.tobytes(),
        "rgb16.ppm": b"P6\n32 24\n65535\n" + big.tobytes(),
        "gray12.pgm": b"P5 32 24 4095\n" + big[..., 0].tobytes(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for name in ("rgb16.png", "rgb16.tif"):
        assert cv2.imwrite(str(folder / name), WIDE[..., ::-1])
    assert cv2.imwrite(str(folder / "rgba16.png"), np.dstack([WIDE[..., ::-1], np.full((24, 32), 9, np.uint16)]))
    for name in ("gray16.png", "gray16.tif"):
        Image.fromarray(WIDE[..., 0]).save(folder / name)
    return {path.name: path for path in folder.iterdir()}


def test_deep_pixels_are_read_at_the_depth_that_is_stated_or_given(tmp_path: Path) -> None:
    """Pillow would give nearly black, white, or the high bytes alone."""
    expected = np.round(WIDE * (255 / 4095))
    for name, path in deep(tmp_path).items():
        wanted = np.repeat(expected[..., :1], 3, axis=2) if name.startswith("gray") else expected
        for pixels in (read_pixels(path, 12), read_like(path, 12), *([read_pixels(path)] if name in STATED else [])):
            assert pixels.dtype == np.uint8
            assert np.array_equal(pixels, wanted), name


@pytest.mark.parametrize("white", [100, 255, 300, 1000, 40_000])
@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6"])
def test_white_is_the_largest_value_that_a_ppm_states(
    tmp_path: Path, kind: str, white: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also one that is not that of all its bits, behind a long comment, or in a file that ends with its last number."""
    values = np.linspace(0, white, 24 * 32).round().astype(">u2" if white > 255 else np.uint8).reshape(24, 32)
    values = np.repeat(values[..., None], 3, axis=2) if kind in ("P3", "P6") else values
    content = values.tobytes() if kind in ("P5", "P6") else "\n".join(map(str, values.ravel())).encode()
    path = tmp_path / "a.ppm"
    for comment, end in ((b"", b""), (b"# nine\n", b"\n"), (b"#" + b"." * 2000 + b"\n", b" ")):
        header = kind.encode() + b"\n" + comment + f"32 24\n{white}\n".encode()
        path.write_bytes(header + content + (end if kind in ("P2", "P3") else b""))
        pixels = read_pixels(path)[..., 0]
        assert np.abs(pixels - values.reshape(24, 32, -1)[..., 0] * (255 / white)).max() < 0.501
    assert not capfd.readouterr().err, "OpenCV says nothing of its own"
    path.write_bytes(kind.encode() + b"\n#" + b"." * 5000 + f"\n32 24\n{white}\n".encode() + content)
    with pytest.raises(PhotoError, match="does not stand in its first 4096 bytes; remove its comments"):
        read_pixels(path)
    if white == 40_000:
        path.write_bytes(f"{kind}\n32 24\n{white}\n".encode() + content)
        with pytest.raises(PhotoError, match=r"\(16 in the file\), where 12 are expected"):
            read_pixels(path, 12)


def test_another_depth_than_the_true_one_is_refused(tmp_path: Path) -> None:
    for name, path in deep(tmp_path).items():
        if name not in STATED:
            with pytest.raises(PhotoError, match=f"{name}: more than 8 bits a channel.*bit_depth 12.*the same factor"):
                read_pixels(path)
        with pytest.raises(PhotoError, match=f"{name}: .*(where 16 are expected|leave it nearly black)"):
            read_pixels(path, 16)
        with pytest.raises(PhotoError, match=f"{name}: .*(where 10 are expected|up to 4095 are larger at 10 bits)"):
            read_pixels(path, 10)
        with pytest.raises(PhotoError, match=f"{name}: more than 8 bits.*where 8 are expected.*enroll the product"):
            read_like(path, 8)
    Image.fromarray(PIXELS).save(tmp_path / "eight.png")
    with pytest.raises(PhotoError, match=r"eight\.png: 8 bits a channel, where 12 are expected"):
        read_like(tmp_path / "eight.png", 12)
    Image.fromarray(PIXELS[..., 0].astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(PhotoError, match=r"float\.tif: a TIFF of 32 bits that is not plain"):
        read_pixels(tmp_path / "float.tif", 12)
    with pytest.raises(ValueError, match="bit_depth=7 must be 'auto'"):
        check_bit_depth(7)


def test_references_are_of_one_depth(tmp_path: Path) -> None:
    files = deep(tmp_path)
    assert read_references(files.values(), 12).bit_depth == 12
    assert read_references([files["rgb12.ppm"]]).bit_depth == 12
    Image.fromarray(PIXELS).save(tmp_path / "eight.png")
    with pytest.raises(PhotoError, match=r"differ in their bits of a channel \(eight.png has 8 bits, rgb12.ppm has 12"):
        read_references([files["rgb12.ppm"], tmp_path / "eight.png"])
    with pytest.raises(PhotoError, match="8 bits a channel, where 12 are expected"):
        read_references([tmp_path / "eight.png"], 12)


def test_deep_arrays_need_a_depth() -> None:
    assert np.array_equal(read_pixels(WIDE, 12), np.round(WIDE * (255 / 4095)))
    with pytest.raises(PhotoError, match=r"uint16 with shape .* is no photo"):
        read_pixels(WIDE)


def test_without_opencv_deep_colors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = deep(tmp_path)
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert read_pixels(files["gray16.png"], 12).max() == 255
    with pytest.raises(PhotoError, match="needs OpenCV: pip install opencv-python-headless"):
        read_pixels(files["rgb16.png"], 12)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_as_they_are_stored_in_every_format(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    for name in ("a.png", "a.tif", "a.webp"):
        Image.fromarray(PIXELS).save(tmp_path / name, exif=exif, **({"lossless": True} if name == "a.webp" else {}))
        assert np.array_equal(read_pixels(tmp_path / name), PIXELS), name
    Image.fromarray(WIDE[..., 0]).save(tmp_path / "deep.tif", exif=exif)
    assert np.array_equal(read_pixels(tmp_path / "deep.tif", 12)[..., 0], np.round(WIDE[..., 0] * (255 / 4095)))
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif)
    assert read_pixels(tmp_path / "a.jpg").shape == PIXELS.shape


def test_a_turned_tiff_of_deep_colors(tmp_path: Path) -> None:
    """OpenCV turns it, as Pillow does."""
    tifffile = pytest.importorskip("tifffile")
    for orientation in range(1, 9):
        tifffile.imwrite(
            tmp_path / "deep.tif", WIDE, photometric="rgb", extratags=[(274, 3, 1, orientation, True)], metadata=None
        )
        assert np.array_equal(read_pixels(tmp_path / "deep.tif", 12), np.round(WIDE * (255 / 4095))), orientation


def gray(path: Path, width: int, height: int) -> Path:
    Image.new("L", (width, height), 99).save(path)
    return path


def test_what_is_too_long_or_too_large_is_refused_by_its_header(tmp_path: Path) -> None:
    long, large = gray(tmp_path / "long.png", 8, 60_000), gray(tmp_path / "large.png", 7200, 7000)
    started = time.perf_counter()
    assert "more than 50 times as long as wide; cut it" in str(photo_problem(long))
    assert "the most is 50,000,000; make it smaller" in str(photo_problem(large))
    assert time.perf_counter() - started < 1
    assert photo_problem(gray(tmp_path / "scan.png", 10, 500)) is None


def test_of_large_photos_the_mean_of_neighbors_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomalib_resad.enrollment.decoding.MOST_KEPT", 24 * 32 // 4)
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert not read_header(tmp_path / "a.png").is_plain
    means = PIXELS.reshape(12, 2, 16, 2, 3).mean(axis=(1, 3))
    assert np.abs(read_pixels(tmp_path / "a.png") - means).max() <= 0.5


def test_long_photos_are_rotated_at_a_bounded_size() -> None:
    scan = np.zeros((10_000, 500, 3), np.uint8)
    scan[:5000] = 200
    once = rotated(scan, 180)
    assert once.shape == (2996, 150, 3)
    assert once[:1400].max() == 0
    assert once[-1400:].min() == 200
    assert rotated(scan[:600], 90).shape == (600, 500, 3), "photos of usual sizes keep theirs"


def test_one_photo_is_held_at_a_time(tmp_path: Path) -> None:
    for index in range(5):
        Image.fromarray(np.roll(PIXELS, index, axis=1)).save(tmp_path / f"{index}.png")
    held: list[int] = []

    class Watched(np.ndarray):
        def __del__(self) -> None:
            if id(self) in held:  # views of a photo are of this class, too
                held.remove(id(self))

    read = read_references(tmp_path.iterdir())
    inner = type(read).__getitem__

    def watched(_: object, key: object) -> np.ndarray:
        pixels = inner(read, key).view(Watched)  # type: ignore[arg-type]
        held.append(id(pixels))
        return pixels

    read.__class__ = type("WatchedReferences", (type(read),), {"__getitem__": watched})
    most = 0

    def encode(pixels: np.ndarray) -> list[np.ndarray]:
        nonlocal most
        most = max(most, len(held))
        return [np.asarray(pixels, np.float32).reshape(-1, 3)[:16]]

    rows, _ = enrolled_rows(read.values(), encode, keyed=True, rotations=8)
    assert len(rows) == 5
    assert most == 1


def test_a_photo_that_changes_while_it_is_enrolled_is_refused(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    read = read_references([tmp_path / "a.png"])
    Image.fromarray(PIXELS[::-1]).save(tmp_path / "a.png")
    with pytest.raises(PhotoError, match=r"a\.png: changed while it was enrolled"):
        list(read.values())


# -- whatever bytes there may be --------------------------------------------------------------------------------------


def contents() -> list[bytes]:
    """A whole file of each format, 8 bits and deep."""
    made = []
    for kind in ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP"):
        written = io.BytesIO()
        Image.fromarray(PIXELS).save(written, kind)
        made.append(written.getvalue())
    made.extend(cv2.imencode(kind, WIDE)[1].tobytes() for kind in (".png", ".tif", ".ppm"))
    written = io.BytesIO()
    Image.fromarray(WIDE[..., 0]).save(written, "TIFF")
    return [*made, written.getvalue()]


CONTENTS = contents()


@settings(max_examples=300, deadline=5000, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    content=st.sampled_from(CONTENTS),
    flips=st.lists(st.tuples(st.integers(0, 300) | st.integers(0, 10_000), st.integers(0, 255)), max_size=6),
    end=st.none() | st.integers(0, 4000),
    bit_depth=st.sampled_from(["auto", 8, 12, 16]),
)
@example(content=b"", flips=[], end=None, bit_depth="auto")
@example(content=b"P5 9 9 99999\n", flips=[], end=None, bit_depth="auto")
@example(content=b"P6 32", flips=[], end=None, bit_depth=12)
def test_any_bytes_give_pixels_or_say_why_not(
    content: bytes, flips: list[tuple[int, int]], end: int | None, bit_depth: "int | str"
) -> None:
    damaged = bytearray(content[:end])
    for place, value in flips:
        if damaged:
            damaged[place % len(damaged)] = value
    try:
        pixels, depth = decode_photo(bytes(damaged), bit_depth)  # type: ignore[arg-type]
    except PhotoError as error:
        assert str(error)  # noqa: PT017
    else:
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert 8 <= depth <= 16
