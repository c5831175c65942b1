# SPDX-License-Identifier: Apache-2.0

"""Photos in the shape of their product: as many pixels as a square has, chosen at enrollment and kept with the bank."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.deploy import OpenVINOInferencer
from anomalib.metrics import Evaluator
from lightning.pytorch import seed_everything
from PIL import Image
from torch import Tensor

from anomalib_resad import ResAD
from anomalib_resad.data.category_batches import CategoryBatches
from anomalib_resad.enrollment.image_size import auto_side, read_image_size, size_of_photos
from anomalib_resad.enrollment.photos import read_pixels
from anomalib_resad.method.bank_record import BankRecord
from anomalib_resad.pre_processor import resize_and_normalize
from anomalib_resad.reference_rows import pre_process, read_photo, reference_rows
from benchmarks.products import make_product
from tests.conftest import COUNTS, DEFAULT, cross_category, product, quiet_engine

# Width and height of the photos of each product: two thin ones, and one of photos of several shapes.
SHAPES = {"grain": [(72, 72)], "pill": [(60, 120)], "tiles": [(128, 64), (120, 66), (140, 60), (64, 64)]}
SIZES = {"grain": (64, 64), "pill": (96, 48), "tiles": (48, 80)}  # height and width, in strides of 16
AUTO = DEFAULT | {"image_size": "auto:64", "k_shot": 3}


@pytest.mark.parametrize(
    ("sizes", "side", "stride", "expected"),
    [
        ([(300, 300)], 224, 16, (224, 224)),
        ([(1000, 2000)], 224, 16, (160, 320)),
        ([(2000, 1000)], 224, 16, (320, 160)),
        ([(500, 1250)], 224, 16, (144, 352)),
        ([(500, 1250)], 448, 16, (288, 704)),
        ([(500, 1250)], 224, 32, (128, 352)),
        ([(500, 1250)], 224, 14, (140, 350)),
        ([(100, 100), (100, 200), (100, 900)], 224, 16, (160, 320)),  # the median
        ([(100, 100), (100, 400)], 224, 16, (160, 320)),  # the geometric mean
        ([(400, 100), (100, 400)], 224, 16, (224, 224)),
        ([(40, 2000)], 224, 32, (64, 800)),  # two strides at least
    ],
)
def test_area_is_spent_in_the_usual_shape_in_whole_strides(
    sizes: list[tuple[int, int]], side: int, stride: int, expected: tuple[int, int]
) -> None:
    assert size_of_photos(sizes, side, stride) == expected
    assert size_of_photos(reversed(sizes), side, stride) == expected


@pytest.mark.parametrize(
    ("given", "kept", "side"),
    [
        (224, [224, 224], None),
        ((64, 96), [64, 96], None),
        ([64, 96], [64, 96], None),
        ("auto", "auto:224", 224),
        ("auto:448", "auto:448", 448),
    ],
)
def test_what_is_given_is_kept_in_plain_types(given: Any, kept: Any, side: int | None) -> None:
    assert read_image_size(given) == read_image_size(kept) == kept
    assert auto_side(given) == auto_side(kept) == side


@pytest.mark.parametrize("given", ["", "auto:", "auto:0", "automatic", "224", 0, -1, 2.5, True, None, (1, 2, 3), [64]])
def test_other_sizes_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"image_size=.* must be a side such as 224"):
        ResAD(**DEFAULT | {"image_size": given})


def test_what_cannot_keep_shapes_says_so() -> None:
    with pytest.raises(ValueError, match="estimator 'flow', which knows positions"):
        ResAD(**AUTO, variant="resad")
    with pytest.raises(ValueError, match="leave pre_processor out"):
        ResAD(**AUTO, pre_processor=False)
    with pytest.raises(ValueError, match="takes inputs of one size"):
        ResAD(**AUTO | {"backbone": "beit_base_patch16_224"})
    ResAD(**AUTO, pre_processor=resize_and_normalize("auto:64", "resnet18"))


def test_batches_are_of_one_category() -> None:
    names = ["a", "a", "a", "b", "a", "a"]
    batches = CategoryBatches(torch.utils.data.SequentialSampler(names), 2, drop_last=False, categories=names)
    assert list(batches) == [[0, 1], [2], [3], [4, 5]]
    assert len(batches) == 4


@pytest.fixture(scope="module")
def shaped(share: Callable[..., Path]) -> Path:
    """The three products in :data:`SHAPES`."""

    def make(folder: Path) -> None:
        for name, shapes in SHAPES.items():
            make_product(folder / "products", name, **COUNTS)
            for path in sorted((folder / "products" / name).rglob("*.png")):
                number = int(path.stem[:3]) + len(path.parent.name)  # of a mask as of its photo
                method = Image.Resampling.NEAREST if "ground_truth" in path.parts else Image.Resampling.BILINEAR
                Image.open(path).resize(shapes[number % len(shapes)], method).save(path)

    return share("shaped", make) / "products"


@pytest.fixture(scope="module")
def trained_auto(share: Callable[..., Path], shaped: Path) -> Path:
    """A tiny default model that keeps shapes, trained on grain and pill; its bank holds tiles."""

    def make(folder: Path) -> None:
        seed_everything(0)
        seen: dict[str, Any] = {"photos": set(), "masks": set(), "validated": set()}
        model = ResAD(**AUTO, visualizer=False)
        engine = quiet_engine(folder / "engine", max_epochs=1)
        losses, detect_each = model.model.losses, model.model.detect_each

        def note_losses(photos: Any, references: Any, masks: Any, progress: float) -> Any:
            seen["photos"] |= {tuple(photo.values[0].shape[-2:]) for photo in photos}
            seen["masks"] |= {tuple(mask.shape) for mask in masks}
            return losses(photos, references, masks, progress)

        def note_detected(features: Any, references: Any, image_size: Any) -> Any:
            seen["validated"].add(tuple(image_size))
            return detect_each(features, references, image_size)

        model.model.losses, model.model.detect_each = note_losses, note_detected  # type: ignore[method-assign]
        data = cross_category(shaped)
        engine.fit(model, datamodule=data)
        assert seen["photos"] == {(8, 8), (12, 6)}
        assert seen["masks"] == seen["validated"] == {SIZES["grain"], SIZES["pill"]}
        assert data.val_data.sizes == {f"products/{name}": SIZES[name] for name in ("grain", "pill")}
        shutil.copy(engine.best_model_path, folder / "model.ckpt")

    return share("trained_auto", make) / "model.ckpt"


def size_of(model: ResAD) -> tuple[int, ...]:
    return tuple(pre_process(model.pre_processor, torch.zeros(1, 3, 50, 70)).shape[-2:])


def evaluate(model: ResAD, photo: Tensor) -> Any:
    with torch.no_grad():
        return model.eval().model(pre_process(model.pre_processor, photo[None]))


def test_a_checkpoint_brings_the_size_with_the_bank(trained_auto: Path, shaped: Path) -> None:
    photo = read_photo(str(min((shaped / "tiles" / "test").rglob("*.png"))))
    started, restored = ResAD(checkpoint=trained_auto), ResAD.load_from_checkpoint(trained_auto)
    for model in (started, restored):
        assert model.hparams["image_size"] == "auto:64"
        assert model.model.bank.record.image_size == size_of(model) == SIZES["tiles"]
        assert evaluate(model, photo).anomaly_map.shape[-2:] == SIZES["tiles"]
    assert torch.equal(evaluate(started, photo).anomaly_map, evaluate(restored, photo).anomaly_map)
    with pytest.raises(ValueError, match=r"photos of 48 x 80 pixels \(height x width\), not 64 x 64"):
        started.model(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("by_path", [False, True])
def test_evaluation_takes_the_size_of_the_references(
    trained_auto: Path, shaped: Path, tmp_path: Path, workers: int, by_path: bool
) -> None:
    """Whatever the model was before, and however its loaders work: scores are those of photos taken one by one."""
    model = ResAD(**DEFAULT, visualizer=False) if by_path else ResAD(checkpoint=trained_auto, visualizer=False)
    model.evaluator = Evaluator()
    data = product(shaped, "pill")
    data.num_workers = workers
    engine = quiet_engine(tmp_path)
    batches: list[ImageBatch] = []
    model.on_test_batch_end = lambda _, batch, *__: batches.append(batch)  # type: ignore[method-assign]
    engine.test(model, datamodule=data, ckpt_path=trained_auto if by_path else None)
    assert model.model.bank.record.category == "products/pill"
    assert model.model.bank.record.image_size == size_of(model) == SIZES["pill"]
    for batch in batches:
        assert batch.gt_mask.shape[-2:] == batch.anomaly_map.shape[-2:] == SIZES["pill"]
        for path, score in zip(batch.image_path, batch.pred_score, strict=True):
            alone = model.post_processor(evaluate(model, read_photo(path)))
            torch.testing.assert_close(alone.pred_score[0], score, rtol=0, atol=1e-5)


def test_the_stock_export_has_the_size_of_its_product(trained_auto: Path, shaped: Path, tmp_path: Path) -> None:
    model = ResAD(checkpoint=trained_auto).eval()
    inferencer = OpenVINOInferencer(model.to_openvino(tmp_path), device="CPU")
    for path in sorted((shaped / "tiles" / "test").rglob("*.png")):
        ours = model.post_processor(evaluate(model, read_photo(str(path))))
        theirs = inferencer.predict(str(path))
        assert np.asarray(theirs.anomaly_map).squeeze().shape == SIZES["tiles"]
        assert abs(np.asarray(theirs.pred_score).item() - ours.pred_score.item()) < 1e-4
        np.testing.assert_allclose(np.asarray(theirs.anomaly_map).squeeze(), ours.anomaly_map[0, 0], atol=1e-4)


def test_banks_of_earlier_versions_have_the_models_size(trained_default: Path) -> None:
    assert BankRecord.from_plain({"files": ()}).image_size is None
    model = ResAD(checkpoint=trained_default)
    assert model.model.bank.record.image_size is None
    assert size_of(model) == (64, 64)


def test_a_transformer_keeps_shapes_in_whole_patches(good: list[Path]) -> None:
    model = ResAD(backbone="vit_tiny_patch16_224", pre_trained=False, estimator="distance", image_size="auto:64").eval()
    photo = np.tile(read_pixels(good[0]), (1, 2, 1))
    rows, _ = reference_rows(model.model, model.pre_processor, [photo], 1, (48, 96))
    assert len(rows.values[0]) == 3 * 6
