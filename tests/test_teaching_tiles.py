# SPDX-License-Identifier: Apache-2.0

"""Defects are taught to products that are looked at in tiles, and their good photos keep their scores and maps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anomalib_resad.deploy import BankError, PhotoError, ResADInferencer
from anomalib_resad.deploy.bank import REACH, TAUGHT, USED
from anomalib_resad.deploy.tiles import batches, part_of, resized_to
from anomalib_resad.enrollment.photos import read_pixels
from anomalib_resad.enrollment.references import read_references
from anomalib_resad.enrollment.taught import EQUAL, MOST_PATCHES, Taught, in_reach, nearest, widen
from tests.test_edge_thresholds import knowing
from tests.test_history import content
from tests.test_threshold_commands import Device

SIDE = 64  # of the tiny models' input
BOX = (104, 64, 24, 24)  # in two columns of tiles, which begin at 48 and 96
MARK = (96, 48, 40, 48)  # and what is around it


@pytest.fixture
def model(bundle_default: Path, tmp_path: Path) -> ResADInferencer:
    """One whose raises are large, so that the tile with the defect becomes the one that counts."""
    return ResADInferencer(knowing(bundle_default, tmp_path / "bundle", 100.0), threads=1)


@pytest.fixture(scope="module")
def walls(good: list[Path]) -> list[np.ndarray]:
    """Photos of 256 x 192 pixels, which differ by noise."""
    rng, wall = np.random.default_rng(0), np.tile(read_pixels(good[0]), (3, 4, 1)).astype(int)
    return [np.clip(wall + rng.integers(-8, 9, wall.shape), 0, 255).astype(np.uint8) for _ in range(5)]


@pytest.fixture(scope="module")
def broken(walls: list[np.ndarray]) -> list[np.ndarray]:
    """Walls with noise, and with stripes, in the box."""
    left, top, wide, high = BOX
    stripes = np.where(np.arange(wide)[None, :, None] // 2 % 2, 255, 0) * np.ones((high, wide, 3), int)
    noise = np.random.default_rng(0).integers(0, 256, (high, wide, 3))
    made = [walls[3].copy(), walls[4].copy()]
    for wall, defect in zip(made, (noise, stripes), strict=True):
        wall[top : top + high, left : left + wide] = defect
    return made


@pytest.fixture
def enrolled(model: ResADInferencer, walls: list[np.ndarray]) -> ResADInferencer:
    model.enroll("wall", walls[:3], rotations=1, tile_scale=1)
    return model


def keys_of(model: ResADInferencer, pixels: np.ndarray) -> np.ndarray:
    """Keys of all tiles, shape ``(T, K, H, W)``."""
    return np.concatenate([model.encode(tiles)[-1] for _, tiles in batches(pixels, (SIDE, SIDE))])


def taught_of(model: ResADInferencer) -> Taught:
    known = model.loaded("wall").taught
    assert known is not None
    return known


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_reach_by_hand() -> None:
    """As far as patches lie, among all rows and among those of the other photo; what lies farther is not in it."""
    angles = np.array([0.0, 1.0, 0.2, 0.9, 0.5])
    first, second, near, far, between = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    rows, reach = np.stack([first, second]), np.zeros(2, dtype=np.float32)
    widen(reach, near[None, :, None, None], rows, np.array([False, True]))
    apart = [2 - 2 * np.cos(0.2), 2 - 2 * np.cos(0.8)]
    assert reach == pytest.approx(apart, rel=1e-4)
    widen(reach, first[None, :, None, None], rows, np.array([True, True]))
    assert reach == pytest.approx(apart, rel=1e-4), "it does not shrink"
    small = np.array(apart, dtype=np.float32) * [1, 0.1]
    assert in_reach(np.stack([near, far, between]), rows, small).tolist() == [True, True, False]
    keys = np.stack([near, between]).T[None, :, None]
    known = Taught(rows, np.stack([near, between]), 1.0, (8, 16))
    distances = 2 - 2 * np.cos([0.2, 0.5, 0.3])  # of near and of between to the first row, and to each other
    nearer = np.log((distances + EQUAL) / ([EQUAL, EQUAL, distances[2] + EQUAL]))
    for taught, expected in (([near, between], nearer[1]), ([near], nearer[0])):
        assert replace(known, taught=np.stack(taught)).raises(keys)[0] == pytest.approx([expected], rel=1e-3)
    limited = replace(known, taught=near[None], reach=small)
    expected = np.log((distances[1] + EQUAL) / (distances[2] + EQUAL))
    assert limited.raises(keys)[0] == pytest.approx([expected], rel=1e-3), "near lies in reach, between does not"


def test_what_a_tile_shows_of_a_mask() -> None:
    """At a scale of 3 and 2; tiles side by side share no pixel and leave none out."""
    mask = np.arange(12 * 8).reshape(12, 8)
    np.testing.assert_array_equal(part_of(mask, (1, 2), (2, 2), (4, 4)), mask[3:9, 4:8])
    parts = [part_of(mask, (0, left), (4, 1), (4, 5)) for left in range(5)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), mask)


# -- on a device ------------------------------------------------------------------------------------------------------


def test_taught_defects_score_higher(
    enrolled: ResADInferencer, walls: list[np.ndarray], broken: list[np.ndarray]
) -> None:
    """Good photos of the bank score as before, to the bit, and so do their maps; also against the others alone."""
    start, before = enrolled.bank("wall"), [enrolled.predict(wall, "wall") for wall in [*walls, *broken]]
    bank = [enrolled.teach("wall", wall, box=MARK) for wall in broken][-1]
    for wall, was in zip(broken, before[5:], strict=True):
        found = enrolled.predict(wall, "wall")
        assert found.raw_score > was.raw_score + 0.5
        gained = found.map - was.map
        row, column = np.unravel_index(gained.argmax(), gained.shape)
        assert row in range(60, 92)
        assert column in range(100, 132)
    for wall, was in zip(walls[:3], before, strict=False):
        found = enrolled.predict(wall, "wall")
        assert found.raw_score == was.raw_score
        np.testing.assert_array_equal(found.map, was.map)
    assert (bank.threshold, bank.leave_one_out) == (start.threshold, start.leave_one_out)
    known, highest = taught_of(enrolled), []
    assert known.reach is not None
    assert 0 < len(known.taught) < len(bank.arrays[TAUGHT]), "some resemble good photos, and do not count"
    photo_of = np.repeat(range(3), len(known.reach) // 3)
    for index, wall in enumerate(read_references(walls[:3]).values()):  # in the order of the bank
        keys, others = keys_of(enrolled, wall), photo_of != index
        alone = replace(known, good=known.good[others], reach=known.reach[others], taught=bank.arrays[TAUGHT])
        assert alone.raises(keys)[0].max() == 0
        highest.append(float(replace(alone, reach=None).raises(keys)[0].max()))
    assert max(highest) > 1e-2, "what lies in reach would raise a good photo"


def test_a_defect_is_taken_from_each_tile_that_shows_it(enrolled: ResADInferencer, broken: list[np.ndarray]) -> None:
    """Of a tile that shows a pixel of it, nothing is taken."""
    keys, (left, top, wide, high) = keys_of(enrolled, broken[0]), BOX
    rows = enrolled.teach("wall", broken[0], box=BOX).arrays[TAUGHT]
    corners = [corner for some, _ in batches(broken[0], (SIDE, SIDE)) for corner in some]

    def taken(corner: tuple[int, int]) -> int:
        """How many patches of a tile were taught."""
        own = keys[corners.index(corner)].reshape(keys.shape[1], -1).T
        return int((nearest(rows, own) < 1e-6).sum())

    assert {corner[1] for corner in corners if taken(corner)} == {48, 96}
    assert {corner[0] for corner in corners if taken(corner)} == {43, 85}
    assert sum(map(taken, corners)) >= len(rows) > taken((43, 48))
    enrolled.forget("wall")
    mask = np.zeros(broken[0].shape[:2], dtype=bool)
    mask[top : top + high, 112 : left + wide] = mask[70, 111] = True
    rows = enrolled.teach("wall", broken[0], mask=mask).arrays[TAUGHT]
    assert {corner[1] for corner in corners if taken(corner)} == {96}, "the tile before it ends at 112"


def test_marks_are_made_smaller_with_the_photo(model: ResADInferencer, walls: list[np.ndarray]) -> None:
    """A mask says what a box says, at any scale; the patches are those of the place in the smaller photo."""
    large = [np.asarray(Image.fromarray(wall).resize((640, 480))) for wall in walls[:4]]
    model.enroll("wall", large[:3], rotations=1, tile_scale=2.5)
    broken, mask = large[3].copy(), np.zeros(large[3].shape[:2], dtype=np.uint8)
    broken[160:220, 260:320] = np.random.default_rng(0).integers(0, 256, (60, 60, 3))
    mask[160:220, 260:320] = 255
    bank, before = model.teach("wall", broken, mask=mask), model.bank("wall")
    assert before.content == model.teach("wall", broken, box=(260, 160, 60, 60)).content == bank.content
    keys = keys_of(model, resized_to(broken, (192, 256)))
    every = keys.transpose(0, 2, 3, 1).reshape(-1, keys.shape[1])
    assert (nearest(bank.arrays[TAUGHT], every) < 1e-6).all()
    corners = [corner for some, _ in batches(large[0][:192, :256], (SIDE, SIDE)) for corner in some]
    own = keys[corners.index((43, 96))]
    marked = own[:, 2:6, 1:4].reshape(len(own), -1).T  # the box, less what a cell beside it shows
    assert (nearest(marked, bank.arrays[TAUGHT]) < 1e-6).sum() >= 6
    assert len(bank.arrays[TAUGHT]) <= MOST_PATCHES


def test_without_a_mark_the_most_different_patches_of_all_tiles_are_taught(
    enrolled: ResADInferencer, broken: list[np.ndarray]
) -> None:
    (row,) = enrolled.teach("wall", broken[1]).arrays[TAUGHT]
    keys = keys_of(enrolled, broken[1])
    every = keys.transpose(0, 2, 3, 1).reshape(-1, keys.shape[1])
    np.testing.assert_array_equal(row, every[nearest(every, enrolled.searched("wall")[-1]).argmax()])


def test_each_teaching_is_undone_and_follows(
    enrolled: ResADInferencer, walls: list[np.ndarray], broken: list[np.ndarray]
) -> None:
    """The same again changes nothing; other good photos find out anew what counts."""
    states = [content(enrolled, "wall")]
    for wall in broken:
        states.append(enrolled.teach("wall", wall, box=BOX).content)
        enrolled.teach("wall", wall, box=BOX)
        assert content(enrolled, "wall") == states[-1]
    assert len(enrolled.history("wall")) == 3
    assert enrolled.forget("wall").content == states[0]
    enrolled.undo("wall")
    assert content(enrolled, "wall") == states[2]
    enrolled.undo("wall", 3)
    assert content(enrolled, "wall") == states[1]
    for photos in (walls[1:4], walls[:1], walls[:3]):
        replaced = enrolled.enroll("wall", photos, rotations=1, replace_existing=True)
        enrolled.predict(broken[0], "wall")
        assert len(replaced.taught) == 1
        assert bool(replaced.arrays[USED].any()) == (len(photos) > 1), "it waits where there is one photo"
    assert content(enrolled, "wall") == states[1]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"mask": np.ones((96, 128), dtype=bool)}, "The mask has 128 x 96 pixels, the photo 256 x 192"),
        ({"mask": np.zeros((192, 256), dtype=bool)}, "The mask is empty"),
        ({"box": (250, 10, 20, 10)}, "does not lie in the photo, which has 256 x 192 pixels"),
    ],
)
def test_impossible_marks_are_refused(
    enrolled: ResADInferencer, broken: list[np.ndarray], given: dict[str, Any], told: str
) -> None:
    before = content(enrolled, "wall")
    with pytest.raises(ValueError, match=told):
        enrolled.teach("wall", broken[0], **given)
    assert content(enrolled, "wall") == before


def test_what_cannot_be_taught_is_refused(
    enrolled: ResADInferencer, walls: list[np.ndarray], broken: list[np.ndarray]
) -> None:
    """Good photos, what is like them, small photos, and banks that do not say how far their photos differ."""
    before = content(enrolled, "wall")
    with pytest.raises(PhotoError, match="is one of the good photos of 'wall'"):
        enrolled.teach("wall", walls[0], box=BOX)
    almost = walls[0].copy()
    almost[-1, -1] ^= 1
    with pytest.raises(PhotoError, match="nothing in what was marked differs from the good photos of 'wall'"):
        enrolled.teach("wall", almost, box=(8, 8, 24, 24))
    with pytest.raises(PhotoError, match="smaller than a tile"):
        enrolled.teach("wall", broken[0][:50])
    assert content(enrolled, "wall") == before
    enrolled.teach("wall", broken[0], box=BOX)
    with pytest.raises(ValueError, match=r"was taught defects \(1 of its photos\).*resad teach --forget"):
        enrolled.enroll("wall", walls[:3], replace_existing=True, tile_scale=1.2)
    enrolled.enroll("one", walls[:1], rotations=1, tile_scale=1)
    with pytest.raises(ValueError, match=r"it is of one photo, or of an earlier version\. Enroll the product again"):
        enrolled.teach("one", broken[0], box=BOX)
    bank = enrolled.enroll("old", walls[:3], rotations=1, tile_scale=1)
    del bank.arrays[REACH]
    replace(bank).save(enrolled.banks / "old.safetensors")
    enrolled.predict(walls[3], "old")
    with pytest.raises(ValueError, match=r"it is of one photo, or of an earlier version\. Enroll the product again"):
        enrolled.teach("old", broken[0], box=BOX)


def test_a_reach_is_checked(enrolled: ResADInferencer, walls: list[np.ndarray], broken: list[np.ndarray]) -> None:
    bank = enrolled.teach("wall", broken[0], box=BOX)
    reach = bank.arrays[REACH]
    assert bank._metadata()["format"] == "resad-bank-4"
    assert enrolled.forget("wall")._metadata()["format"] == "resad-bank-3"
    changes: list[Callable[[], dict[str, np.ndarray]]] = [
        lambda: bank.arrays | {REACH: reach[1:]},
        lambda: bank.arrays | {REACH: reach - 9},
        lambda: bank.arrays | {REACH: reach * np.float32(np.nan)},
        lambda: bank.arrays | {REACH: reach.astype(np.float64)},
    ]
    for change in changes:
        replace(bank, arrays=change()).save(enrolled.banks / "wall.safetensors")
        with pytest.raises(BankError, match="the reach of its rows is no list of distances"):
            enrolled.predict(walls[0], "wall")
    arrays = {name: values for name, values in bank.arrays.items() if name != REACH}
    replace(bank, arrays=arrays).save(enrolled.banks / "wall.safetensors")
    with pytest.raises(BankError, match="what it was taught is no list of patches"):
        enrolled.predict(walls[0], "wall")


def test_the_command(
    enrolled: ResADInferencer, broken: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    Image.fromarray(broken[0]).save(tmp_path / "missed.png")
    device, first = Device(enrolled.bundle, monkeypatch, capsys), content(enrolled, "wall")
    said = device("teach", "--product", "wall", "--photo", tmp_path / "missed.png", "--box", ",".join(map(str, BOX)))
    assert "wall was taught defects of a photo by now" in said
    assert "missed.png scored 0." in said
    assert "is what it was before step 2 (teach missed.png)" in device("undo", "--product", "wall")
    assert content(enrolled, "wall") == first
