# SPDX-License-Identifier: Apache-2.0

import logging
import shutil
from pathlib import Path

import pytest
from anomalib.data import Folder, MVTecAD
from PIL import Image

from anomalib_resad import CrossCategory, ProductFolder
from anomalib_resad.data.cross_category import category_samples
from tests.conftest import cross_category, product

SPOT = Image.new("RGB", (20, 20))
SPOT.paste("white", (5, 5, 9, 9))


def test_source_gives_everything_and_target_stays_apart(products: Path) -> None:
    data = cross_category(products)
    data.setup()
    used = {*data.train_data.samples.image_path, *data.val_data.samples.image_path}
    files = {str(path) for name in ("grain", "pill") for path in (products / name).glob("t*/*/*.png")}
    assert used == files, "train and test splits alike"
    assert len(data.train_data) + len(data.val_data) == len(files)
    assert set(data.train_data.samples.category) == {"products/grain", "products/pill"}
    assert all("/tiles/" in path for path in data.test_data.samples.image_path)
    assert data.reference_data is not None
    assert all("/tiles/train/good/" in path for path in data.reference_data.samples.image_path)


def test_held_out_share_is_seeded_and_of_each_category(products: Path) -> None:
    first, again = cross_category(products), cross_category(products)
    first.setup()
    again.setup()
    held_out = first.val_data.samples
    assert held_out.image_path.tolist() == again.val_data.samples.image_path.tolist()
    assert held_out.groupby("category").size().to_dict() == {"products/grain": 2, "products/pill": 2}


