# SPDX-License-Identifier: Apache-2.0

"""A defect that was missed is taught: what looks like it scores higher, and nothing else changes or is lost."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anomalib_resad.deploy import BankError, PhotoError, ResADInferencer
from anomalib_resad.deploy.bake import bake
from anomalib_resad.deploy.bank import TAUGHT, USED
from anomalib_resad.deploy.bank_rows import left_out, on_grid
from anomalib_resad.enrollment.photos import read_pixels
from anomalib_resad.enrollment.taught import EQUAL, RAISE, Taught, defect_cells, enlarging
from tests.test_bake import compare
from tests.test_edge_commands import resad
from tests.test_edge_thresholds import SPREAD, knowing
from tests.test_export import precisions
from tests.test_history import content
from tests.test_threshold_commands import Device

BOX = (16, 16, 24, 24)


@pytest.fixture
def model(bundle_default: Path, tmp_path: Path) -> ResADInferencer:
    return ResADInferencer(knowing(bundle_default, tmp_path / "bundle"), threads=1)


@pytest.fixture
def enrolled(model: ResADInferencer, good: list[Path]) -> ResADInferencer:
    model.enroll("tiles", good[:3], rotations=1)
    return model


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_raises_by_hand() -> None:
    """A patch that is equal to a taught one, and one that is nearer to the good one."""
    good, taught = np.eye(4, dtype=np.float32)[:1], np.eye(4, dtype=np.float32)[1:2]
    keys = np.zeros((1, 4, 1, 2), dtype=np.float32)
    keys[0, :, 0, 0], keys[0, :, 0, 1] = taught[0], [0.8, 0.6, 0, 0]
    known = Taught(good, taught, 3.0, (8, 16))
    scores, maps = known.raises(keys)
    most = 3 * np.log((2 + EQUAL) / EQUAL)
    assert scores == pytest.approx([most], rel=1e-5)
    assert maps.shape == (1, 8, 16)
    np.testing.assert_allclose(maps[0], most * np.outer(np.ones(8), enlarging(2, 16)[0]), rtol=1e-5)
    assert np.all(np.diff(maps[0, 0]) <= 1e-5), "highest where the taught patch is"
    np.testing.assert_allclose(enlarging(28, 224).sum(axis=0), 1, rtol=1e-5)


@pytest.mark.parametrize("size", [(56, 112), (60, 100), (7, 9)])
def test_defect_cells(size: tuple[int, int]) -> None:
    """Those that are covered by a tenth; of a smaller defect the one that it covers most."""
    height, width = size
    mask = np.zeros(size, dtype=bool)
    mask[height // 2 :, width // 2 :] = True
    found = defect_cells(mask, 4, 4)
    assert found[2:, 2:].all()
    assert found.sum() == 4 or height < 8, "cells of small photos share pixels"
    dot = np.zeros((100, 100), dtype=bool)
    dot[30, 80] = True
    assert np.argwhere(defect_cells(dot, 4, 4)).tolist() == [[1, 3]]


# -- on a device ------------------------------------------------------------------------------------------------------


def test_taught_defects_score_higher(enrolled: ResADInferencer, good: list[Path], missed: list[Path]) -> None:
    """Good photos of the bank do not, compared with the others; the threshold and other products stay."""
    other, start = enrolled.enroll("other", good[:2]), enrolled.bank("tiles")
    before = [enrolled.predict(path, "tiles") for path in missed]
    bank = [enrolled.teach("tiles", path, box=BOX) for path in missed][-1]
    for path, was in zip(missed, before, strict=True):
        found = enrolled.predict(path, "tiles")
        assert found.raw_score > was.raw_score + 0.5
        gained = found.map - was.map
        assert np.unravel_index(gained.argmax(), gained.shape)[0] in range(12, 44), "where the defect is"
    assert (bank.threshold, bank.leave_one_out) == (start.threshold, start.leave_one_out)
    known, level = enrolled.loaded("tiles").taught, enrolled.manifest.levels[-1]
    assert known is not None
    assert known.unit == pytest.approx(RAISE * SPREAD)
    assert 0 < len(known.taught) < len(bank.arrays[TAUGHT]), "some resemble good photos, and do not count"
    highest = []
    for own, others in left_out(bank, enrolled.manifest):
        keys, alone = on_grid(bank, level, own[-1], others[-1][0]), replace(known, good=others[-1])
        assert alone.raises(keys)[0] == pytest.approx([0], abs=1e-4)
        highest.append(float(replace(alone, taught=bank.arrays[TAUGHT]).raises(keys)[0][0]))
    assert max(highest) > 1e-2, "what does not count would raise a good photo"
    assert content(enrolled, "other") == other.content


def test_each_teaching_is_undone(enrolled: ResADInferencer, missed: list[Path]) -> None:
    """The same again changes nothing and is no step; a mask says what a box says."""
    states = [content(enrolled)]
    for path in missed:
        states.append(enrolled.teach("tiles", path, box=BOX).content)
        enrolled.teach("tiles", path, mask=path.with_name("mask.png"))
        assert content(enrolled) == states[-1]
    assert [each.what for each in enrolled.history("tiles")] == ["enroll", "teach noise.png", "teach stripes.png"]
    assert enrolled.forget("tiles").content == states[0]
    enrolled.undo("tiles")
    assert content(enrolled) == states[2]
    for number in (3, 2):
        enrolled.undo("tiles", number)
        assert content(enrolled) == states[number - 2]
    assert enrolled.loaded("tiles").taught is None
    steps = enrolled.history("tiles")
    with pytest.raises(ValueError, match=r"'tiles' was taught nothing.*`resad history`"):
        enrolled.forget("tiles")
    assert enrolled.history("tiles") == steps
    assert content(enrolled) == states[0]


def test_what_was_taught_follows_every_change(enrolled: ResADInferencer, good: list[Path], missed: list[Path]) -> None:
    """As if it had been taught last; in which order does not matter."""
    enrolled.enroll("later", good[:3], rotations=1)
    changes: list[Callable[[str], object]] = [
        lambda _: None,
        lambda name: enrolled.add(name, good[3:5]),
        lambda name: enrolled.remove(name, good[0].name),
        lambda name: enrolled.set_threshold(name, 1.5),
        lambda name: enrolled.set_min_area(name, 3),
        lambda name: enrolled.calibrate(name, 0.1),
        lambda name: enrolled.enroll(name, good[2:5], rotations=1, replace_existing=True, max_patches=50),
    ]
    for path in missed:
        enrolled.teach("tiles", path, box=BOX)
    for change in changes:
        change("tiles")
        change("later")
        for path in reversed(missed):
            enrolled.teach("later", path, box=BOX)
        assert len(enrolled.bank("tiles").taught) == 2
        assert content(enrolled) == replace(enrolled.bank("later"), product="tiles").content
        enrolled.forget("later")


def test_without_a_mark_the_most_different_patches_are_taught(enrolled: ResADInferencer, missed: list[Path]) -> None:
    (row,) = enrolled.teach("tiles", missed[1]).arrays[TAUGHT]
    marked = enrolled.teach("tiles", missed[1], box=BOX).arrays[TAUGHT]
    assert len(marked) > 4
    assert any(np.array_equal(row, each) for each in marked)


@pytest.mark.parametrize(("like", "region"), [("uint8 rgb", None), ("float32 bgr", "8,8 56,8 56,60 8,60")])
def test_a_baked_file_knows_what_was_taught(
    enrolled: ResADInferencer, good: list[Path], new: list[Path], missed: list[Path], tmp_path: Path, like: str,
    region: str | None,
) -> None:  # fmt: skip
    enrolled.enroll("tiles", good[:4], rotations=1, region=region, replace_existing=True)
    for path in missed:
        enrolled.teach("tiles", path, box=BOX)
    pixels, color = like.split()
    path = bake(enrolled.bundle, "tiles", tmp_path / "tiles", enrolled.banks, pixels, color)  # type: ignore[arg-type]
    compare(path, enrolled, [*missed, *new[:3]], like)
    assert not {name for name, kind in precisions(path).items() if kind in ("bf16", "f16")}, "all in float32"


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"box": (50, 10, 20, 10)}, r"box=\(50, 10, 20, 10\) does not lie in the photo, which has 64 x 64 pixels"),
        ({"box": (-1, 0, 9, 9)}, "does not lie in the photo"),
        ({"box": (5, 5, 0, 9)}, "does not lie in the photo"),
        ({"box": (5, 5, 9)}, "does not lie in the photo"),
        ({"mask": np.zeros((64, 64), dtype=bool)}, "The mask is empty"),
        ({"mask": np.ones((32, 48), dtype=bool)}, "The mask has 48 x 32 pixels, the photo 64 x 64"),
        ({"mask": np.ones((64, 64), dtype=bool), "box": BOX}, "both say where the defect is"),
    ],
)
def test_impossible_marks_are_refused(
    enrolled: ResADInferencer, missed: list[Path], given: dict[str, Any], told: str
) -> None:
    before = content(enrolled)
    with pytest.raises(ValueError, match=told):
        enrolled.teach("tiles", missed[0], **given)
    assert content(enrolled) == before


def test_what_cannot_be_taught_is_refused(
    enrolled: ResADInferencer, bundle: Path, good: list[Path], missed: list[Path], tmp_path: Path
) -> None:
    """A sentence each, and nothing is changed."""
    with pytest.raises(ValueError, match="'pill' is not enrolled"):
        enrolled.teach("pill", missed[0])
    with pytest.raises(PhotoError, match=f"{good[0].name} is one of the good photos of 'tiles'"):
        enrolled.teach("tiles", good[0])
    plain = tmp_path / "good.png"
    Image.fromarray(read_pixels(good[0])[:, :63]).save(plain)
    with pytest.raises(PhotoError, match=r"good\.png: nothing in what was marked differs from the good photos"):
        enrolled.teach("tiles", plain, box=(0, 0, 8, 8))
    before = enrolled.teach("tiles", missed[0], box=BOX).content
    for change in ({"region": "0,0 32,0 32,64 0,64"}, {"tile_scale": 1.0}):
        with pytest.raises(ValueError, match=r"was taught defects \(1 of its photos\).*resad teach --forget"):
            enrolled.enroll("tiles", good[:3], replace_existing=True, **change)
    for refused in (
        lambda: enrolled.add("tiles", missed[:1]),
        lambda: enrolled.enroll("tiles", missed[:1], rotations=1, replace_existing=True),
    ):
        with pytest.raises(PhotoError, match=r"noise\.png was taught to 'tiles' as a defect"):
            refused()
    assert content(enrolled) == before
    enrolled.enroll("half", good[:2], rotations=1, region="0,0 8,0 8,64 0,64")
    with pytest.raises(ValueError, match="lies outside of the region of 'half'"):
        enrolled.teach("half", missed[0], box=BOX)
    published = ResADInferencer(bundle, banks=tmp_path / "banks")
    published.enroll("tiles", good[:2], rotations=1)
    with pytest.raises(ValueError, match="published method, which compares its levels apart, and cannot be taught"):
        published.teach("tiles", missed[0])


def test_without_a_known_scatter_two_photos_are_needed(
    bundle_default: Path, good: list[Path], missed: list[Path], tmp_path: Path
) -> None:
    """As of bundles of 0.1.0, and of a plain distance; what was taught waits where one photo is left."""
    model = ResADInferencer(knowing(bundle_default, tmp_path / "bundle", None), threads=1)
    model.enroll("tiles", good[:1], rotations=1)
    with pytest.raises(ValueError, match=r"'tiles' has one photo.*Add a good photo first"):
        model.teach("tiles", missed[0])
    model.add("tiles", good[1:2])
    bank = model.teach("tiles", missed[0], box=BOX)
    known = model.loaded("tiles").taught
    assert known is not None
    assert known.unit == pytest.approx(RAISE * np.std(bank.leave_one_out, ddof=1))
    model.remove("tiles", good[1].name)
    assert model.loaded("tiles").taught is None
    model.predict(missed[0], "tiles")
    model.add("tiles", good[1:2])
    assert model.bank("tiles").content == bank.content


def test_banks_with_taught_patches_are_checked(enrolled: ResADInferencer, missed: list[Path]) -> None:
    """Earlier versions, which know none, refuse them by their format."""
    bank = enrolled.teach("tiles", missed[0], box=BOX)
    assert bank._metadata()["format"] == "resad-bank-4"
    assert enrolled.forget("tiles")._metadata()["format"] == "resad-bank-2"
    for arrays in (
        bank.arrays | {USED: bank.arrays[USED][1:]},
        bank.arrays | {TAUGHT: bank.arrays[TAUGHT][:, 1:].copy()},
        bank.arrays | {TAUGHT: bank.arrays[TAUGHT] * np.float32(np.nan)},
        {name: values for name, values in bank.arrays.items() if name != USED},
    ):
        replace(bank, arrays=arrays).save(enrolled.banks / "tiles.safetensors")
        with pytest.raises(BankError, match="what it was taught is no list of patches"):
            enrolled.predict(missed[0], "tiles")


# -- commands ---------------------------------------------------------------------------------------------------------


def test_commands(
    enrolled: ResADInferencer, missed: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device, first = Device(enrolled.bundle, monkeypatch, capsys), content(enrolled)
    product = ("--bundle", enrolled.bundle, "--product", "tiles")
    said = resad("teach", *product, "--photo", missed[0], "--box", "16,16,24,24")
    assert "tiles was taught defects of a photo by now: 3 patches count, 6 do not" in said
    assert "noise.png scored 0." in said
    said = device("teach", *product[2:], "--photo", missed[1])
    assert "defects of 2 photos" in said
    assert "Where the defect is was guessed" in said
    assert "is what it was before step 3 (teach stripes.png)" in device("undo", *product[2:])
    assert "box='16,16' is no box" in device("teach", *product[2:], "--photo", missed[0], "--box", "16,16", status=2)
    assert "Give one of them" in device("teach", *product[2:], "--photo", missed[0], "--forget", status=2)
    assert "Give the photo of a defect" in device("teach", *product[2:], status=2)
    assert "of 1 photos is forgotten" in device("teach", *product[2:], "--forget")
    assert content(enrolled) == first
    assert "'tiles' was taught nothing" in device("teach", *product[2:], "--forget", status=2)
