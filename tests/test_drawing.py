# SPDX-License-Identifier: Apache-2.0

"""A region of interest that is drawn on the page, corner by corner."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_resad.deploy import ResADInferencer

gr = pytest.importorskip("gradio", reason="the extra [serve] is not installed")

from anomalib_resad.deploy.drawing import Drawing  # noqa: E402
from anomalib_resad.deploy.page import Page  # noqa: E402
from anomalib_resad.deploy.pictures import BOX  # noqa: E402
from anomalib_resad.deploy.uploads import Uploads  # noqa: E402


@pytest.fixture
def page(inferencer: ResADInferencer, uploads: Path) -> Page:
    return Page(inferencer, Uploads(uploads, 1_000_000))


def marked(picture: str) -> set[tuple[int, int]]:
    """Pixels in the color of corners, x and y."""
    rows, columns = np.nonzero((np.asarray(Image.open(picture)) == BOX).all(axis=2))
    return {*zip(columns.tolist(), rows.tolist(), strict=True)}


def test_corners_are_clicked_in_pixels_of_the_photo(page: Page, uploads: Path, tmp_path: Path) -> None:
    """Also where the photo is shown smaller than it is; pictures that are no longer shown go."""
    Image.new("RGB", (3000, 1500)).save(tmp_path / "large.png")
    files, drawing = [str(tmp_path / "large.png")], Drawing(page)
    picture, _ = drawing.show(files, "auto", None, None)
    assert Image.open(picture).size == (1000, 500)
    assert not marked(picture)
    text = None
    for at in ((100, 50), (900, 50), (999.9, 500)):
        text, picture, _ = drawing.click(files, "auto", text, picture, at)
    assert text == "300,150 2700,150 3000,1500"
    assert {(100, 50), (500, 50), (900, 50)} <= marked(picture), "corners, and a line between them"
    assert drawing.restart(files, "auto", picture)[0] == ""
    assert len([*uploads.iterdir()]) == 1
    assert drawing.show(None, "auto", text, None)[0] is None
    assert drawing.click(None, "auto", text, None, (1, 1))[0] == text


def test_corners_are_of_the_file_where_a_photo_is_read_smaller(page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (6000, 3000)).save(tmp_path / "large.jpg")
    files, drawing = [str(tmp_path / "large.jpg")], Drawing(page)
    text, picture, _ = drawing.click(files, "auto", None, None, (500, 250))
    assert text == "3000,1500"
    assert (500, 250) in marked(picture)


def test_what_is_drawn_is_enrolled(page: Page, good: list[Path]) -> None:
    drawing, files = Drawing(page), [str(path) for path in good[:2]]
    side = Image.open(good[0]).width
    text = ""
    for at in ((0, 0), (side / 2, 0), (side / 2, side)):
        text, *_ = drawing.click(files, "auto", text, None, at)
    *_, left = page.enroll("drawn", files, 1, "auto", text)
    assert left == "", "the next product is another one"
    region = page.inferencer.bank("drawn").region
    assert region is not None
    assert region[1, side // 4]
    assert not region[-1, 1]
    with pytest.raises(gr.Error, match=r"What counts of 'drawn' is known"):
        page.enroll("drawn", [str(good[2])], 1, "auto", text)
    page.enroll("drawn", [str(good[2])])
    assert len(page.inferencer.bank("drawn").references) == 3


def test_a_photo_that_cannot_be_read_is_told(page: Page, tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(gr.Error, match=r"half\.png"):
        Drawing(page).show([str(tmp_path / "half.png")], "auto", None, None)
