# SPDX-License-Identifier: Apache-2.0

"""Photos in the shape of their product: as many pixels as a square has, chosen at enrollment and kept with the bank."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import timm.layers.padding
import torch
from anomalib.data import ImageBatch
from anomalib.deploy import OpenVINOInferencer
from anomalib.metrics import Evaluator
from lightning.pytorch import seed_everything
from PIL import Image
from torch import Tensor

from anomalib_resad import ResAD
from anomalib_resad.data.category_batches import CategoryBatches
from anomalib_resad.deploy import BankError, ResADInferencer
from anomalib_resad.deploy.bake import bake
from anomalib_resad.enrollment.image_size import auto_side, read_image_size, size_of_photos
from anomalib_resad.enrollment.photos import read_pixels
from anomalib_resad.export.edge_bundle import load_model, model_hash, write_bundle
from anomalib_resad.export.halves import _whole_strides, trace
from anomalib_resad.export.parity import TorchReference
from anomalib_resad.method.anomaly_map import _rounded_share
from anomalib_resad.method.bank_record import BankRecord
from anomalib_resad.pre_processor import resize_and_normalize
from anomalib_resad.reference_rows import pre_process, read_photo, reference_rows
from benchmarks.products import make_product
from tests.conftest import COUNTS, DEFAULT, converted, cross_category, product, quiet_engine

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


# -- on the edge ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle_auto(share: Callable[..., Path], trained_auto: Path) -> Path:
    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "anomalib_resad.cli", "export", "--checkpoint", trained_auto]
        command += ["--output", folder / "fp32"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr

    return share("bundle_auto", make) / "fp32"


OF_FOUR = SIZES | {"tiles": (48, 96)}  # of the first four good photos, whose median is another one


def good_of(shaped: Path, name: str) -> list[Path]:
    return sorted((shaped / name / "train" / "good").glob("*.png"))[:4]


def test_products_of_several_shapes_in_one_bundle(
    bundle_auto: Path, trained_auto: Path, shaped: Path, tmp_path: Path
) -> None:
    """Each photo scores as in evaluation, whatever its shape, and whatever was inspected before; so in baked files."""
    inferencer = ResADInferencer(bundle_auto, banks=tmp_path / "banks")
    photos = {name: sorted((shaped / name / "test").rglob("*.png"))[:3] for name in ("pill", "tiles", "grain")}
    mixed = [photos["grain"][0], photos["pill"][0]]
    first = {}
    for name in ("pill", "tiles"):
        bank = inferencer.enroll(name, good_of(shaped, name), false_alarm_rate=None)
        evaluation = TorchReference(load_model(trained_auto), good_of(shaped, name))
        assert bank.image_size == evaluation.model.model.bank.record.image_size == OF_FOUR[name]
        baked = ov.Core().compile_model(bake(bundle_auto, name, tmp_path / name, inferencer.banks), "CPU")
        for photo in [*photos[name], *mixed]:
            theirs, ours = inferencer.predict(photo, name), evaluation.predict(photo)
            assert theirs.raw_score == pytest.approx(ours.raw_score, rel=1e-4, abs=1e-4)
            assert theirs.map.shape == ours.map.shape == OF_FOUR[name]
            np.testing.assert_allclose(theirs.map, ours.map, atol=1e-3)
            found = baked(read_pixels(photo)[None])
            assert found["pred_score"].item() == pytest.approx(theirs.score, abs=1e-4)
            np.testing.assert_allclose(found["anomaly_map"][0, 0], theirs.map, atol=5e-3)  # raw scores reach hundreds
            first[name, photo] = theirs.raw_score
    for name, photo in reversed(first):
        assert inferencer.predict(photo, name).raw_score == first[name, photo]
    together = inferencer.predict_batch(mixed, "pill")
    assert [each.raw_score for each in together] == pytest.approx([first["pill", each] for each in mixed], abs=1e-5)


def test_the_size_stays_with_the_product(bundle_auto: Path, shaped: Path, tmp_path: Path) -> None:
    inferencer = ResADInferencer(bundle_auto, banks=tmp_path)
    pills, tiles = good_of(shaped, "pill"), good_of(shaped, "tiles")
    inferencer.enroll("pill", pills[:3])
    score = inferencer.predict(pills[3], "pill").raw_score
    before = inferencer.bank("pill").references
    added = set(inferencer.add("pill", tiles[:4]).references) - set(before)
    inferencer.set_threshold("pill", 1.0)
    for each in added:
        inferencer.remove("pill", each.sha256)
    bank = ResADInferencer(bundle_auto, banks=tmp_path).bank("pill")
    assert (bank.image_size, len(bank.references)) == (OF_FOUR["pill"], 3)
    assert inferencer.predict(pills[3], "pill").raw_score == score
    inferencer.enroll("pill", tiles[:4], replace_existing=True)
    assert inferencer.bank("pill").image_size == OF_FOUR["tiles"]
    inferencer.undo("pill")
    assert inferencer.predict(pills[3], "pill").raw_score == score
    boxed = inferencer.enroll("boxed", pills[:2], region="0,0 60,0 60,60 0,60")
    assert boxed.image_size == (64, 64), "of the box that is seen"
    assert inferencer.predict(pills[3], "boxed").map.shape[0] > 64
    tiled = inferencer.enroll("tiled", [tiles[0]], tile_scale=1)
    assert tiled.image_size is None
    assert inferencer.predict(tiles[0], "tiled").map.shape == read_pixels(tiles[0]).shape[:2]


def test_a_bank_of_another_kind_of_bundle_is_refused(
    bundle_auto: Path, bundle_default: Path, shaped: Path, tmp_path: Path
) -> None:
    own, fixed = (ResADInferencer(each, banks=tmp_path) for each in (bundle_auto, bundle_default))
    bank = own.enroll("pill", good_of(shaped, "pill")[:2])
    with pytest.raises(BankError, match=r"a size of its own, 96 x 48 pixels .* resizes all photos to 64 x 64\. Use"):
        fixed.bank("pill")
    for size, message in (((96, 50), "in whole strides of 16"), ((96, 64), "level 0 has float32")):
        replace(bank, image_size=size).save(tmp_path / "pill.safetensors")
        with pytest.raises(BankError, match=message):
            own.bank("pill")
    fixed.enroll("tiles", good_of(shaped, "tiles")[:2])
    with pytest.raises(BankError, match=r"enrolled at the bundle's size .* gives each product its own"):
        own.bank("tiles")


def test_eight_bits_keep_shapes(bundle_auto: Path, trained_auto: Path, shaped: Path, tmp_path: Path) -> None:
    model = load_model(trained_auto)
    photos = good_of(shaped, "pill") + good_of(shaped, "tiles")
    eight = ResADInferencer(write_bundle(model, converted(bundle_auto), tmp_path / "int8", "int8", photos))
    for name in ("pill", "tiles"):
        assert eight.enroll(name, good_of(shaped, name)[:3]).image_size == OF_FOUR[name]
        assert eight.predict(good_of(shaped, name)[3], name).map.shape == OF_FOUR[name]


def test_the_name_of_a_model_that_keeps_shapes(trained_auto: Path) -> None:
    """It does not depend on the product that the checkpoint holds, and is not that of one with a size."""
    one, other = load_model(trained_auto), load_model(trained_auto)
    other.pre_processor.take_size((64, 64))  # type: ignore[union-attr, operator]
    assert model_hash(one) == model_hash(other)
    one.model.encoder.backbone.area_side = None
    assert model_hash(one) != model_hash(other)


def test_positions_of_one_size_are_not_exported() -> None:
    model = ResAD(backbone="vit_tiny_patch16_224", pre_trained=False, estimator="distance", image_size="auto:64").eval()
    with pytest.raises(ValueError, match="keeps positions of one input size"):
        trace(model)


def test_what_open_sides_are_computed_by() -> None:
    """The same numbers as with known sides."""
    counts = range(1, 5000)
    assert [_rounded_share(each, 100) for each in counts] == [max(1, round(each / 100)) for each in counts]
    general = timm.layers.padding.get_same_padding
    with _whole_strides():
        for stride in (1, 2, 4):
            for kernel in (1, 2, 3, 5, 7):
                given = [(side, kernel, stride, 1) for side in range(stride, 20 * stride, stride)]
                assert {timm.layers.padding.get_same_padding(*each) for each in given} == {
                    general(*each) for each in given
                }
    assert timm.layers.padding.get_same_padding is general
