# SPDX-License-Identifier: Apache-2.0

"""Tiny trees in the layouts of real data sets, as downloaded or as anomalib's ``prepare_data`` leaves them."""

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tifffile

from benchmarks.products import make_product


@dataclass
class Photos:
    """Images of one drawn product, each defective one with its mask, and their folder in MVTec AD's layout."""

    folder: Path
    train: list[np.ndarray]
    good: list[np.ndarray]
    defective: list[tuple[np.ndarray, np.ndarray]]


def draw_photos(root: Path, product: str = "pill", defects: Sequence[str] = ("crack", "spot"), **counts) -> Photos:
    """Draw a product, with one image of each of these defects."""
    folder = make_product(root, product, **{"train": 6, "good": 2, "defective": 1, "size": 64} | counts)
    for part in (folder / "test", folder / "ground_truth"):
        for other in {path.name for path in part.iterdir()} - {*defects, "good"}:
            shutil.rmtree(part / other)
    train, good = (
        [cv2.imread(str(path)) for path in sorted((folder / split / "good").iterdir())] for split in ("train", "test")
    )
    defective = [
        (cv2.imread(str(folder / "test" / defect / "000.png")),
         cv2.imread(str(folder / "ground_truth" / defect / "000_mask.png"), cv2.IMREAD_GRAYSCALE))
        for defect in defects
    ]  # fmt: skip
    return Photos(folder, train, good, defective)


def _write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def _tests(photos: Photos) -> list[tuple[bool, np.ndarray, np.ndarray]]:
    """All test images: whether it is defective, the image, its mask."""
    empty = np.zeros_like(photos.defective[0][1])
    return [(False, image, empty) for image in photos.good] + [(True, *pair) for pair in photos.defective]


def mvtecad(root: Path, categories: Sequence[str], photos: Photos) -> None:
    """``<category>/{train/good,test/good,test/<defect>}/000.png``, ``ground_truth/<defect>/000_mask.png``."""
    for category in categories:
        shutil.copytree(photos.folder, root / category)


def visa(root: Path, categories: Sequence[str], photos: Photos) -> None:
    """As downloaded: ``<category>/Data/{Images,Masks}``, defect classes as mask values, the split as a table."""
    rows = [["object", "split", "label", "image", "mask"]]
    for category in categories:
        for index, image in enumerate([*photos.train, *photos.good]):
            name = f"{category}/Data/Images/Normal/{index:04d}.JPG"
            _write(root / name, image)
            rows.append([category, "train" if index < len(photos.train) else "test", "normal", name, ""])
        for index, (image, mask) in enumerate(photos.defective):
            name = f"{category}/Data/Images/Anomaly/{index:03d}.JPG"
            mask_name = f"{category}/Data/Masks/Anomaly/{index:03d}.png"
            _write(root / name, image)
            _write(root / mask_name, mask // 255 * (index + 1))
            rows.append([category, "test", "anomaly", name, mask_name])
    (root / "split_csv").mkdir()
    with (root / "split_csv" / "1cls.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def btech(root: Path, categories: Sequence[str], photos: Photos) -> None:
    """``<category>/{train/ok,test/ok,test/ko,ground_truth/ko}/0000.png``."""
    for category in categories:
        for index, image in enumerate(photos.train):
            _write(root / category / "train" / "ok" / f"{index:04d}.png", image)
        for index, (is_defective, image, mask) in enumerate(_tests(photos)):
            _write(root / category / "test" / ("ko" if is_defective else "ok") / f"{index:04d}.png", image)
            if is_defective:
                _write(root / category / "ground_truth" / "ko" / f"{index:04d}.png", mask)


def mvtec3d(root: Path, categories: Sequence[str], photos: Photos) -> None:
    """``<category>/<split>/<label>/{rgb/000.png,xyz/000.tiff,gt/000.png}``; training images have no ``gt``."""
    points = np.linspace(0, 1, 64 * 64 * 3, dtype=np.float32).reshape(64, 64, 3)
    empty = np.zeros_like(photos.defective[0][1])
    for category in categories:
        items = [("train/good", image, empty) for image in photos.train]
        items += [("validation/good", image, empty) for image in photos.good]
        items += [(f"test/{'hole' if is_defective else 'good'}", *pair) for is_defective, *pair in _tests(photos)]
        for index, (label, image, mask) in enumerate(items):
            folder = root / category / label
            _write(folder / "rgb" / f"{index:03d}.png", image)
            (folder / "xyz").mkdir(exist_ok=True)
            tifffile.imwrite(folder / "xyz" / f"{index:03d}.tiff", points)
            if not label.startswith("train"):
                _write(folder / "gt" / f"{index:03d}.png", mask)
        (root / category / "calibration").mkdir()
        (root / category / "calibration" / "camera_parameters.json").write_text(json.dumps({"focal_length": 0.03}))


def bmad(root: Path, categories: Sequence[str], photos: Photos) -> None:
    """Gray ``train/good/*.png`` and ``{valid,test}/{good,Ungood}/{img,label}/*.png``."""
    for category in categories:
        for index, image in enumerate(photos.train):
            _write(root / category / "train" / "good" / f"{index:05d}_60.png", image[..., 0])
        for slice_, split in ((70, "valid"), (80, "test")):
            for index, (is_defective, image, mask) in enumerate(_tests(photos)):
                folder = root / category / split / ("Ungood" if is_defective else "good")
                _write(folder / "img" / f"{index:05d}_{slice_}.png", image[..., 0])
                _write(folder / "label" / f"{index:05d}_{slice_}.png", mask)


def shanghaitech(root: Path, categories: Sequence[str], photos: Photos) -> None:
    """``training/videos/01_001.avi``, ``testing/frames/01_0014/000.jpg``, one array of masks for each test video."""
    for scene in categories:
        video = root / "training" / "videos" / f"{scene}_001.avi"
        video.parent.mkdir(parents=True, exist_ok=True)
        writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"XVID"), 24, photos.train[0].shape[1::-1])
        for image in photos.train:
            writer.write(image)
        writer.release()
        frames = _tests(photos)
        for index, (_, image, _) in enumerate(frames):
            _write(root / "testing" / "frames" / f"{scene}_0014" / f"{index:03d}.jpg", image)
        masks = np.stack([mask // 255 for _, _, mask in frames])
        for kind, array in (("pixel", masks), ("frame", masks.any(axis=(1, 2)).astype(np.uint8))):
            folder = root / "testing" / f"test_{kind}_mask"
            folder.mkdir(exist_ok=True)
            np.save(folder / f"{scene}_0014.npy", array)
