# SPDX-License-Identifier: Apache-2.0

"""The edge runtime: a bundle, its products, and the numbers of evaluation, without PyTorch."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from anomalib_resad import ResAD
from anomalib_resad.deploy import BankError, BundleError, PhotoError, ResADInferencer
from anomalib_resad.deploy.bank import Bank
from anomalib_resad.deploy.bank_rows import padded
from anomalib_resad.enrollment.coreset import thin_out
from anomalib_resad.export.edge_bundle import export_bundle, load_model, model_hash, write_bundle
from anomalib_resad.export.parity import TorchReference
from anomalib_resad.method.features import Features
from tests.conftest import converted, product, quiet_engine, rewrite


@pytest.mark.parametrize("many", [1, 3])
def test_numbers_of_evaluation(
    inferencer: ResADInferencer, trained: Path, good: list[Path], new: list[Path], many: int
) -> None:
    """Also with a bank whose rows are no multiple of what the detector takes (16 in level 3, of one photo)."""
    inferencer.enroll("tiles", good[:many])
    evaluation = TorchReference(load_model(trained), good[:many])
    for photo in new:
        theirs, ours = inferencer.predict(photo, "tiles"), evaluation.predict(photo)
        assert theirs.score == pytest.approx(ours.score, abs=1e-4)
        assert theirs.raw_score == pytest.approx(ours.raw_score, abs=1e-4)
        assert theirs.label == ours.label
        np.testing.assert_allclose(theirs.map, ours.map, atol=1e-4)


def test_batches_and_pixels_change_nothing(inferencer: ResADInferencer, good: list[Path], new: list[Path]) -> None:
    inferencer.enroll("tiles", good[:2])
    alone = [inferencer.predict(photo, "tiles") for photo in new]
    for count in (1, 2, len(new)):
        together = list(inferencer.predict_batch(new[:count], "tiles"))
        for one, other in zip(alone, together, strict=False):
            assert one.raw_score == other.raw_score
            np.testing.assert_array_equal(one.map, other.map)
    with Image.open(new[0]) as image:
        pixels = np.asarray(image.convert("RGB"))
        for photo in (image, pixels):
            assert inferencer.predict(photo, "tiles").score == pytest.approx(alone[0].score, abs=1e-6)
    with pytest.raises(PhotoError, match="uint8"):
        inferencer.predict(pixels / 255, "tiles")
    assert not list(inferencer.predict_batch([], "tiles"))


def test_exporting_again_changes_nothing(
    bundle: Path, trained: Path, good: list[Path], new: list[Path], tmp_path: Path
) -> None:
    """In half precision: the same model, whose bank serves both, and the same scores."""
    model = load_model(trained)
    write_bundle(model, converted(bundle), tmp_path / "fp16", "fp16")
    half = ResADInferencer(tmp_path / "fp16", banks=tmp_path / "banks")
    full = ResADInferencer(bundle, banks=tmp_path / "banks")
    half.enroll("tiles", good[:2])
    assert half.manifest.model == full.manifest.model
    assert full.predict(new[0], "tiles").score == pytest.approx(half.predict(new[0], "tiles").score, abs=0.02)
    assert (tmp_path / "fp16" / "encoder.bin").stat().st_size < 0.6 * (bundle / "encoder.bin").stat().st_size
    with pytest.raises(FileExistsError, match="nothing was changed"):
        write_bundle(model, converted(bundle), tmp_path / "fp16", "fp16")
    with pytest.raises(ValueError, match="only int8, needs photos"):
        export_bundle(trained, tmp_path / "int8", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["banks", "fp16"]


def test_eight_bits_are_another_encoder(bundle: Path, trained: Path, good: list[Path], tmp_path: Path) -> None:
    written = write_bundle(load_model(trained), converted(bundle), tmp_path / "int8", "int8", good)
    eight = ResADInferencer(written, banks=tmp_path / "banks")
    assert (tmp_path / "int8" / "encoder.bin").stat().st_size < 0.4 * (bundle / "encoder.bin").stat().st_size
    eight.enroll("tiles", good[:2])
    assert 0 < eight.predict(good[3], "tiles").score < 1
    with pytest.raises(BankError, match="another model or precision"):
        ResADInferencer(bundle, banks=tmp_path / "banks").bank("tiles")


def test_bfloat16_is_for_the_backbone_alone(
    bundle: Path, trained: Path, good: list[Path], new: list[Path], tmp_path: Path
) -> None:
    """Banks are its own; scores differ a little where this CPU has bfloat16, and by rounding elsewhere."""
    written = write_bundle(load_model(trained), converted(bundle), tmp_path / "bf16", "bf16")
    reduced = ResADInferencer(written, banks=tmp_path / "banks")
    full = ResADInferencer(bundle, banks=tmp_path / "full")
    for inferencer in (reduced, full):
        inferencer.enroll("tiles", good[:2], false_alarm_rate=None)
    with pytest.raises(BankError, match="another model or precision"):
        ResADInferencer(bundle, banks=tmp_path / "banks").bank("tiles")
    with Image.open(new[0]) as image:
        pixels = np.asarray(image.convert("RGB"))[None]
    apart = max(
        float(np.abs(a - b).max() / np.abs(b).max())
        for a, b in zip(reduced.encode(pixels), full.encode(pixels), strict=True)
    )
    has = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert (apart > 1e-3) == has, "weights of 16 bits change less than that"
    assert apart < 0.1
    for photo in new:
        assert full.predict(photo, "tiles").score == pytest.approx(reduced.predict(photo, "tiles").score, abs=0.05)


def test_the_model_is_named_by_its_weights(trained: Path) -> None:
    one, other = load_model(trained), load_model(trained)
    assert model_hash(one) == model_hash(other)
    other.model.bank.fill(Features([torch.rand(1, count, 2, 2) for count in (64, 128, 256)]))
    assert model_hash(one) == model_hash(other), "a bank is not part of the model"
    with torch.no_grad():
        next(other.model.encoder.backbone.parameters()).add_(1e-3)
    assert model_hash(one) != model_hash(other)


def test_models_that_score_differently_have_different_names(trained_plus: Path, tmp_path: Path) -> None:
    """Settings without weights of their own count too: banks carry raw thresholds."""
    names = {model_hash(load_model(trained_plus))}
    for name, value in (("efdm", 0.3), ("abnormal_gaussian", False), ("match", "l2"), ("residual", "difference")):
        content = torch.load(trained_plus, weights_only=True)
        content["hyper_parameters"][name] = value
        rewrite(content, tmp_path / "other.ckpt")
        names.add(model_hash(load_model(tmp_path / "other.ckpt")))
    assert len(names) == 5


def test_a_bundle_has_the_threshold_of_the_source(trained: Path, bundle: Path, products: Path, tmp_path: Path) -> None:
    """Not that of the product that was calibrated in the checkpoint: a bundle is for all products."""
    engine = quiet_engine(tmp_path)
    calibrated = ResAD(checkpoint=trained, k_shot=4, false_alarm_rate=0.05, visualizer=False)
    engine.fit(calibrated, datamodule=product(products, "tiles"))
    model = load_model(engine.best_model_path)
    assert not torch.isnan(model.post_processor.product_threshold)
    written = ResADInferencer(write_bundle(model, converted(bundle), tmp_path / "bundle", "fp32")).manifest
    expected = ResADInferencer(bundle).manifest
    assert written.score == expected.score
    assert written.map == expected.map


def test_a_damaged_checkpoint_is_one_sentence(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.ckpt").write_bytes(trained.read_bytes()[:50_000])
    with pytest.raises(ValueError, match=r"cut\.ckpt is damaged or no trained ResAD file \(50000 bytes\)"):
        export_bundle(tmp_path / "cut.ckpt", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_enrollment_depends_on_the_photos_alone(inferencer: ResADInferencer, good: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.png"
    shutil.copy(good[0], copy)
    files = {}
    for name, photos in (("a", good[:3]), ("b", [good[2], good[0], good[1]]), ("c", [*good[:3], copy])):
        inferencer.enroll(name, photos)
        files[name] = load_file(inferencer.banks / f"{name}.safetensors")
    inferencer.enroll("d", good[2:3])
    inferencer.add("d", good[:2])
    files["d"] = inferencer.bank("d").arrays
    inferencer.add("d", good[3:4])
    inferencer.remove("d", good[3].name)
    files["e"] = inferencer.bank("d").arrays
    for arrays in files.values():
        assert all(np.array_equal(arrays[key], files["a"][key]) for key in files["a"])
    assert [each.sha256 for each in inferencer.bank("a").references] == [
        each.sha256 for each in inferencer.bank("b").references
    ]


def test_nothing_is_written_unless_all_is_well(inferencer: ResADInferencer, good: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(good[0].read_bytes()[:200])
    for name, photos, message in (
        ("tiles", [good[0], broken], "broken.png: unreadable"),
        ("tiles", [], "at least one good photo"),
        ("tiles", [tmp_path / "none.png"], "no such file"),
        ("../tiles", good[:1], "cannot be the name"),
        (".tiles", good[:1], "cannot be the name"),
        ("a/b", good[:1], "cannot be the name"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            inferencer.enroll(name, photos)
    assert inferencer.products == []
    assert not inferencer.banks.exists()
    inferencer.enroll("tiles", good[:1])
    before = (inferencer.banks / "tiles.safetensors").read_bytes()
    with pytest.raises(ValueError, match="enrolled already"):
        inferencer.enroll("tiles", good[1:2])
    with pytest.raises(PhotoError):
        inferencer.add("tiles", [broken])
    with pytest.raises(ValueError, match="Enrolled: tiles"):
        inferencer.predict(good[0], "pill")
    assert (inferencer.banks / "tiles.safetensors").read_bytes() == before
    assert [path.name for path in inferencer.banks.glob("[!.]*")] == ["tiles.safetensors"]
    inferencer.remove("tiles")
    assert inferencer.products == []


def test_broken_banks_are_refused(inferencer: ResADInferencer, good: list[Path]) -> None:
    bank = inferencer.enroll("tiles", good[:2])
    path = inferencer.banks / "tiles.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BankError, match="truncated or no bank"):
        inferencer.predict(good[0], "tiles")
    path.write_bytes(whole[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(BankError, match="altered"):
        inferencer.predict(good[0], "tiles")
    save_file(bank.arrays, path)
    with pytest.raises(BankError, match="no bank of this version"):
        inferencer.predict(good[0], "tiles")
    rows = bank.arrays["rows_1"]
    for arrays, message in (
        ({"rows_1": np.where(rows == rows[0, 0], np.float32("nan"), rows)}, "NaN"),
        ({"rows_1": np.concatenate([np.zeros_like(rows[:1]), rows[1:]])}, "rows of zeros"),
        ({"rows_1": rows * np.float32(1e20)}, "huge rows"),
        ({"rows_1": rows[:-1]}, "level 1 has float32"),
        ({"rows_1": rows.astype(np.float64)}, "level 1 has float64"),
    ):
        Bank("tiles", bank.encoder, bank.references, bank.arrays | arrays).save(path)
        with pytest.raises(BankError, match=message):
            inferencer.predict(good[0], "tiles")
    Bank("tiles", "f" * 64 + "/float", bank.references, bank.arrays).save(path)
    with pytest.raises(BankError, match=r"another model or precision.*enroll again"):
        inferencer.predict(good[0], "tiles")
    path.write_bytes(whole)
    assert 0 < inferencer.predict(good[0], "tiles").score < 1, "the file is read again when it has changed"


def test_a_bank_that_another_process_wrote_is_noticed(
    bundle: Path, inferencer: ResADInferencer, good: list[Path], new: list[Path]
) -> None:
    inferencer.enroll("tiles", good[:2])
    before = inferencer.predict(new[0], "tiles").score
    other = ResADInferencer(bundle, banks=inferencer.banks)
    other.enroll("tiles", good[2:5], replace_existing=True)
    after = inferencer.predict(new[0], "tiles").score
    assert after == other.predict(new[0], "tiles").score != before


def test_broken_bundles_are_refused(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("banks"))
    weights = copy / "detector.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BundleError, match="altered or truncated"):
        ResADInferencer(copy)
    weights.unlink()
    with pytest.raises(BundleError, match="missing"):
        ResADInferencer(copy)
    manifest = copy / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(BundleError, match="has another format than 1"):
        ResADInferencer(copy)
    manifest.write_text("{")
    with pytest.raises(BundleError, match="cannot be read"):
        ResADInferencer(copy)
    with pytest.raises(BundleError, match="no bundle"):
        ResADInferencer(tmp_path)


def test_twenty_products_side_by_side(bundle: Path, good: list[Path], new: list[Path], tmp_path: Path) -> None:
    """Switched at each photo, with room for three in memory: each scores as it does alone."""
    inferencer = ResADInferencer(bundle, banks=tmp_path, most_loaded=3)
    for number in range(20):
        inferencer.enroll(f"product {number}", [good[number % len(good)]])
    expected = {name: inferencer.predict(new[0], name).score for name in inferencer.products}
    assert len(set(expected.values())) == len(good), "products differ by their photos"
    for name in [*expected, *reversed(expected)]:
        assert inferencer.predict(new[0], name).score == expected[name]


def test_thresholds(inferencer: ResADInferencer, trained: Path, good: list[Path], new: list[Path]) -> None:
    """A product's own threshold is raw, 0.5 when normalized, moves the map too, and None gives the model's back."""
    evaluation = TorchReference(load_model(trained), good[:2])
    inferencer.enroll("tiles", good[:2])
    before = inferencer.predict(new[0], "tiles")
    for shift, label in ((-1e-5, True), (1e-5, False)):
        inferencer.set_threshold("tiles", before.raw_score + shift)
        found = inferencer.predict(new[0], "tiles")
        assert found.label is label
        assert found.raw_score == before.raw_score
        assert found.score == pytest.approx(0.5, abs=0.01)
        assert not np.array_equal(found.map, before.map)
        evaluation.model.post_processor.product_threshold.fill_(before.raw_score + shift)
        evaluation.model.post_processor.map_offset.fill_(inferencer.bank("tiles").map_offset)
        np.testing.assert_allclose(found.map, evaluation.predict(new[0]).map, atol=1e-4, err_msg="as in PyTorch")
    with pytest.raises(ValueError, match="finite"):
        inferencer.set_threshold("tiles", float("nan"))
    inferencer.set_threshold("tiles", None)
    assert inferencer.predict(new[0], "tiles").score == before.score


def test_the_default_model(
    trained_default: Path, bundle_default: Path, good: list[Path], new: list[Path], tmp_path: Path
) -> None:
    """Its bank holds joined levels and their keys, which are thinned out together."""
    inferencer = ResADInferencer(bundle_default, banks=tmp_path / "banks")
    inferencer.enroll("tiles", good[:3])
    evaluation = TorchReference(load_model(trained_default), good[:3])
    for photo in new:
        theirs, ours = inferencer.predict(photo, "tiles"), evaluation.predict(photo)
        assert theirs.score == pytest.approx(ours.score, abs=1e-4)
        assert theirs.raw_score == pytest.approx(ours.raw_score, rel=1e-4)
        assert theirs.label == ours.label
        np.testing.assert_allclose(theirs.map, ours.map, atol=1e-3)
    assert inferencer.bank("tiles").rotations == 8, "at random angles: 64 patches of each photo, 32 of rotated copies"
    whole = inferencer.bank("tiles").arrays
    sizes = {name: len(rows) for name, rows in whole.items()}
    assert sizes == {"rows_0": 288, "rows_1": 39, "rows_2": 288, "searched": 288}, "values, neighborhoods, keys"
    assert [len(rows) for rows in inferencer.searched("tiles")] == [160, 32, 160], "half of them, a multiple of 32"
    inferencer.enroll("thin", good[:3], max_patches=50)
    thin, _, keys = inferencer.searched("thin")
    assert len(np.unique(keys, axis=0)) == 50
    for row, key in zip(thin, keys, strict=True):
        places = np.flatnonzero((whole["rows_0"] == row).all(axis=1))
        assert (whole["rows_2"][places] == key).all(axis=1).any()


def test_a_limit_of_patches(inferencer: ResADInferencer, good: list[Path]) -> None:
    inferencer.enroll("tiles", good[:2], max_patches=50)
    inferencer.enroll("again", good[1::-1], max_patches=50)
    one, other = (inferencer.searched(name) for name in ("tiles", "again"))
    assert [len(np.unique(rows, axis=0)) for rows in one] == [50, 50, 32]
    assert all(np.array_equal(rows, others) for rows, others in zip(one, other, strict=True))
    assert 0 < inferencer.predict(good[3], "tiles").score < 1
    clusters = np.repeat(np.eye(4, dtype=np.float32), 25, axis=0)
    assert len(np.unique(clusters[thin_out(clusters, 4)], axis=0)) == 4, "each cluster keeps a row"
    assert np.array_equal(padded(clusters[:5], 8)[5:], clusters[[0, 0, 0]])
