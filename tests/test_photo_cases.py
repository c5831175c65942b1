# SPDX-License-Identifier: Apache-2.0

"""Awkward photos that are enrolled and inspected: on the edge, in `anomalib predict`, with stock datamodules."""

import csv
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch
from anomalib.data.utils import read_image
from lightning.pytorch import seed_everything
from PIL import Image
from torchvision.transforms.v2.functional import resize

from anomalib_resad import ResAD, cli
from anomalib_resad.data.photo_check import PhotoCheck
from anomalib_resad.data.pictures import PhotoVisualizer
from anomalib_resad.data.product_folder import as_image
from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.enrollment.photos import PhotoError, read_pixels
from anomalib_resad.method.bank_record import BankRecord
from tests.conftest import DEFAULT, DISTANCE, product, quiet_engine
from tests.photo_cases import photo, source


@pytest.fixture
def good_photos(tmp_path: Path) -> Path:
    (tmp_path / "good").mkdir()
    for seed in (50, 51):
        Image.fromarray(photo(seed)).save(tmp_path / f"good/{seed}.png")
    return tmp_path / "good"


def inspected(bundle: Path, photos: Path, folder: Path) -> dict[str, dict[str, str]]:
    """`resad predict`: the rows of the table, by name."""
    with suppress(SystemExit):
        cli.predict(bundle, "part", photos, folder / "found", folder / "banks")
    with (folder / "found/results.csv").open(encoding="utf-8-sig") as file:
        return {row["photo"]: row for row in csv.DictReader(file)}


def test_the_edge(cases: Path, bundle_default: Path, good_photos: Path, tmp_path: Path) -> None:
    banks = tmp_path / "banks"
    cli.enroll(bundle_default, "part", good_photos, banks, rotations=1)
    rows = inspected(bundle_default, cases / "bit_depth", tmp_path)
    assert all("more than 8 bits" in row["error"] and "where 8 are expected" in row["error"] for row in rows.values())
    assert "2 pages" in inspected(bundle_default, cases / "pages", tmp_path)["two_pages.tif"]["error"]
    rows = inspected(bundle_default, cases / "orientation", tmp_path)
    scores = {name: float(row["raw_score"]) for name, row in rows.items()}
    assert scores["turned.png"] == scores["turned.tif"]
    pixels = {path.name: read_pixels(path).astype(float) for path in (cases / "orientation").iterdir()}
    assert np.abs(pixels["turned.jpg"] - pixels["turned.png"]).mean() < 10
    rows = inspected(bundle_default, cases / "hidden", tmp_path)
    assert list(rows) == ["a.png"]
    assert not rows["a.png"]["error"]
    rows = inspected(bundle_default, cases / "damaged", tmp_path)
    assert rows["whole.png"]["score"]
    assert "unreadable" in rows["half.png"]["error"]


def test_enrolling_on_the_edge(cases: Path, bundle_default: Path, tmp_path: Path) -> None:
    inferencer = ResADInferencer(bundle_default, banks=tmp_path / "banks")
    with pytest.raises(PhotoError, match="does not say how many it uses; give the camera's depth"):
        inferencer.enroll("part", cases / "bit_depth", rotations=1)
    assert inferencer.enroll("part", cases / "bit_depth", rotations=1, bit_depth=12).bit_depth == 12
    for path in (cases / "bit_depth").iterdir():
        assert np.isfinite(inferencer.predict(path, "part").raw_score)
        assert 50 < read_pixels(path, 12).mean() < 200
    reopened = ResADInferencer(bundle_default, banks=tmp_path / "banks")
    with pytest.raises(PhotoError, match=r"whole\.png: 8 bits a channel, where 12 are expected"):
        reopened.predict(cases / "damaged/whole.png", "part")
    with pytest.raises(PhotoError, match="8 bits a channel, where 12 are expected"):
        reopened.add("part", [cases / "damaged/whole.png"])
    with pytest.raises(PhotoError, match=r"half\.png: unreadable"):
        inferencer.enroll("damaged", cases / "damaged")
    with pytest.raises(PhotoError, match="2 pages or frames"):
        inferencer.enroll("pages", cases / "pages")
    assert [each.name for each in inferencer.enroll("hidden", cases / "hidden", rotations=1).references] == ["a.png"]


