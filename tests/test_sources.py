# SPDX-License-Identifier: Apache-2.0

"""Drawn source products: seeded, varied, and with masks of what really changed."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from anomalib_resad import CrossCategory, ProductFolder
from anomalib_resad.data.cross_category import category_name, split_categories
from benchmarks.sources.__main__ import main
from benchmarks.sources.damage import DEFECTS, VISIBLE, damaged
from benchmarks.sources.drawn import FAMILIES, make_product

SIZE = 96


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_is_a_product(family: str, tmp_path: Path) -> None:
    numbers = {"train": 2, "good": 1, "defective": 3, "size": SIZE}
    first = contents(make_product(tmp_path / "a", family, 3, **numbers))
    assert first == contents(make_product(tmp_path / "b", family, 3, **numbers))
    other = contents(make_product(tmp_path / "a", family, 4, **numbers))
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
