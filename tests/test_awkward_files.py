# SPDX-License-Identifier: Apache-2.0

"""Files that are not what they seem: other formats, pages, hidden files, folders of other names."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_resad.data.masks import read_mask
from anomalib_resad.deploy import Prediction
from anomalib_resad.deploy.results import Results
from anomalib_resad.enrollment.decoding import Header
from anomalib_resad.enrollment.photos import PhotoError, list_photos, photo_problem, read_pixels
from tests.conftest import product

PIXELS = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.ppm", "a.tif", "a.webp", "a.jfif"])
def test_documented_formats_are_read(tmp_path: Path, name: str) -> None:
    Image.fromarray(PIXELS).save(tmp_path / name, "JPEG" if name == "a.jfif" else None)
    assert photo_problem(tmp_path / name, decode=True) is None
    assert read_pixels(tmp_path / name).shape == PIXELS.shape
    assert list_photos(tmp_path) == [tmp_path / name]
    Image.fromarray(PIXELS[..., 0] > 99).save(tmp_path / "bits.pbm")
    assert read_pixels(tmp_path / "bits.pbm").max() == 255


@pytest.mark.parametrize("kind", ["GIF", "EPS", "ICO", "TGA"])
def test_other_formats_are_not_decoded_whatever_they_are_called(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("a program was started"))
    Image.fromarray(PIXELS).save(tmp_path / "photo.png", kind)
    assert "unreadable" in str(photo_problem(tmp_path / "photo.png", decode=True))
    with pytest.raises(PhotoError, match="unreadable"):
        read_pixels(tmp_path / "photo.png")


@pytest.mark.parametrize("name", ["pages.tif", "moving.png", "moving.webp"])
def test_several_pages_are_refused(tmp_path: Path, name: str) -> None:
    first = Image.fromarray(PIXELS)
    first.save(tmp_path / name, save_all=True, append_images=[Image.fromarray(PIXELS[::-1])])
    assert "2 pages or frames; save the one" in str(photo_problem(tmp_path / name))
    with pytest.raises(PhotoError, match="2 pages or frames"):
        read_pixels(tmp_path / name)


def test_hidden_files_are_no_photos_and_nothing_is_left_out_silently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.png", ".thumbnails/a.png", "@eaDir/a.png", "lot/.Trash-0/b.png", "$Recycle.Bin/d.png", "lot/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS).save(tmp_path / name)
    (tmp_path / "._a.png").write_bytes(b"Mac OS X")
    (tmp_path / "Thumbs.db").touch()
    (tmp_path / "b.gif").touch()
    with caplog.at_level(logging.WARNING):
        assert list_photos(tmp_path) == [tmp_path / "a.png", tmp_path / "lot" / "c.png"]
    assert "left out: 1 .db, 1 .gif, 5 hidden." in caplog.text


def test_names_of_all_kinds(tmp_path: Path) -> None:
    latin = b"caf\xe9.png".decode("utf8", "surrogateescape")
    names = ["cam[0].png", "Prüfteil 1.png", "产品.png", "=1+1.png", "-x.png", "a.b.png", latin]
    for name in names:
        Image.fromarray(PIXELS).save(tmp_path / "plain.png")
        (tmp_path / "plain.png").rename(tmp_path / name)
    assert {path.name for path in list_photos(tmp_path)} == set(names)
    assert all(np.array_equal(read_pixels(path), PIXELS) for path in list_photos(tmp_path))


def test_folders_of_other_names(tmp_path: Path) -> None:
    for name in ("train/Good/a.png", "test/OK/b.png", "test/normal/c.png", "test/hole/d.png", "test/.cache/e.png"):
        (tmp_path / "part" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS).save(tmp_path / "part" / name)
    data = product(tmp_path, "part")
    data.setup()
    assert len(data.train_data) == 1
    labels = {Path(row.image_path).name: row.label_index for row in data.test_data.samples.itertuples()}
    assert labels == {"b.png": 0, "c.png": 0, "d.png": 1}


def test_linked_folders_count_once_and_never_go_in_circles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("photos/a.png", "elsewhere/b.png", "c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(PIXELS).save(tmp_path / name)
    links = {"lot": "elsewhere", "same": "elsewhere", "round": "photos", "up": "", "gone.png": "none.png"}
    for name, target in links.items():
        (tmp_path / "photos" / name).symlink_to(tmp_path / target)
    with caplog.at_level(logging.WARNING):
        found = list_photos(tmp_path / "photos")
    assert found == [tmp_path / "photos" / "a.png", tmp_path / "photos" / "lot" / "b.png"]
    assert "left out: 1 links to nothing." in caplog.text


def test_results_inside_of_a_product_are_no_defects(tmp_path: Path) -> None:
    """Beside the kinds of defects, as a kind, and inside of one."""
    for name in ("train/good/a.png", "test/good/b.png", "test/hole/c.png"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS).save(tmp_path / "p" / name)
    for name in ("test", "test/found", "test/hole/found"):
        with Results(tmp_path / "p" / name) as results:
            results.add("hole/c.png", Prediction(0.7, True, np.zeros((4, 4), np.float32), 1.5), Image.new("L", (9, 9)))
    data = product(tmp_path, "p")
    data.setup()
    assert sorted(Path(path).name for path in data.test_data.samples.image_path) == ["b.png", "c.png"]


def test_what_is_no_picture_is_told_without_pythons_words(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    for problem in (photo_problem(tmp_path / "a.png"), photo_problem(tmp_path / "a.png", decode=True)):
        assert problem == "unreadable (none of the formats BMP, JPEG, PNG, PPM, TIFF, WEBP)"
    with pytest.raises(PhotoError, match=r"a\.png: unreadable \(none of the formats"):
        read_pixels(tmp_path / "a.png")
    with pytest.raises(PhotoError, match=r"^unreadable \(none of the formats"):
        read_mask(tmp_path / "a.png", Header(8, 8, 8, 1))