def test_of_few_images_one_is_held_out(products: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tenth of three is less than one; without any, no threshold could be learned."""
    data = cross_category(products)
    data.val_ratio = 0.1
    with caplog.at_level(logging.WARNING):
        data.setup()
    assert data.val_data.samples.groupby(["category", "label_index"]).size().tolist() == [1, 1, 1, 1]
    assert "no threshold can be learned" not in caplog.text
    shutil.copytree(products / "grain", tmp_path / "grain", ignore=shutil.ignore_patterns("crack", "spot"))
    data = CrossCategory(product(tmp_path, "grain"), num_workers=0)
    with caplog.at_level(logging.WARNING):
        data.setup()
    assert "No defective source image is held out, so no threshold can be learned (val_ratio=0.1;" in caplog.text
    caplog.clear()
    data = CrossCategory(product(tmp_path, "grain"), num_workers=0, val_ratio=0.0)
    data.setup()
    assert not caplog.text, "nothing was asked for"


def test_photos_in_subfolders_count_and_brackets_find_their_masks(tmp_path: Path) -> None:
    photos = ("train/good/a", "train/good/lot2/b", "test/good/c", "test/dent/[1]", "test/dent/1", "test/dent/0")
    masks_of = ("test/dent/0.b", "ground_truth/dent/[1]", "ground_truth/dent/0.b")
    for name in (f"{each}.png" for each in (*photos, *masks_of)):
        path = tmp_path / "part" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        SPOT.save(path)
    data = product(tmp_path, "part")
    data.setup()
    assert len(data.train_data) == 2
    masks = {Path(row.image_path).name: row.mask_path for row in data.test_data.samples.itertuples()}
    own = {name: str(tmp_path / "part" / "ground_truth" / "dent" / name) for name in ("[1].png", "0.b.png")}
    assert masks == {"c.png": "", "1.png": "", "0.png": ""} | own, "a photo never takes another photo's mask"


def test_one_batch_mixes_data_sets(products: Path) -> None:
    folder = products / "tiles"
    other = Folder(
        name="other",
        root=folder,
        normal_dir="train/good",
        abnormal_dir=["test/crack", "test/scratch", "test/spot"],
        mask_dir=[f"ground_truth/{defect}" for defect in ("crack", "scratch", "spot")],
        num_workers=0,
    )
    data = CrossCategory([product(products, "grain"), other], train_batch_size=30, num_workers=0, val_ratio=0)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert set(data.train_data.samples.category) == {"products/grain", "other"}
    assert batch.gt_mask.shape == (len(batch.image), 64, 64)
    assert batch.gt_mask.flatten(1).any(dim=1).tolist() == batch.gt_label.tolist()


def test_defects_without_masks_are_left_out_and_counted(
    products: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(products / "grain", tmp_path / "grain")
    shutil.rmtree(tmp_path / "grain" / "ground_truth" / "crack")
    with caplog.at_level(logging.WARNING):
        samples = category_samples(product(tmp_path, "grain"))
    assert "1 of 3 defective images have no mask" in caplog.text
    assert (samples.label_index == 1).sum() == 2


def test_overlap_is_refused(products: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"target products/pill is among the source"):
        cross_category(products, source="grain, pill", target="pill")
    with pytest.raises(ValueError, match="more than once"):
        cross_category(products, source="grain, grain")
    (tmp_path / "alias").symlink_to(products / "grain")
    data = CrossCategory(product(products, "grain"), product(tmp_path, "alias"), num_workers=0)
    with pytest.raises(ValueError, match="images are in the source and in the target"):
        data.setup()


def test_unreadable_images_are_named_before_training(products: Path, tmp_path: Path) -> None:
    shutil.copytree(products, tmp_path / "products")
    (tmp_path / "products" / "grain" / "train" / "good" / "001.png").write_text("no image")
    with pytest.raises(ValueError, match=r"1 of the images of grain cannot be used.*good/001\.png: unreadable"):
        cross_category(tmp_path / "products").setup()
    (tmp_path / "products" / "tiles" / "test" / "good" / "000.png").write_text("no image")
    with pytest.raises(ValueError, match=r"images of tiles cannot be used"):
        cross_category(tmp_path / "products", source="pill").setup()


def test_bad_folders(products: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nothing.*'grain', 'pill', 'tiles'"):
        product(products, "nothing").setup()
    (tmp_path / "empty" / "train" / "good").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no image"):
        product(tmp_path, "empty").setup()
    with pytest.raises(FileNotFoundError, match="source category products/nothing could not be read"):
        cross_category(products, source="grain, nothing").setup()
    with pytest.raises(ValueError, match="source is empty"):
        CrossCategory([])
    data = cross_category(products, target=None)
    data.setup()
    with pytest.raises(ValueError, match="anomalib fit"):
        data.test_dataloader()


def test_product_folder_any_format_and_masks_optional(tmp_path: Path) -> None:
    for name in (
        "train/good/a.jpg",
        "test/good/b.bmp",
        "test/dent/c.JPG",
        "test/dent/d.png",
        "ground_truth/dent/c.png",
    ):
        path = tmp_path / "part" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        SPOT.save(path)
    data = product(tmp_path, "part")
    data.setup()
    assert data.train_data.samples.image_path.tolist() == [str(tmp_path / "part/train/good/a.jpg")]
    masks = dict(zip(data.test_data.samples.image_path, data.test_data.samples.mask_path, strict=True))
    assert masks[str(tmp_path / "part/test/dent/c.JPG")].endswith("ground_truth/dent/c.png")
    assert masks[str(tmp_path / "part/test/dent/d.png")] == ""
    assert [None if item.gt_mask is None else int(item.gt_mask.any()) for item in data.test_data] == [1, None, 0]
    assert data.name == tmp_path.name


def test_agrees_with_anomalibs_mvtec(products: Path) -> None:
    ours, theirs = ProductFolder(products, "pill"), MVTecAD(products, "pill")
    ours.setup()
    theirs.setup()
    for split in ("train_data", "test_data"):
        a, b = getattr(ours, split).samples, getattr(theirs, split).samples
        assert a.image_path.tolist() == b.image_path.tolist()
        assert a.label_index.tolist() == b.label_index.tolist()
        assert [path or None for path in a.mask_path] == [
            path if isinstance(path, str) else None for path in b.mask_path
        ]