def test_sizes_take_little_memory(cases: Path, bundle_default: Path, tmp_path: Path) -> None:
    """Enrolled in eight orientations, and inspected: under 1 GB beyond what a small photo takes."""
    code = f"""
import resource
from pathlib import Path
from PIL import Image
from anomalib_resad.data.photo_check import PhotoCheck
from anomalib_resad.data.pictures import PhotoVisualizer
from anomalib_resad.data.product_folder import as_image
from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.deploy.pictures import overlay
inferencer = ResADInferencer({str(bundle_default)!r}, banks={str(tmp_path)!r}, threads=1)
def all_of(path):
    inferencer.enroll("part", [path], rotations=8, replace_existing=True)
    found, pixels = inferencer.inspect(path, "part")
    overlay(pixels, found.map)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # GB
Image.new("RGB", (64, 64)).save({str(tmp_path / "small.png")!r})
small = all_of({str(tmp_path / "small.png")!r})
for name in ("line_scan.png", "large.png"):
    assert all_of(Path({str(cases / "sizes")!r}) / name) - small < 1, name
try:
    all_of(Path({str(cases / "sizes")!r}) / "thread.png")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert "thread.png: 8 x 60000 pixels, more than 50 times as long as wide" in done.stdout, done.stderr


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read where Linux shows it")
def test_openvino_keeps_few_shapes(bundle_default: Path, tmp_path: Path) -> None:
    """By default 5,000 of them, up to 1 MB each; the curve over that many sizes is in benchmarks/results."""
    code = f"""
