# SPDX-License-Identifier: Apache-2.0

"""Large photos in tiles: no seam, no score that hangs on where tiles begin, and a bank that says what it is of."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anomalib_resad import cli
from anomalib_resad.deploy import BankError, PhotoError, ResADInferencer
from anomalib_resad.deploy.bake import bake
from anomalib_resad.deploy.tiles import BATCH, OVERLAP, inspected, scaled_size, starts
from anomalib_resad.enrollment.photos import read_pixels
from tests.test_edge_thresholds import knowing

SIDE = 64  # of the tiny models' input


@pytest.fixture
def model(bundle_default: Path, tmp_path: Path) -> ResADInferencer:
    return ResADInferencer(knowing(bundle_default, tmp_path / "bundle"), threads=1)


@pytest.fixture(scope="module")
def walls(good: list[Path]) -> list[np.ndarray]:
    """Photos of 256 x 192 pixels, each made of 12 small ones."""
    small = [read_pixels(path) for path in good]
    rng = np.random.default_rng(0)

    def wall() -> np.ndarray:
        chosen = [small[index] for index in rng.integers(0, len(small), 12)]
        return np.concatenate([np.concatenate(chosen[row : row + 4], axis=1) for row in (0, 4, 8)])

    return [wall() for _ in range(5)]


# -- where tiles lie --------------------------------------------------------------------------------------------------


@given(st.integers(16, 300), st.integers(0, 5000))
def test_tiles_cover_a_side_and_overlap(tile: int, rest: int) -> None:
    found = starts(tile + rest, tile)
    assert (found[0], found[-1]) == (0, rest)
    gaps = np.diff(found)
    assert (gaps > 0).all()
    assert (gaps <= tile * (1 - OVERLAP) + 1).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(64, 300), st.integers(64, 300))
def test_there_are_no_seams(height: int, width: int) -> None:
    """What is the same in all tiles is the same in the whole map; each tile counts least where it ends."""
    pixels = np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (height, width, 3))
    sizes = []

    def detect(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes.append(len(tiles))
        return tiles.max(axis=(1, 2, 3)).astype(np.float32), tiles[..., 0].astype(np.float32)

    score, found = inspected(pixels, (SIDE, SIDE), detect)
    np.testing.assert_allclose(found, pixels[..., 0], rtol=1e-5)
    assert score == pixels.max()
    assert max(sizes) <= BATCH, "memory is bounded"


def test_a_step_between_tiles_becomes_a_slope() -> None:
    numbers = iter(range(100))
    values: dict[int, float] = {}

    def detect(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        levels = np.array([values.setdefault(next(numbers), float(len(values) % 2)) for _ in tiles], np.float32)
        return levels, np.broadcast_to(levels[:, None, None], (len(tiles), SIDE, SIDE))

    _, found = inspected(np.zeros((SIDE, 3 * SIDE, 3), np.uint8), (SIDE, SIDE), detect)
    assert np.abs(np.diff(found, axis=1)).max() < 4 / (OVERLAP * SIDE)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 192 - 16), st.integers(0, 256 - 16))
def test_small_defects_lie_whole_in_a_tile(top: int, left: int) -> None:
    """Up to the overlap, wherever tiles begin; and the score is that of the tile that shows most."""
    broken = np.zeros((192, 256, 3), np.uint8)
    broken[top : top + 16, left : left + 16] = 1

    def detect(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tiles[..., 0].sum(axis=(1, 2)).astype(np.float32), tiles[..., 0].astype(np.float32)

    score, found = inspected(broken, (SIDE, SIDE), detect)
    assert score == 16 * 16
    np.testing.assert_allclose(found, broken[..., 0])


def test_photos_smaller_than_a_tile_are_refused() -> None:
    assert scaled_size((3000, 4096), 4, (224, 224)) == (750, 1024)
    with pytest.raises(ValueError, match=r"100 x 300 pixels are smaller than a tile at tile_scale=2, .* at most 1\.56"):
        scaled_size((300, 100), 2, (64, 64))
    with pytest.raises(ValueError, match="Leave tile_scale out"):
        scaled_size((300, 50), 2, (64, 64))


# -- products ---------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_new_photos(model: ResADInferencer, walls: list[np.ndarray]) -> None:
    bank = model.enroll("all", walls[:3], rotations=1, tile_scale=1.5)
    for index, wall in enumerate(walls[:3]):
        others = [*walls[:index], *walls[index + 1 : 3]]
        model.enroll("others", others, rotations=1, tile_scale=1.5, replace_existing=True)
        score = model.predict(wall, "others").raw_score
        assert min(abs(score - each) for each in bank.leave_one_out or ()) < 1e-4
    reopened = ResADInferencer(model.bundle, banks=model.banks, threads=1)
    assert reopened.predict(walls[4], "all").raw_score == next(model.predict_batch([walls[4]], "all")).raw_score


def test_what_a_bank_of_tiles_can_and_cannot(
    model: ResADInferencer, walls: list[np.ndarray], good: list[Path], tmp_path: Path
) -> None:
    model.enroll("wall", walls[:2], rotations=1, tile_scale=1)
    assert model.set_threshold("wall", 3.0).tile_scale == 1
    assert model.calibrate("wall", 0.1).threshold is not None
    assert model.bank("wall")._metadata()["format"] == "resad-bank-3"
    again = model.enroll("wall", walls[1::-1], rotations=1, replace_existing=True)
    assert again.tile_scale == 1, "as it was; the order does not matter"
    other = model.enroll("other", walls[:2], rotations=1, tile_scale=1)
    assert all(np.array_equal(rows, other.arrays[name]) for name, rows in again.arrays.items())
    model.remove("other")
    for change in (lambda: model.add("wall", walls[2:3]), lambda: model.remove("wall", again.references[0].name)):
        with pytest.raises(ValueError, match=r"looked at in tiles .* Enroll it again from all its photos"):
            change()
    with pytest.raises(ValueError, match=r"tile_scale=1\), which a baked file cannot"):
        bake(model.bundle, "wall", tmp_path / "baked", model.banks)
    for scale in (0.5, 65, True):
        with pytest.raises(ValueError, match="from 1 to 64"):
            model.enroll("other", walls[:2], tile_scale=scale)
    with pytest.raises(ValueError, match="cannot be combined with a region"):
        model.enroll("other", walls[:2], tile_scale=1, region="20,20 90,20 90,90 20,90")
    with pytest.raises(PhotoError, match="smaller than a tile"):
        model.enroll("other", good[:2], tile_scale=2)
    with pytest.raises(PhotoError, match="smaller than a tile"):
        model.predict(np.zeros((50, 90, 3), np.uint8), "wall")
    whole = model.enroll("wall", walls[:2], rotations=1, replace_existing=True, tile_scale=0)
    plain = model.enroll("plain", walls[:2], rotations=1)
    assert replace(whole, product="plain").arrays.keys() == plain.arrays.keys()
    assert whole._metadata()["format"] == "resad-bank-2"


def test_rotated_copies_and_limits(model: ResADInferencer, walls: list[np.ndarray]) -> None:
    few = model.enroll("few", walls[:2], rotations=8, tile_scale=1, max_patches=60)
    assert {name: len(rows) for name, rows in few.arrays.items()} == {
        "rows_0": 60,
        "rows_1": 16,
        "rows_2": 60,
        "reach": 60,
    }
    assert few.rotations == 8
    assert model.enroll("auto", walls[:2], rotations="auto", tile_scale=1).rotations in (1, 8)
    assert np.isfinite(model.predict(walls[3], "few").raw_score)


def test_altered_scales_are_refused(model: ResADInferencer, walls: list[np.ndarray]) -> None:
    bank = model.enroll("wall", walls[:2], rotations=1, tile_scale=1)
    replace(bank, tile_scale=0.25).save(model.banks / "wall.safetensors")
    with pytest.raises(BankError, match=r"tile_scale=0\.25 must be"):
        model.predict(walls[0], "wall")


def test_the_command(model: ResADInferencer, walls: list[np.ndarray], tmp_path: Path) -> None:
    for folder, some in (("good", walls[:2]), ("new", walls[2:4])):
        (tmp_path / folder).mkdir()
        for number, wall in enumerate(some):
            Image.fromarray(wall).save(tmp_path / folder / f"{number}.png")
    enroll: Callable[..., None] = cli.enroll
    enroll(model.bundle, "wall", tmp_path / "good", rotations=1, tile_scale=1.0)
    cli.predict(model.bundle, "wall", tmp_path / "new", tmp_path / "found")
    rows = [json.loads(line) for line in (tmp_path / "found" / "results.jsonl").read_text().splitlines()]
    assert [row["raw_score"] for row in rows] == [
        pytest.approx(model.predict(wall, "wall").raw_score, abs=1e-5) for wall in walls[2:4]
    ]
