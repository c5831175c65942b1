# SPDX-License-Identifier: Apache-2.0

"""Masks that are not what they seem: read as they are meant, or refused by name before the first epoch."""

import logging
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anomalib.data import Folder, MVTecAD
from lightning.pytorch import seed_everything
from PIL import Image

from anomalib_resad import CrossCategory, ProductFolder, ResAD
from anomalib_resad.data.masks import read_mask
from anomalib_resad.enrollment.photos import PhotoError, read_header, read_pixels
from tests.conftest import DEFAULT, DISTANCE, SHARED, cross_category, product, quiet_engine

METRICS = ("image_AUROC", "pixel_AUROC")
DEFECT = np.zeros((24, 32), bool)
DEFECT[5:13, 6:16] = True
WHITE = DEFECT.astype(np.uint8) * 255
GRAY = np.full_like(WHITE, 90)


def palette(colors: list[int]) -> Image.Image:
    """The shape in the indices 0 and 1 of some colors."""
    image = Image.fromarray(DEFECT.astype(np.uint8), "P")
    image.putpalette(colors)
    return image


SHAPES: dict[str, Image.Image] = {
    "gray.png": Image.fromarray(WHITE),
    "one.png": Image.fromarray(DEFECT.astype(np.uint8)),
    "bits.png": Image.fromarray(DEFECT),
    "deep.png": Image.fromarray(WHITE.astype(np.uint16) * 100),
    "blue.png": Image.fromarray(np.dstack([WHITE * 0, WHITE * 0, DEFECT.astype(np.uint8)])),
    "alpha.png": Image.fromarray(np.dstack([WHITE * 0] * 3 + [WHITE])),
    "alpha.webp": Image.fromarray(np.dstack([WHITE * 0] * 3 + [WHITE])),
    "gray_alpha.png": Image.fromarray(np.dstack([WHITE * 0, WHITE])),
    "overlay.png": Image.fromarray(np.dstack([WHITE, GRAY, GRAY, WHITE // 2])),
    "opaque.png": Image.fromarray(np.dstack([WHITE] * 3 + [WHITE * 0 + 255])),
    "transparent.png": Image.fromarray(np.dstack([WHITE] * 3 + [WHITE * 0])),
    "labels.png": palette([0, 0, 0, 128, 0, 0]),
    "swapped.png": Image.fromarray(1 - DEFECT.astype(np.uint8), "P"),
    "no_colors.png": palette([0, 0, 0, 0, 0, 0]),
    "purple.png": palette([68, 1, 84, 253, 231, 37]),
    "lossy.jpg": Image.fromarray(WHITE),
    "lossy.webp": Image.fromarray(WHITE).convert("RGB"),
    "named.png": Image.fromarray(WHITE),
    "plain.bmp": Image.fromarray(WHITE),
    "plain.tif": Image.fromarray(WHITE),
    "plain.pgm": Image.fromarray(WHITE),
}
SHAPES["swapped.png"].putpalette([255, 255, 255, 0, 0, 0])


@pytest.mark.parametrize("name", SHAPES)
def test_a_defect_is_found_however_it_is_drawn(tmp_path: Path, name: str) -> None:
    kind = {"named.png": "JPEG"}.get(name)
    SHAPES[name].save(tmp_path / name, kind)
    Image.fromarray(GRAY).save(tmp_path / "photo.png")
    assert np.array_equal(read_mask(tmp_path / name, read_header(tmp_path / "photo.png")), DEFECT)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def change(alter: Callable[[np.ndarray], Any]) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(np.ascontiguousarray(alter(np.asarray(Image.open(path))))).save(path)


REFUSED: dict[str, Callable[[Path], None]] = {
    "64 x 60 pixels, while its photo has 64 x 64": change(lambda mask: mask[:60]),
    "is white, and so is its edge": change(lambda mask: 255 - mask),
    "100% of it is white": change(lambda mask: mask * 0 + 255),
    "unreadable": truncate,
    "more than 8 bits a channel in color": lambda path: path.write_bytes(
        b"P6 64 64 65535\n" + np.zeros(64 * 64 * 3, np.uint16).tobytes()
    ),
    "2 pages": lambda path: Image.open(path).save(path, "TIFF", save_all=True, append_images=[Image.open(path)]),
}


def altered(products: Path, folder: Path, alter: Callable[[Path], object]) -> Path:
    """The products, with one mask of grain and one of tiles altered."""
    shutil.copytree(products, folder / "products")
    for name in ("grain", "tiles"):
        alter(folder / "products" / name / "ground_truth" / "spot" / "000_mask.png")
    return folder / "products"


def of_anomalib(root: Path) -> list[Any]:
    """anomalib's own data sets of tiles."""
    kinds = ("crack", "scratch", "spot")
    folders = {
        "abnormal_dir": [f"test/{kind}" for kind in kinds],
        "mask_dir": [f"ground_truth/{kind}" for kind in kinds],
    }
    tiles = Folder("tiles", "train/good", root / "tiles", num_workers=0, val_split_mode="same_as_test", **folders)
    return [MVTecAD(root, "tiles", num_workers=0), tiles]


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_mask_of_its_photo_is_named_before_the_first_epoch(
    message: str, products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training and in test, by our data sets and by anomalib's."""
    root = altered(products, tmp_path, REFUSED[message])
    monkeypatch.setattr(ResAD, "training_step", lambda *_: pytest.fail("a step was taken"))
    refused = rf"1 of the masks of .*spot/000_mask\.png: .*{message}"
    with pytest.raises(ValueError, match=refused):
        quiet_engine(tmp_path, max_epochs=1).fit(ResAD(**DEFAULT), datamodule=cross_category(root, target=None))
    sources = [CrossCategory(data, num_workers=0) for data in of_anomalib(root)]
    for data in (product(root, "tiles"), *of_anomalib(root), *sources):
        with pytest.raises(ValueError, match=refused):
            quiet_engine(tmp_path, max_epochs=1).fit(ResAD(**DEFAULT), datamodule=data)
    for data in (product(root, "tiles"), *of_anomalib(root)):
        with pytest.raises(ValueError, match=refused):
            quiet_engine(tmp_path).test(ResAD(**DISTANCE), datamodule=data)


def test_what_anomalib_would_read_otherwise_is_refused(products: Path, tmp_path: Path) -> None:
    """Its own data sets, as a target or alone; as sources, and in ProductFolder, they are read by the rules."""
    root = altered(products, tmp_path, lambda path: SHAPES["alpha.png"].resize((64, 64)).save(path))
    for data in of_anomalib(root):
        with pytest.raises(ValueError, match=r"000_mask\.png: anomalib's own data sets read other pixels"):
            quiet_engine(tmp_path).test(ResAD(**DISTANCE), datamodule=data)
        source = CrossCategory(data, num_workers=0, val_ratio=0)
        source.setup()
        defective = [item for item in source.train_data if int(item.gt_label)]
        assert len(defective) == 3
        assert all(item.gt_mask.any() for item in defective)


def test_a_mask_without_a_defect_counts_as_missing(
    products: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both are named, with what follows."""
    for name, alter in (("empty", change(lambda mask: mask * 0)), ("none", Path.unlink)):
        root = altered(products, tmp_path / name, alter)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            data = product(root, "tiles")
            data.setup()
            source = cross_category(root, source="grain, pill")
            source.setup()
        assert "tiles: 1 of 3 defective photos have no mask, and do not count in pixel metrics: " in caplog.text
        assert f"{root / 'tiles/test/spot/000.png'}. Add the masks" in caplog.text
        assert f"left out of training: {root / 'grain/test/spot/000.png'}." in caplog.text
        assert ("1 masks show no defect, and count as missing" in caplog.text) == (name == "empty")
        assert int(source.train_data.samples.label_index.sum() + source.val_data.samples.label_index.sum()) == 5


def test_pixel_metrics_are_of_the_photos_that_have_masks(products: Path, tmp_path: Path) -> None:
    """As if the others were not there; the metrics of images count them, whatever batches they come in."""
    shutil.copytree(products / "tiles", tmp_path / "some" / "tiles")
    (tmp_path / "some/tiles/ground_truth/crack/000_mask.png").unlink()
    shutil.copytree(tmp_path / "some", tmp_path / "fewer")
    (tmp_path / "fewer/tiles/test/crack/000.png").unlink()
    results = {}
    for name, root in (("all", products), *((name, tmp_path / name) for name in ("some", "fewer"))):
        for data in (product(root, "tiles"), cross_category(products, "grain", None)):
            if isinstance(data, CrossCategory):
                data.target = product(root, "tiles")
            seed_everything(0)
            model = ResAD(**DISTANCE, visualizer=False)
            (results[name, type(data)],) = quiet_engine(tmp_path).test(model, datamodule=data, verbose=False)
    for kind in (ProductFolder, CrossCategory):
        image, pixel = ([results[name, kind][key] for name in ("all", "some", "fewer")] for key in METRICS)
        assert image[1] == image[0]
        assert pixel[1] == pixel[2] != pixel[0]


def test_a_product_without_masks_is_fine(products: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(products / "tiles", tmp_path / "tiles", ignore=shutil.ignore_patterns("ground_truth"))
    data = product(tmp_path, "tiles")
    with caplog.at_level(logging.WARNING):
        data.setup()
    assert not caplog.text
    (result,) = quiet_engine(tmp_path).test(ResAD(**DISTANCE), datamodule=data, verbose=False)
    assert "image_AUROC" in result


def test_a_large_defect_inside_of_a_photo_is_one(tmp_path: Path) -> None:
    """Of real composite parts, a defect covers 58 percent; its edge is black."""
    mask = np.zeros((40, 40), np.uint8)
    mask[2:-2, 2:-4] = 255
    for name in ("mask.png", "photo.png"):
        Image.fromarray(mask).save(tmp_path / name)
    read = read_mask(tmp_path / "mask.png", read_header(tmp_path / "photo.png"))
    assert read.mean() > 0.7
    assert np.array_equal(read, mask > 0)


def test_masks_of_large_and_of_turned_photos_fit_their_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomalib_resad.enrollment.decoding.MOST_KEPT", 200)
    orientation = Image.Exif()
    orientation[274] = 6
    for name in ("mask.tif", "mask.png", "photo.tif", "photo.jpg"):
        Image.fromarray(WHITE).save(tmp_path / name, exif=orientation)
    for photo in ("photo.tif", "photo.jpg"):
        for mask in ("mask.tif", "mask.png"):
            read = read_mask(tmp_path / mask, read_header(tmp_path / photo))
            pixels = read_pixels(tmp_path / photo)
            assert read.shape == pixels.shape[:2] == (12, 16)
            assert np.array_equal(read, DEFECT.reshape(12, 2, 16, 2).any(axis=(1, 3)))


# -- the cases of the shared folder -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases") / "all"
    if not (SHARED / "cases").is_dir():
        pytest.skip("no shared folder")
    runpy.run_path(str(SHARED / "cases/make_cases.py"))["main"](folder)
    return folder


def defects(data: Any) -> dict[str, int]:
    """Pixels of the defect, by photo; -1 without a mask."""
    items = [data[index] for index in range(len(data)) if int(data.samples.label_index[index])]
    return {Path(item.image_path).name: -1 if item.gt_mask is None else int(item.gt_mask.sum()) for item in items}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("brackets", {f"cam[{index}].png": 256 for index in range(4)}),
        ("alpha_only", {f"00{index}.png": 256 for index in range(4)}),
        ("longer_name", {"000.b.png": 256, "002.png": 256, "003.png": 256}),
        ("empty", {f"00{index}.png": 256 for index in range(1, 4)}),
        ("swapped_size", r"4 of the masks of p .*000_mask.png: 96 x 160 pixels, while its photo has 160 x 96"),
        ("white_background", r"4 of the masks of p .*000_mask.png: 97% of it is white"),
    ],
)
def test_cases_of_masks(
    case: str, expected: Any, cases: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a source of training, and in a test."""
    root = cases / "masks" / case
    source = CrossCategory(product(root, "p"), train_batch_size=4, num_workers=0, val_ratio=0)
    if isinstance(expected, str):
        for run, model, data in (("fit", DEFAULT, source), ("test", DISTANCE, product(root, "p"))):
            engine = quiet_engine(tmp_path, max_epochs=1)
            with pytest.raises(PhotoError, match=expected):
                getattr(engine, run)(ResAD(**model), datamodule=data)
        return
    with caplog.at_level(logging.WARNING):
        source.setup()
    assert defects(source.train_data) == expected
    quiet_engine(tmp_path, max_epochs=1).fit(ResAD(**DEFAULT, visualizer=False), datamodule=source)
    data = product(root, "p")
    (result,) = quiet_engine(tmp_path).test(ResAD(**DISTANCE, visualizer=False), datamodule=data, verbose=False)
    assert "pixel_AUROC" in result
    assert ("hole/000.png. Add the masks" in caplog.text) == (len(expected) == 3)


def test_case_of_folders(cases: Path, tmp_path: Path) -> None:
    data = product(cases / "folders", "p")
    data.setup()
    assert len(data.train_data) == 10
    assert data.test_data.samples.groupby("label").label_index.first().to_dict() == {"OK": 0, "hole": 1}
    model = ResAD(**DISTANCE | {"k_shot": 10}, visualizer=False)
    quiet_engine(tmp_path).test(model, datamodule=data, verbose=False)
    assert model.model.bank.record.photos == 10


def test_a_mask_of_several_photos_is_refused(products: Path, tmp_path: Path) -> None:
    """Which of them was drawn on is not known."""
    shutil.copytree(products / "tiles", tmp_path / "tiles")
    Image.open(tmp_path / "tiles/test/spot/000.png").save(tmp_path / "tiles/test/spot/000.jpg")
    with pytest.raises(PhotoError, match=r"000_mask\.png: it is of several photos \(.*000\.jpg, .*000\.png\); rename"):
        product(tmp_path, "tiles").setup()
