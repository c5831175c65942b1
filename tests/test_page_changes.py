# SPDX-License-Identifier: Apache-2.0

"""Defects are taught, and changes undone, on the page."""

from pathlib import Path

import numpy as np
import pytest

from anomalib_resad.deploy import ResADInferencer

gr = pytest.importorskip("gradio", reason="the extra [serve] is not installed")

from anomalib_resad.deploy.bank import TAUGHT  # noqa: E402
from anomalib_resad.deploy.page import EMPTY, Page  # noqa: E402
from anomalib_resad.deploy.page_changes import PageChanges, mask_of  # noqa: E402
from anomalib_resad.deploy.uploads import Uploads  # noqa: E402
from tests.test_drawing import marked  # noqa: E402
from tests.test_edge_thresholds import knowing  # noqa: E402
from tests.test_history import content  # noqa: E402


@pytest.fixture
def page(bundle_default: Path, good: list[Path], tmp_path: Path, uploads: Path) -> Page:
    inferencer = ResADInferencer(knowing(bundle_default, tmp_path / "bundle"), threads=1)
    inferencer.enroll("tiles", good[:3], rotations=1)
    return Page(inferencer, Uploads(uploads, 1_000_000))


def test_what_is_clicked_is_taught_and_undone(page: Page, missed: list[Path], uploads: Path) -> None:
    """Two corners are a box; the photo is judged anew; after undoing, all is as it was."""
    changes, photo, start = PageChanges(page), str(missed[0]), content(page.inferencer)
    text, picture = changes.restart(photo, "tiles", None)
    assert text == ""
    for at in ((40, 16), (16, 40)):
        text, picture = changes.click(photo, "tiles", text, picture, at)
    assert text == "40,16 16,40"
    assert {(16, 28), (40, 28), (28, 16), (28, 40)} <= marked(picture), "the sides of the box"
    assert len([*uploads.iterdir()]) == 1, "pictures that are no longer shown go"
    before = page.inspect(photo, "tiles", 0.5)[1]
    threshold, _, verdict, _, now, left, steps = changes.teach(photo, "tiles", text, before)
    assert (threshold, left) == (0.5, "")
    assert now.score == page.inferencer.predict(photo, "tiles").score > before.score
    assert f"score **{now.score:.3f}**" in verdict
    assert "defects of a photo by now" in verdict
    assert f"The photo scored {before.score:.3f} before." in verdict
    assert [row[1] for row in steps] == ["teach noise.png", "enroll"]
    taught = page.inferencer.bank("tiles").arrays[TAUGHT]
    *_, verdict, _, now, _, steps = changes.undo("tiles", now)
    assert r"**tiles** is what it was before step 2 (teach noise.png)" in verdict
    assert now.score == before.score
    assert (
        [row[1] for row in steps] == ["undo 2", "teach noise.png", "enroll"] == [r[1] for r in changes.steps("tiles")]
    )
    assert content(page.inferencer) == start
    mask = mask_of(text, (64, 64))
    assert np.argwhere(mask).min(axis=0).tolist() == [16, 16]
    np.testing.assert_array_equal(page.inferencer.teach("tiles", photo, mask).arrays[TAUGHT], taught)


def test_all_that_was_taught_is_forgotten(page: Page, missed: list[Path]) -> None:
    changes, photo, before = PageChanges(page), str(missed[0]), content(page.inferencer)
    changes.teach(photo, "tiles", "16,16 40,40")
    raised = page.inspect(photo, "tiles", 0.5)[1]
    *_, verdict, _, now, steps = changes.forget("tiles", raised)
    assert content(page.inferencer) == before
    assert "**tiles** has forgotten all that it was taught" in verdict
    assert now.score == page.inferencer.predict(photo, "tiles").score < raised.score
    assert steps[0][1] == "forget"
    with pytest.raises(gr.Error, match="'tiles' was taught nothing"):
        changes.forget("tiles")
    assert changes.steps("tiles") == steps
    with pytest.raises(gr.Error, match="Choose a product"):
        changes.forget(None)


def test_what_cannot_be_taught_or_undone_is_told(page: Page, good: list[Path], missed: list[Path]) -> None:
    changes, photo, start = PageChanges(page), str(missed[0]), content(page.inferencer)
    for said, given in (
        ("Choose a product", (photo, None, "16,16 40,40")),
        ("Drop the photo", (None, "tiles", "16,16 40,40")),
        ("Mark the defect first", (photo, "tiles", None)),
        ("Mark the defect first", (photo, "tiles", "16,16")),
        ("The mask is empty", (photo, "tiles", "160,160 170,170")),
        ("is one of the good photos", (str(good[0]), "tiles", "16,16 40,40")),
        ("'pill' is not enrolled", (photo, "pill", "16,16 40,40")),
    ):
        with pytest.raises(gr.Error, match=said):
            changes.teach(*given)
    with pytest.raises(gr.Error, match="'pill' is not enrolled"):
        changes.undo("pill")
    assert changes.steps("pill") == changes.steps(None) == changes.steps("../tiles") == []
    assert content(page.inferencer) == start


def test_a_product_that_is_gone_comes_back(page: Page) -> None:
    """After its removal, and where its first enrollment was undone."""
    changes, start = PageChanges(page), content(page.inferencer)
    _, rows, verdict, picture, found, *_ = changes.undo("tiles")
    assert (rows, picture, found, page.inferencer.products) == ([], None, None, [])
    assert verdict.startswith(EMPTY)
    assert "It is not enrolled now" in verdict
    for gone in (lambda: None, lambda: page.remove("tiles")):
        gone()
        said, rows, chosen = changes.undo_named(" tiles ")
        assert content(page.inferencer) == start
        assert (rows[0][0], chosen.choices) == ("tiles", [("tiles", "tiles")])
        assert "Undo again" in said
    with pytest.raises(gr.Error, match="Choose a product"):
        changes.undo_named("  ")
