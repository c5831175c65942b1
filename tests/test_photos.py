# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_resad.enrollment.draws import draw_references, key_of
from anomalib_resad.enrollment.photos import (
    PhotoError,
    Reference,
    by_content,
    check_photos,
    identify,
    list_photos,
    photo_problem,
    read_pixels,
)
from anomalib_resad.enrollment.references import read_references

PIXELS = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)


def write(path: Path, mode: str = "RGB", size: tuple[int, int] = (30, 20)) -> str:
    Image.fromarray(PIXELS).resize(size).convert(mode).save(path)
    return str(path)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1"])
def test_grayscale_palette_and_alpha_are_fine(tmp_path: Path, mode: str) -> None:
    path = write(tmp_path / "photo.png", mode)
    assert photo_problem(path, decode=True) is None
    assert read_pixels(path).shape == (20, 30, 3)


def test_unusable_photos_say_why(tmp_path: Path) -> None:
    deep = tmp_path / "deep.png"
    Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 200).save(deep)
    assert "8 bits" in str(photo_problem(deep))
    assert "1 x 1 pixels" in str(photo_problem(write(tmp_path / "dot.png", size=(1, 1))))
    (tmp_path / "text.png").write_text("no image")
    assert "unreadable" in str(photo_problem(tmp_path / "text.png"))
    whole = Path(write(tmp_path / "whole.png"))
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert "unreadable" in str(photo_problem(tmp_path / "cut.png", decode=True))
    (tmp_path / "empty.png").touch()
    assert "unreadable" in str(photo_problem(tmp_path / "empty.png"))
    assert photo_problem(tmp_path / "none.png") == "no such file"


def folder_of_photos(folder: Path, count: int = 8) -> list[str]:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.fromarray(np.roll(PIXELS, index, axis=1)).save(folder / f"{index}.png")
    return [str(path) for path in list_photos(folder)]


def test_draw_is_seeded_sorted_and_without_replacement(tmp_path: Path) -> None:
    photos = folder_of_photos(tmp_path / "good")
    drawn = draw_references(photos, 4, 0, "here")
    assert len(set(drawn)) == 4
    assert draw_references(photos[::-1], 4, 0, "here") == drawn, "the order of the listing does not matter"
    assert {frozenset(draw_references(photos, 4, seed, "here")) for seed in range(5)} != {frozenset(drawn)}


def test_draws_do_not_depend_on_where_the_products_lie() -> None:
    assert key_of("/a/b/pill/train/good/0.png") == key_of("c/pill/train/good/0.png") == "pill/train/good/0.png"
    assert key_of("/a/pill/test/good/0.png") != key_of("/a/pill/train/good/0.png")


def test_what_is_read_is_ordered_by_content_and_identical_photos_count_once(tmp_path: Path) -> None:
    photos = folder_of_photos(tmp_path / "good", 3)
    expected = read_references(photos)
    assert [each.sha256 for each in expected] == sorted(each.sha256 for each in expected)
    (tmp_path / "good" / "copy.png").write_bytes(Path(photos[0]).read_bytes())
    for listed in (photos[::-1], list_photos(tmp_path / "good")):
        assert list(read_references(listed)) == list(expected), "the first name is kept: 0.png, not copy.png"
    for reference, pixels in expected.items():
        assert np.array_equal(pixels, read_pixels(tmp_path / "good" / reference.name))
    twice = [Reference("b", "1"), Reference("a", "1"), Reference("c", "0")]
    assert by_content(twice) == (Reference("c", "0"), Reference("a", "1"))


def test_pixels_are_named_by_their_content() -> None:
    (first, pixels, depth), (second, *_) = identify(PIXELS), identify(Image.fromarray(PIXELS))
    assert depth == 8
    assert first == second
    assert np.array_equal(pixels, PIXELS)
    assert identify(PIXELS[:, ::-1])[0] != first


def test_too_few_or_unusable_photos(tmp_path: Path) -> None:
    photos = folder_of_photos(tmp_path / "good", 3)
    with pytest.raises(ValueError, match=r"k_shot=4, but the shelf has 3 good photo.*k_shot from 1 to 3"):
        draw_references(photos, 4, 0, "the shelf")
    with pytest.raises(ValueError, match="k_shot=0"):
        draw_references(photos, 0, 0, "the shelf")
    Path(photos[1]).write_text("no image")
    with pytest.raises(PhotoError, match=r"1 of the reference photos.*1\.png: unreadable.*Repair or remove"):
        read_references(photos)
    with pytest.raises(PhotoError, match=r"1 of the source images.*1\.png: unreadable.*Repair or remove"):
        check_photos(photos, "source images")


def test_too_large_photos_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomalib_resad.enrollment.decoding.MOST_PIXELS", 500)
    path = write(tmp_path / "large.png")
    assert "30 x 20 pixels, the most is 500" in str(photo_problem(path))
    with pytest.raises(PhotoError, match="the most is 500"):
        read_pixels(path)


def test_missing_or_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a photo nor a folder"):
        list_photos(tmp_path / "none")
    with pytest.raises(PhotoError, match="holds no photo"):
        list_photos(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(PhotoError, match="holds no photo"):
        list_photos(tmp_path)
