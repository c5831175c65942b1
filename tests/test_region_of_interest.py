# SPDX-License-Identifier: Apache-2.0

"""A product's region of interest: what is outside changes nothing, and what has moved out of it is told."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load, save

from anomalib_resad import cli
from anomalib_resad.deploy import BankError, PhotoError, ResADInferencer
from anomalib_resad.deploy.bake import bake
from anomalib_resad.deploy.bank import ENTRY, checksum_of
from anomalib_resad.deploy.placing import LONGEST, placed
from anomalib_resad.enrollment.photos import read_pixels
from anomalib_resad.enrollment.region import box_of, cells_inside, polygon, read_region, stretched
from benchmarks.products import make_product
from tests.test_edge_thresholds import knowing
from tests.test_export import precisions

CORNERS = "8,8 56,16 48,60 12,52"


@pytest.fixture(params=["", "_default"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> ResADInferencer:
    """Of the published method, with three levels, and of the default."""
    return ResADInferencer(knowing(request.getfixturevalue(f"bundle{request.param}"), tmp_path / "bundle"), threads=1)


def noisy(path: Path, region: np.ndarray) -> np.ndarray:
    """A photo with noise outside of the region."""
    pixels = read_pixels(path).copy()
    outside = stretched(region, pixels.shape[:2]) == 0
    pixels[outside] = np.random.default_rng(0).integers(0, 256, (int(outside.sum()), 3), dtype=np.uint8)
    return pixels


# -- masks ------------------------------------------------------------------------------------------------------------


def test_polygons_hold_the_pixels_whose_centers_they_hold() -> None:
    size = (80, 100)
    mask = read_region("10,20 30,20 30,50 10,50", [size])
    assert mask is not None
    assert box_of(mask, size) == (20, 10, 50, 30)
    assert mask.sum() == mask[20:50, 10:30].sum() == 600
    triangle = read_region(" 0,0; 100,80; 0.0,80 ", [size])
    assert triangle is not None
    assert triangle.sum() == 4000
    assert read_region("0,0 100,0 100,80 0,80", [size]) is None, "all of it is no region"


def test_masks_are_read_as_they_are_painted(tmp_path: Path) -> None:
    inside = np.zeros((60, 80), dtype=bool)
    inside[10:30, 20:70] = True
    Image.fromarray(inside).save(tmp_path / "bits.png")
    Image.fromarray((inside * 255).astype(np.uint8)).save(tmp_path / "lossy.jpg")
    Image.fromarray(np.where(inside[..., None], (255, 0, 0), (0, 0, 90)).astype(np.uint8)).save(tmp_path / "red.png")
    for source in (tmp_path / "bits.png", str(tmp_path / "lossy.jpg"), tmp_path / "red.png", inside):
        mask = read_region(source, [(60, 80), (120, 160)])
        assert mask is not None
        assert np.array_equal(mask, inside)
    large = read_region(np.kron(inside, np.ones((40, 40), dtype=bool)), [(60, 80)])
    assert large is not None
    assert large.shape == (768, 1024), "as fine as models see"
    assert box_of(large, (60, 80)) == (10, 20, 30, 70)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (np.zeros((60, 80), dtype=bool), "The region is empty"),
        (np.eye(64, 64, dtype=bool)[:, :33], "sides are as 33 to 64; this one has 80 x 60"),
        ("10,10 16,10 16,40 10,40", "6 x 30 pixels in photos of 80 x 60, less than 8"),
        ("10,10 90,10 16,40", "the corners 90,10 lie outside"),
        ("10,10 20,10", "2 corners have no area"),
    ],
)
def test_what_is_no_region_is_told(source: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_region(source, [(60, 80)])


def test_polygons_need_photos_of_one_size() -> None:
    with pytest.raises(ValueError, match=r"differ in size \(80 x 60, 160 x 120\)"):
        read_region("10,10 40,10 10,40", [(60, 80), (120, 160)])


def test_the_web_names_no_files() -> None:
    assert polygon(" 1,2 3,4 5,6 ") == "1,2 3,4 5,6"
    assert polygon("") is polygon(None) is None
    with pytest.raises(ValueError, match="is no polygon"):
        polygon("/etc/passwd")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(8, 90), st.integers(8, 90), st.integers(1, 30), st.integers(1, 30))
def test_boxes_and_cells_miss_nothing(seed: int, height: int, width: int, rows: int, columns: int) -> None:
    mask = (np.random.default_rng(seed).random((height, width)) < 0.02).astype(np.uint8)
    mask[seed % height, seed % width] = 1
    top, left, bottom, right = box_of(mask, (height, width))
    assert mask[top:bottom, left:right].sum() == mask.sum()
    cells = cells_inside(mask, rows, columns)
    for row, column in np.argwhere(mask[top:bottom, left:right]):
        assert cells[row * rows // (bottom - top), column * columns // (right - left)]
    assert cells_inside(np.ones_like(mask), rows, columns).all()


def test_maps_are_placed_where_the_region_is() -> None:
    mask = np.zeros((50, 100), dtype=np.uint8)
    mask[10:20, 40:60] = 1
    found = placed(np.ones((20, 20), np.float32), mask)
    assert found.shape == (100, 100)
    assert np.array_equal(found, np.kron(mask, np.ones((2, 1), np.uint8)))
    mask[:] = 0
    mask[4, 4:6] = 1  # one of 50 rows
    small = placed(np.arange(224 * 224, dtype=np.float32).reshape(224, 224), mask)
    assert max(small.shape) < 1.6 * LONGEST
    assert small.max() == pytest.approx(224 * 224, rel=0.02)


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotations", [1, 8])
def test_nothing_outside_changes_anything(
    model: ResADInferencer, rotations: int, good: list[Path], new: list[Path]
) -> None:
    """Of good photos, and of photos that are inspected; the map is 0 outside."""
    bank = model.enroll("tiles", good[:3], rotations=rotations, region=CORNERS)
    region = bank.region
    assert region is not None
    wider = np.maximum.reduce([np.roll(region, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)])
    others = model.enroll("noisy", [noisy(path, region) for path in good[:3]], rotations=rotations, region=CORNERS)
    assert sorted(bank.leave_one_out or ()) == sorted(others.leave_one_out or ())
    whole = model.enroll("whole", good[:3], rotations=rotations)
    assert len(bank.arrays["rows_0"]) < len(whole.arrays["rows_0"]), "no patches outside of it"
    for path in new[:3]:
        found, disturbed = model.predict(path, "tiles"), model.predict(noisy(path, region), "tiles")
        assert found.raw_score == disturbed.raw_score == model.predict(path, "noisy").raw_score
        assert np.array_equal(found.map, disturbed.map)
        assert not found.map[stretched(wider, found.map.shape) == 0].any()
        assert found.raw_score != model.predict(path, "whole").raw_score
    model.set_threshold("tiles", -1e6)
    (loud,) = model.predict(new[0], "tiles").regions or ()
    assert loud.x >= 7
    assert loud.y >= 7
    assert loud.x + loud.width <= 57
    assert loud.area <= 1.1 * stretched(region, (64, 64)).sum()


def test_a_photo_scores_as_if_it_were_new(model: ResADInferencer, good: list[Path]) -> None:
    bank = model.enroll("all", good[:3], rotations=1, region=CORNERS)
    for reference, score in zip(bank.references, bank.leave_one_out or (), strict=True):
        photo = next(path for path in good if path.name == reference.name)
        model.enroll("others", [each for each in good[:3] if each != photo], rotations=1, region=CORNERS)
        assert model.predict(photo, "others").raw_score == pytest.approx(score, abs=1e-5)
        model.remove("others")


def test_it_stays_with_the_product(model: ResADInferencer, good: list[Path]) -> None:
    """When photos are added, removed or replaced; until another one, or none, is given."""
    at_once = model.enroll("at once", good[:3], rotations=1, region=CORNERS)
    model.enroll("tiles", good[:2], rotations=1, region=CORNERS)
    model.add("tiles", good[2:4])
    model.remove("tiles", good[3].name)
    assert replace(model.bank("tiles"), product="at once").checksum == at_once.checksum
    model.enroll("tiles", good[:3], rotations=1, replace_existing=True)
    assert replace(model.bank("tiles"), product="at once").checksum == at_once.checksum
    reopened = ResADInferencer(model.bundle, banks=model.banks, threads=1)
    assert reopened.predict(good[4], "tiles").raw_score == model.predict(good[4], "at once").raw_score
    assert at_once.region is not None
    drawn = model.enroll("drawn", good[:3], rotations=1, region=at_once.region > 0)
    assert replace(drawn, product="at once").checksum == at_once.checksum
    plain = model.enroll("plain", good[:3], rotations=1)
    gone = model.enroll("tiles", good[:3], rotations=1, replace_existing=True, region="none")
    assert replace(gone, product="plain").checksum == plain.checksum, "the format that it always was"
    wide = model.bundle / "wide.png"
    Image.new("RGB", (90, 60)).save(wide)
    with pytest.raises(PhotoError, match=r"wide\.png: The region was drawn for photos whose sides are as 64 to 64"):
        model.predict(wide, "at once")
    with pytest.raises(PhotoError, match=r"wide\.png: The region was drawn"):
        model.add("at once", [wide])
    assert model.bank("at once").checksum == at_once.checksum


def test_banks_with_a_region_are_checked(model: ResADInferencer, good: list[Path]) -> None:
    """Versions that know no regions refuse them by their format; what is no mask is refused, too."""
    model.enroll("tiles", good[:2], rotations=1, region=CORNERS)
    file = model.banks / "tiles.safetensors"
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata, arrays = json.loads(header["__metadata__"][ENTRY]), load(content)
    assert metadata["format"] == "resad-bank-3"
    del metadata["checksum"]

    def written(arrays: dict[str, np.ndarray], **changed: str) -> None:
        told = metadata | changed
        told |= {"checksum": checksum_of(told, arrays)}
        file.write_bytes(save(arrays, {ENTRY: json.dumps(told, sort_keys=True)}))

    for wrong, told in (
        (arrays["region"] * 2, "no mask of 0 and 1"),
        (arrays["region"] * 0, "no mask of 0 and 1"),
        (arrays["region"].astype(np.float32), "no mask of 0 and 1"),
        (np.ones_like(arrays["region"]), "instead of float32"),
    ):
        written(arrays | {"region": wrong})
        with pytest.raises(BankError, match=told):
            model.predict(good[0], "tiles")
    written(arrays, format="resad-bank-2")
    with pytest.raises(BankError, match="resad-bank-2 instead of resad-bank-3"):
        model.predict(good[0], "tiles")
    written({name: rows for name, rows in arrays.items() if name != "region"})
    with pytest.raises(BankError, match="resad-bank-3 instead of resad-bank-2"):
        model.predict(good[0], "tiles")


@pytest.mark.parametrize("pixels", ["uint8", "float32"])
def test_a_baked_file_has_the_region(
    model: ResADInferencer, good: list[Path], new: list[Path], tmp_path: Path, pixels: str
) -> None:
    model.enroll("tiles", good[:4], rotations=1, region=CORNERS)
    path = bake(model.bundle, "tiles", tmp_path / "tiles", model.banks, pixels)  # type: ignore[arg-type]
    compiled = ov.Core().compile_model(path, "CPU")
    large = np.asarray(Image.fromarray(read_pixels(new[1])).resize((201, 199)))
    for photo in (read_pixels(new[0]), large):
        expected = model.predict(photo, "tiles")
        values = photo[None] if pixels == "uint8" else photo[None].transpose(0, 3, 1, 2) / np.float32(255)
        found = compiled({"input": np.ascontiguousarray(values)})
        assert found["pred_score"].item() == pytest.approx(expected.score, abs=1e-4)
        np.testing.assert_allclose(found["anomaly_map"][0, 0], expected.map, atol=1e-4)
    assert not {name for name, kind in precisions(path).items() if kind in ("bf16", "f16")}, "all in float32"


# -- what has moved ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pills(share: Callable[..., Path]) -> Path:
    """Photos of a thing that always lies in the same place."""
    return share("pill", lambda folder: make_product(folder, "pill", train=4, good=4, defective=2, size=96)) / "pill"


@pytest.fixture
def watching(bundle_default: Path, pills: Path, tmp_path: Path) -> ResADInferencer:
    inferencer = ResADInferencer(knowing(bundle_default, tmp_path / "bundle"), threads=1)
    inferencer.enroll("pill", pills / "train" / "good", rotations=1, region="20,20 76,20 76,76 20,76")
    assert inferencer.has_position("pill")
    return inferencer


def moved(path: Path) -> np.ndarray:
    return np.roll(read_pixels(path), (22, 22), (0, 1))


def test_what_has_moved_is_not_judged(watching: ResADInferencer, pills: Path) -> None:
    photos = sorted((pills / "test").glob("*/*.png"))
    assert all(watching.predict(path, "pill").status in ("good", "anomalous") for path in photos)
    for path in photos:
        for photo in (moved(path), np.full((96, 96, 3), 90, np.uint8)):
            found = watching.predict(photo, "pill")
            assert (found.status, found.label, found.regions) == ("moved", None, None)
    assert [each.moved for each in watching.predict_batch([photos[0], moved(photos[0])], "pill")] == [False, True]


def test_where_nothing_lies_alike_nothing_is_told(watching: ResADInferencer, good: list[Path], pills: Path) -> None:
    """Of textures, of one photo, of rotated products, and without a region."""
    middle = "16,16 48,16 48,48 16,48"
    watching.enroll("texture", good[:4], rotations=1, region=middle)
    assert not watching.has_position("texture")
    assert not watching.predict(np.roll(read_pixels(good[5]), 9, 0), "texture").moved
    whole = sorted((pills / "train" / "good").iterdir())
    for photos, rotations, region in ((whole[:1], 1, CORNERS), (whole, 8, CORNERS), (whole, 1, "none")):
        watching.enroll("other", photos, rotations=rotations, region=region, replace_existing=True)
        assert not watching.has_position("other")


def test_commands_tell_what_has_moved(
    watching: ResADInferencer, pills: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Predict, enroll and check, as they are called."""
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)

    def run(verb: str, *arguments: object) -> str:
        command = ["resad", verb, "--bundle", watching.bundle, "--product", "new", *arguments]
        monkeypatch.setattr(sys, "argv", [str(each) for each in command])
        cli.main()
        return " ".join(capsys.readouterr().out.split())

    photos = tmp_path / "photos"
    photos.mkdir()
    first = next((pills / "test" / "good").iterdir())
    Image.fromarray(moved(first)).save(photos / "moved.png")
    Image.fromarray(read_pixels(first)).save(photos / "there.png")
    Image.fromarray(np.pad(np.full((56, 56), 255, np.uint8), 20)).save(tmp_path / "mask.png")
    said = run("enroll", "--photos", pills / "train" / "good", "--rotations", 1, "--region", tmp_path / "mask.png")
    assert "34% of each photo counts. Photos whose content has moved are told" in said
    run("predict", "--photos", photos, "--output", tmp_path / "found")
    rows = [json.loads(line) for line in (tmp_path / "found" / "results.jsonl").read_text().splitlines()]
    assert [(row["label"] == "moved", row["regions"] is None) for row in rows] == [(True, True), (False, False)]
    assert '"moved"' in (tmp_path / "found" / "results.csv").read_text()
    assert "1 photos were not judged, since their content has moved: moved.png" in run("check", "--photos", photos)
    said = run("enroll", "--photos", pills / "train" / "good", "--mode", "replace", "--region", "none")
    assert "counts" not in said