from pathlib import Path
import numpy as np
from anomalib_resad.data.photo_check import PhotoCheck
from anomalib_resad.data.pictures import PhotoVisualizer
from anomalib_resad.data.product_folder import as_image
from anomalib_resad.deploy import ResADInferencer
inferencer = ResADInferencer({str(bundle_default)!r}, banks={str(tmp_path)!r}, threads=1)
def megabytes_after(heights):
    for height in heights:
        inferencer.encode(np.zeros((1, height, 300 - height % 7, 3), np.uint8))
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
print(-megabytes_after(range(100, 200)) + megabytes_after(range(200, 400)))
"""
    environment = os.environ | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}  # which is bounded too, by 1,024
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert float(done.stdout) < 30, done.stderr


def predicted(folder: Path, data: Path, references: Path, **arguments: Any) -> dict[str, float]:
    """`anomalib predict`: normalized scores by name."""
    seed_everything(0)  # of the untrained backbone
    model = ResAD(**DISTANCE, references=references, visualizer=False, **{"rotations": 1} | arguments)
    found = quiet_engine(folder).predict(model, data_path=data, return_predictions=True)
    assert found is not None
    return {Path(batch.image_path[0]).name: batch.pred_score.item() for batch in found}  # type: ignore[union-attr, index]


def test_anomalib_predict(cases: Path, good_photos: Path, tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match=r"more than 8 bits a channel .*, where 8 are expected"):
        predicted(tmp_path, cases / "bit_depth", good_photos)
    with pytest.raises(PhotoError, match="does not say how many it uses"):
        predicted(tmp_path, cases / "bit_depth", cases / "bit_depth")
    scores = predicted(tmp_path, cases / "bit_depth", cases / "bit_depth", bit_depth=12)
    assert all(score < 0.5 for score in scores.values()), "no distance to itself, below the threshold of the references"
    with pytest.raises(PhotoError, match="8 bits a channel, where 12 are expected"):
        predicted(tmp_path, good_photos, cases / "bit_depth", bit_depth=12)
    scores = predicted(tmp_path, cases / "orientation", good_photos)
    assert scores["turned.png"] == scores["turned.tif"] != 0.5
    assert list(predicted(tmp_path, cases / "hidden", good_photos)) == ["a.png"]
    with pytest.raises(PhotoError, match="2 pages or frames"):
        predicted(tmp_path, cases / "pages", good_photos)
    with pytest.raises(PhotoError, match=r"thread\.png: 8 x 60000 pixels, more than 50 times"):
        predicted(tmp_path, cases / "sizes", good_photos)
    with pytest.raises(PhotoError, match=r"half\.png: unreadable"):
        predicted(tmp_path, cases / "damaged", good_photos)


def test_pictures_show_photos_as_they_were_read(cases: Path, tmp_path: Path) -> None:
    """Not white, and not turned."""
    for name in ("bit_depth", "orientation"):
        model = ResAD(**DISTANCE, references=cases / name, rotations=1, bit_depth=12 if name == "bit_depth" else "auto")
        assert isinstance(model.visualizer, PhotoVisualizer)
        model.visualizer.fields, model.visualizer.overlay_fields = ["image"], None
        model.visualizer.field_size = (96, 96) if name == "bit_depth" else (96, 64)
        model.visualizer.text_config = {"enable": False}
        data = {"bit_depth": "gray12.png", "orientation": "turned.tif"}[name]
        found = quiet_engine(tmp_path).predict(model, data_path=cases / name / data, return_predictions=True)
        assert found is not None
        assert found[0].image_path == [str(cases / name / data)]  # type: ignore[union-attr]
        (drawn,) = (tmp_path / "ResAD").rglob(data)
        assert np.array_equal(np.asarray(Image.open(drawn)), read_pixels(cases / name / data, 12))


def test_deep_photos_score_as_their_copies_of_8_bits(cases: Path, good_photos: Path, tmp_path: Path) -> None:
    for name in ("deep/good", "deep/new", "plain/good", "plain/new"):
        (tmp_path / name).mkdir(parents=True)
    for part, sources in (("good", good_photos.iterdir()), ("new", (cases / "damaged").glob("whole.png"))):
        for path in sources:
            values = np.round(np.asarray(Image.open(path).convert("L")) * (4095 / 255)).astype(np.uint16)
            Image.fromarray(values).save(tmp_path / "deep" / part / path.name)
            Image.fromarray(read_pixels(values, 12)).save(tmp_path / "plain" / part / path.name)
    deep = predicted(tmp_path, tmp_path / "deep/new", tmp_path / "deep/good", bit_depth=12)
    assert deep == predicted(tmp_path, tmp_path / "plain/new", tmp_path / "plain/good") != {"whole.png": 0.5}


def test_stock_datamodules(cases: Path, good_photos: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/gray12.png").write_bytes((cases / "bit_depth/gray12.png").read_bytes())

    def test(**arguments: Any) -> Any:
        data = Folder("part", normal_dir=good_photos, abnormal_dir=tmp_path / "bad", num_workers=0)
        model = ResAD(**DISTANCE, visualizer=False, rotations=1, references=good_photos, **arguments)
        return quiet_engine(tmp_path).test(model, data)

    with pytest.raises(PhotoError, match=r"gray12\.png: more than 8 bits a channel .*, where 8 are expected"):
        test()
    deep_of = Image.fromarray(np.round(photo(50)[..., 0] * (4095 / 255)).astype(np.uint16))
    for path in (*good_photos.iterdir(), tmp_path / "bad/gray12.png"):
        deep_of.save(path)
    assert test(bit_depth=12)


def test_batches_that_anomalib_read_are_mended(cases: Path, good_photos: Path) -> None:
    """16-bit gray is white there, and a TIFF is turned."""
    model = ResAD(**DISTANCE, visualizer=False)
    model.model.bank.record = BankRecord(bit_depth=12)
    paths = [str(cases / "bit_depth" / name) for name in ("gray12.png", "rgb12.ppm")]
    batch = ImageBatch(torch.stack([read_image(path, as_tensor=True) for path in paths]), image_path=paths)
    PhotoCheck().on_test_batch_start(None, model, batch, 0)
    assert torch.equal(batch.image, torch.stack([as_image(read_pixels(path, 12)) for path in paths]))
    model.model.bank.record = BankRecord()
    paths = [str(cases / "orientation/turned.tif"), str(good_photos / "50.png")]
    resized = [resize(read_image(path, as_tensor=True), [64, 64], antialias=True) for path in paths]
    batch = ImageBatch(torch.stack(resized), image_path=paths)
    PhotoCheck().on_test_batch_start(None, model, batch, 0)
    stored = resize(as_image(read_pixels(paths[0])), [64, 64], antialias=True)
    assert torch.allclose(batch.image, torch.stack([stored, resized[1]]), atol=1e-6)
    batch = ImageBatch(torch.stack(resized), image_path=[paths[1], "no file"])
    PhotoCheck().on_test_batch_start(None, model, batch, 0)
    assert torch.equal(batch.image, torch.stack(resized)), "what anomalib reads alike stays"


def test_synthetic_validation_of_deep_photos_is_refused(cases: Path, tmp_path: Path) -> None:
    """anomalib would paint on white."""
    source(tmp_path / "p", lambda path: path.write_bytes((cases / "bit_depth/gray12.png").read_bytes()))
    data = product(tmp_path / "p", "two", val_split_mode="synthetic")
    with pytest.raises(PhotoError, match="synthetic defects on what it reads"):
        quiet_engine(tmp_path, max_epochs=1).fit(ResAD(**DEFAULT, visualizer=False, bit_depth=12), datamodule=data)


def test_the_bit_depth_stays_with_the_bank() -> None:
    record = BankRecord(bit_depth=12)
    assert BankRecord.from_plain(asdict(record)) == record
    old = {name: value for name, value in asdict(record).items() if name != "bit_depth"}
    assert BankRecord.from_plain(old).bit_depth == 8
