# SPDX-License-Identifier: Apache-2.0

"""Drawn source products: seeded, varied, and with masks of what really changed."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from anomalib_resad import CrossCategory, ProductFolder
from anomalib_resad.data.cross_category import category_name, split_categories
from benchmarks.sources.__main__ import main
from benchmarks.sources.damage import DEFECTS, VISIBLE, damaged
from benchmarks.sources.drawn import FAMILIES, make_product
from benchmarks.sources.pictures import SMALLEST_SIDE, list_surfaces, surface_of

SIZE = 96


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_is_a_product(family: str, tmp_path: Path) -> None:
    numbers = {"train": 2, "good": 1, "defective": 3, "size": SIZE}
    first = contents(make_product(tmp_path / "a", family, FAMILIES[family], 3, **numbers))
    assert first == contents(make_product(tmp_path / "b", family, FAMILIES[family], 3, **numbers))
    other = contents(make_product(tmp_path / "a", family, FAMILIES[family], 4, **numbers))
    assert first["train/good/000.png"] != other["train/good/000.png"]
    assert first["train/good/000.png"] != first["train/good/001.png"], "photos of one product differ"
    masks = [name for name in first if name.startswith("ground_truth")]
    assert len(masks) == 3
    for name in masks:
        photo = name.replace("ground_truth", "test").replace("_mask", "")
        mask = cv2.imdecode(np.frombuffer(first[name], np.uint8), cv2.IMREAD_GRAYSCALE)
        assert photo in first
        assert set(np.unique(mask)) == {0, 255}


@pytest.mark.parametrize("kind", DEFECTS)
def test_the_mask_is_what_changed(kind: str) -> None:
    rng = np.random.default_rng(5)
    image = np.clip(0.5 + 0.1 * rng.standard_normal((SIZE, SIZE, 3)), 0, 1).astype(np.float32)
    region = np.zeros((SIZE, SIZE), np.float32)
    region[20:80, 20:80] = 1
    painted, mask = damaged(np.random.default_rng(7), image, region, kind)
    changed = np.abs(painted - image).max(axis=2)
    assert mask.any()
    assert changed[mask == 0].max() <= VISIBLE
    assert changed[region == 0].max() == 0, "nothing is painted beside the product"
    assert painted.min() >= 0
    assert painted.max() <= 1


def test_a_defect_that_cannot_be_seen_is_an_error() -> None:
    black = np.zeros((SIZE, SIZE, 3), np.float32)
    with pytest.raises(RuntimeError, match="No visible crack could be painted in 40 tries on a region of 9216 pixels"):
        damaged(np.random.default_rng(0), black, np.ones((SIZE, SIZE), np.float32), "crack")


def test_the_command_draws_sources_to_train_on(tmp_path: Path) -> None:
    main(tmp_path, products=2, first_seed=40, train=3, good=1, defective=3, size=SIZE)
    names = sorted(folder.name for folder in tmp_path.iterdir())
    assert [name.rpartition("_")[2] for name in names] == ["0040", "0041"]
    source = ProductFolder(root=tmp_path, category=", ".join(names), num_workers=0)
    data = CrossCategory(source=source, num_workers=0, val_ratio=0.0)
    data.setup()
    assert sum(data.train_data.samples.label_index == 1) == 6


def test_a_star_names_all_products_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"category='\*' finds no product in .*: no folder in it holds train/good"):
        split_categories(ProductFolder(root=tmp_path, category="*"))
    main(tmp_path, products=2, first_seed=7, train=2, good=1, defective=3, size=SIZE)
    (tmp_path / "notes").mkdir()
    singles = split_categories(ProductFolder(root=tmp_path, category="*"))
    assert [category_name(single).rpartition("/")[2] for single in singles] == ["relief_0008", "round_thing_0007"]


def cloth(path: Path, height: int, width: int) -> Path:
    """A picture in which each column of pixels has its own red, and each row its own green."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([columns * 255 // (width - 1), rows * 255 // (height - 1), 0 * rows], axis=-1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def test_each_photo_shows_another_part_of_a_picture(tmp_path: Path) -> None:
    product = surface_of(cloth(tmp_path / "cloth.png", 400, 600))(np.random.default_rng(0))
    shown = [product(np.random.default_rng(seed), SIZE)[0] for seed in range(8)]
    reds = [255 * float(image[..., 2].max() - image[..., 2].min()) for image in shown]
    greens = [255 * float(image[..., 1].max() - image[..., 1].min()) for image in shown]
    assert max(reds) - min(reds) < 4, "all photos of a product are of one size"
    assert 0.45 * 400 / 600 < reds[0] / 255 < 0.75 * 400 / 600
    assert greens[0] == pytest.approx(1.5 * reds[0], rel=0.05), "a part is square"
    assert len({float(image[0, 0, 2]) for image in shown}) == 8
    assert all(image[..., 0].max() == 0 for image in shown), "colors are in OpenCV's order"


def test_a_folder_of_pictures_becomes_products(tmp_path: Path) -> None:
    cloth(tmp_path / "pictures" / "fabric" / "cloth.png", SMALLEST_SIDE, 300)
    cloth(tmp_path / "pictures" / "small.png", SMALLEST_SIDE - 1, 300)
    Image.new("RGB", (300, 300), (90, 90, 90)).save(tmp_path / "pictures" / "plain.png")
    assert [path.name for path in list_surfaces(tmp_path / "pictures")] == ["cloth.png"]
    main(tmp_path / "a", 1, first_seed=5, train=2, good=1, defective=3, size=SIZE, pictures=tmp_path / "pictures")
    assert sorted(folder.name for folder in (tmp_path / "a").iterdir()) == ["picture_0006", "traces_0005"]
    first = contents(tmp_path / "a" / "picture_0006")
    assert len([name for name in first if name.startswith("ground_truth")]) == 3
    main(tmp_path / "b", 0, first_seed=6, train=2, good=1, defective=3, size=SIZE, pictures=tmp_path / "pictures")
    assert contents(tmp_path / "b" / "picture_0006") == first, "a seed and a picture are a product"


def test_pictures_that_are_no_surfaces_are_an_error(tmp_path: Path) -> None:
    Image.new("RGB", (300, 300), (90, 90, 90)).save(tmp_path / "plain.png")
    with pytest.raises(
        ValueError, match=r"None of the 1 pictures in .* can be a surface: each side must be 256 pixels"
    ):
        list_surfaces(tmp_path)
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"1 of the source pictures cannot be used. .*cut\.png"):
        list_surfaces(tmp_path)
