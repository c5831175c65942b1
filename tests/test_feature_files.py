# SPDX-License-Identifier: Apache-2.0

"""Features of training photos in a folder that trainings share: the same training, and what is not taken from it."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from anomalib_resad import ResAD
from anomalib_resad.pre_processor import resize_and_normalize
from anomalib_resad.training import picture_files, source_pictures
from tests.conftest import DEFAULT
from tests.test_fused_training import fit


class Trained:
    """A training, and what it read and encoded."""

    def __init__(self, products: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        painted: list[str] = []
        paint = source_pictures.paint_photo
        monkeypatch.setattr(
            source_pictures,
            "paint_photo",
            lambda image, path, seed: (painted.append(path), paint(image, path, seed))[1],
        )
        self.model, self.watch, self.encoded = fit(products, folder, epochs=1, **settings)
        monkeypatch.undo()
        self.painted = len(painted)

    @property
    def weights(self) -> list[Tensor]:
        join = self.model.model.encoder.join
        assert join is not None
        return [join.directions, *self.model.model.estimator.state_dict().values()]


def same(one: Trained, other: Trained) -> bool:
    """To the last bit."""
    return one.watch.losses == other.watch.losses and all(map(torch.equal, one.weights, other.weights))


def pictures_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.pt"))


def test_a_training_is_the_same_with_and_without_files(
    products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where there is no memory for features, and where files are damaged, cut off, empty or another's."""
    folder = tmp_path / "cache"
    without = Trained(products, tmp_path / "without", monkeypatch)
    cold = Trained(products, tmp_path / "cold", monkeypatch, cache_dir=folder)
    files = pictures_in(folder)
    assert len(files) == cold.watch.kept == 2 * cold.painted + 4 == 2 * (8 + 8 + 2)
    assert same(without, cold)

    warm = Trained(products, tmp_path / "warm", monkeypatch, cache_dir=str(folder), cache_gb=0.0)
    assert warm.painted == 0
    assert warm.watch.kept == 0, "all of it is read from the files"
    assert warm.encoded < 30 < cold.encoded, "the target's two photos, in eight orientations"
    assert same(without, warm)

    content = [path.read_bytes() for path in files]
    files[0].write_bytes(content[0][:-9])
    files[1].write_bytes(b"")
    files[2].write_bytes(content[3])
    half = len(content[4]) // 2
    files[4].write_bytes(content[4][:half] + bytes([content[4][half] ^ 1]) + content[4][half + 1 :])
    with caplog.at_level(logging.WARNING):
        mended = Trained(products, tmp_path / "mended", monkeypatch, cache_dir=folder)
    assert same(without, mended)
    assert len([record for record in caplog.records if "is damaged, or not what its name says" in record.message]) == 4
    assert pictures_in(folder) == files
    assert [path.read_bytes() for path in files] == content, "made anew"


def test_what_changed_is_encoded_anew(products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A photo, its mask, the seed of the defects, the weights; not where the photos lie."""
    folder, moved = tmp_path / "cache", tmp_path / "elsewhere" / "products"
    shutil.copytree(products, moved)
    Trained(products, tmp_path / "0", monkeypatch, cache_dir=folder)
    known = set(pictures_in(folder))

    def added(**settings: Any) -> int:
        Trained(moved, tmp_path / "next", monkeypatch, cache_dir=folder, **settings)
        fresh = set(pictures_in(folder)) - known
        known.update(fresh)
        return len(fresh)

    assert added() == 0
    photo = min((moved / "pill" / "train" / "good").glob("*.png"))
    ImageOps.mirror(Image.open(photo)).save(photo)
    assert added() == 2, "the photo and its painted version"
    for mask in (moved / "pill" / "ground_truth").rglob("*.png"):
        ImageOps.mirror(Image.open(mask)).save(mask)
    assert added() == 2, "defective photos that are not held out"
    assert added(reference_seed=1) == 16, "painted versions"

    model = ResAD(**DEFAULT, visualizer=False)
    made = picture_files.made_by(model.model, model.pre_processor)
    assert picture_files.made_by(model.model, resize_and_normalize((96, 64))) != made
    next(model.model.encoder.backbone.parameters()).data[0] += 1e-3
    assert picture_files.made_by(model.model, model.pre_processor) != made


def test_a_full_disk_ends_no_training(
    products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without = Trained(products, tmp_path / "without", monkeypatch)
    (tmp_path / "cache").mkdir()
    write = picture_files.write_whole

    def full(path: Path, content: bytes, synced: bool = True) -> None:
        if len(list(path.parent.glob("*.pt"))) == 5:
            raise OSError(28, "No space left on device")
        write(path, content, synced)

    monkeypatch.setattr(picture_files, "write_whole", full)
    with caplog.at_level(logging.WARNING):
        trained, _, _ = fit(products, tmp_path / "full", epochs=1, cache_dir=tmp_path / "cache", cache_gb=0.0)
    told = [record.message for record in caplog.records if "No more features are written" in record.message]
    assert len(told) == 1
    assert "No space left on device" in told[0]
    for one, other in zip(
        without.model.model.estimator.parameters(), trained.model.estimator.parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_computed(products: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match=r"cache_dir='.*file' cannot be written: .*leave it out"):
        fit(products, tmp_path, epochs=1, cache_dir=tmp_path / "file")


def test_a_checkpoint_knows_no_folder(products: Path, tmp_path: Path) -> None:
    fit(products, tmp_path, epochs=1, cache_dir=tmp_path / "cache")
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    assert torch.load(checkpoint, weights_only=False)["hyper_parameters"]["cache_dir"] is None
