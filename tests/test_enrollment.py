# SPDX-License-Identifier: Apache-2.0

"""Rotated products: what rotating does, when it is done by itself, what is kept of it, and that both runtimes agree."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from anomalib_resad import ResAD
from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.enrollment.coreset import thin_out
from anomalib_resad.enrollment.references import read_references
from anomalib_resad.enrollment.rotations import are_rotated, check_rotations, enrolled_rows, kept_rows, rotated
from anomalib_resad.export.edge_bundle import load_model
from anomalib_resad.export.parity import TorchReference
from anomalib_resad.method.bank_record import BankRecord
from anomalib_resad.method.features import as_list
from anomalib_resad.reference_rows import as_tensor, encode_photo, leave_one_out, reference_rows
from tests.conftest import product, quiet_engine
from tests.test_edge_commands import resad

SIDE = 64


def part(degrees: float) -> np.ndarray:
    """A key-shaped part on a plain ground, rotated."""
    image = Image.new("RGB", (SIDE, SIDE), (90, 90, 90))
    draw = ImageDraw.Draw(image)
    draw.rectangle((10, 28, 54, 34), fill=(220, 200, 40))
    draw.rectangle((44, 34, 54, 46), fill=(60, 160, 220))
    draw.ellipse((6, 20, 22, 42), fill=(200, 60, 60))
    return np.asarray(image.rotate(degrees, resample=Image.Resampling.BILINEAR, fillcolor=(90, 90, 90)))


def patches(pixels: np.ndarray) -> list[np.ndarray]:
    """Patches of 8 x 8 pixels as they are, and the same again as keys."""
    height, width = (side // 8 * 8 for side in pixels.shape[:2])
    grid = pixels[:height, :width].reshape(height // 8, 8, width // 8, 8, 3).swapaxes(1, 2)
    rows = grid.reshape(-1, 8 * 8 * 3).astype(np.float32)
    return [rows, rows - 127.5]


def test_rotating_keeps_the_size_and_goes_counterclockwise() -> None:
    photo = part(0)
    assert np.array_equal(rotated(photo, 0), photo)
    for angle in (90, 180, 270):
        assert np.array_equal(rotated(photo, angle), np.rot90(photo, angle // 90))
    inside = np.hypot(*(np.indices((SIDE, SIDE)) - (SIDE - 1) / 2)) < SIDE / 2 - 2
    difference = rotated(photo, 30)[inside].astype(float) - part(30)[inside]
    assert np.abs(difference).mean() < 1
    for shape in ((40, 200, 3), (200, 40, 3), (9, 8, 3)):
        wide = np.random.default_rng(0).integers(100, 200, shape, dtype=np.uint8)
        for angle in (45, 90):
            found = rotated(wide, angle)
            assert found.shape == shape
            assert found.min() >= 100, "corners show the photo's mirror image, nothing black"


def test_only_products_that_are_rotated_are_rotated() -> None:
    noise = np.random.default_rng(0)

    def photos(angles: list[float]) -> list[np.ndarray]:
        return [np.clip(part(angle) + noise.normal(0, 4, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8) for angle in angles]

    for angles, expected in (([0, 90, 180, 275], 8), ([3, 88], 8), ([0, 0, 0, 0], 1), ([1, -1], 1), ([90], 1)):
        _, orientations = enrolled_rows(photos(angles), patches, True)
        assert orientations == expected, angles
    same = patches(part(0))[-1]
    assert not are_rotated([same, same], [[same] * 4] * 2), "copies of one photo say nothing"


@pytest.mark.parametrize(("count", "looked_at"), [(1, 0), (2, 2), (3, 2), (4, 4), (5, 4)])
def test_few_photos_are_rotated_to_find_out(count: int, looked_at: int) -> None:
    seen = 0

    def encode(pixels: np.ndarray) -> list[np.ndarray]:
        nonlocal seen
        seen += 1
        return patches(pixels)

    photos = [part(0) + np.uint8(number) for number in range(count)]
    _, orientations = enrolled_rows(photos, encode, True)
    assert orientations == 1
    assert seen == count + looked_at * 3


def test_each_pair_of_photos_has_a_say() -> None:
    """Distances are those of unit vectors: patches of all photos lie 1 apart, and rotating a pair brings them to 0."""
    photos = [np.eye(5, dtype=np.float32)[[number]] for number in range(4)]
    as_they_are, near = [np.eye(5, dtype=np.float32)[[4]]] * 2, np.eye(5, dtype=np.float32)
    assert not are_rotated(photos, [as_they_are] * 4)
    assert not are_rotated(photos, [as_they_are] * 2), "the first pair alone"
    assert are_rotated(photos, [as_they_are, as_they_are, [as_they_are[0], near], [as_they_are[0], near]])
    # 1 of 4 photos is brought near by one pair of two: 7 of 8 distances stay, more than 85 %.
    assert not are_rotated(photos, [as_they_are, as_they_are, [as_they_are[0], near[[0]]], as_they_are])
    assert are_rotated(photos, [[as_they_are[0], near[[3]]], as_they_are, [as_they_are[0], near[[0]]], as_they_are])


@pytest.mark.parametrize("keyed", [True, False])
def test_own_patches_come_first_then_those_of_copies_that_they_lack(keyed: bool) -> None:
    seen: list[np.ndarray] = []

    def encode(pixels: np.ndarray) -> list[np.ndarray]:
        seen.append(pixels)
        values, keys = patches(pixels)
        return [values, keys] if keyed else [values[:32], keys]

    photos = [part(20), part(65), part(140)]
    rows, orientations = enrolled_rows(photos, encode, keyed, 4)
    assert orientations == 4
    assert len(seen) == 12
    for photo, levels in zip(photos, rows, strict=True):
        for number, (level, own) in enumerate(zip(levels, encode(photo), strict=True)):
            assert len(level) == kept_rows(len(own), 4) == len(own) * 3 // 2
            assert np.array_equal(level[: len(own)], own)
            copies = np.concatenate([encode(rotated(photo, angle))[number] for angle in (90, 180, 270)])
            assert all((copies == row).all(axis=1).any() for row in level[len(own) :])
        if keyed:
            assert np.array_equal(levels[0] - 127.5, levels[1]), "values and their keys are kept together"
    alone, _ = enrolled_rows(photos[:1], encode, keyed, 4)
    assert all(np.array_equal(a, b) for a, b in zip(alone[0], rows[0], strict=True)), "each photo stands for itself"
    plain, orientations = enrolled_rows(photos, encode, keyed, 1)
    assert orientations == 1
    assert all(np.array_equal(a, b) for a, b in zip(plain[1], encode(photos[1]), strict=True))


def test_what_lies_beside_needs_no_row() -> None:
    clusters = np.repeat(np.eye(4, dtype=np.float32), 25, axis=0)
    kept = thin_out(clusters, 2, beside=clusters[[0, 30]])
    assert sorted(clusters[kept].argmax(axis=1)) == [2, 3]
    assert len(thin_out(clusters, 200, beside=clusters[:1])) == 100
    assert clusters[thin_out(clusters, 0, beside=clusters[:1])].shape == (0, 4), "half of a single patch is none"


@pytest.mark.parametrize("rotations", [0, 37, 2.5, "often", None])
def test_impossible_rotations_are_refused(rotations: object) -> None:
    with pytest.raises(ValueError, match="rotations="):
        check_rotations(rotations)
    if rotations is not None:
        with pytest.raises(ValueError, match="rotations="):
            ResAD("resnet18", pre_trained=False, rotations=rotations)  # type: ignore[arg-type]


# -- with the model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rotated_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "parts" / "train" / "good"
    folder.mkdir(parents=True)
    for index, angle in enumerate((0, 100, 190, 260)):
        Image.fromarray(part(angle)).save(folder / f"{index}.png")
    return folder


def enroll(checkpoint: Path, references: Path, folder: Path, **settings: object) -> ResAD:
    model = ResAD(checkpoint=checkpoint, references=references, visualizer=False, **settings)  # type: ignore[arg-type]
    quiet_engine(folder).predict(model, data_path=references, return_predictions=False)
    return model


def test_enrolled_product_says_how_it_was_rotated(
    trained_default: Path, rotated_parts: Path, tmp_path: Path, products: Path
) -> None:
    """The default looks at the photos; a number is obeyed; either is the checkpoint's unless given."""
    for given, expected in (({}, 8), ({"rotations": 1}, 1), ({"rotations": 3}, 3)):
        model = enroll(trained_default, rotated_parts, tmp_path, k_shot=4, false_alarm_rate=0.2, **given)
        bank = model.model.bank
        assert bank.record.rotations == expected
        patches, neighborhoods = (4 * kept_rows(count, expected) for count in (64, 9))
        assert [len(level) for level in as_list(bank.rows)] == [patches, neighborhoods, patches]
        assert len(leave_one_out(model.model, model.pre_processor).scores) == 4
    path = tmp_path / "three.ckpt"
    engine = quiet_engine(tmp_path)
    engine.fit(model, datamodule=product(products, "tiles"))
    engine.trainer.save_checkpoint(path)
    assert ResAD(checkpoint=path).hparams["rotations"] == 3
    assert ResAD.load_from_checkpoint(path).hparams["rotations"] == 3
    assert ResAD(checkpoint=path, rotations="auto").hparams["rotations"] == "auto"


@pytest.mark.parametrize(("given", "expected"), [({}, 1), ({"rotations": "auto"}, 8), ({"rotations": 3}, 3)])
def test_restored_preset_rotates_nothing_unless_asked(
    given: dict[str, object], expected: int, trained: Path, rotated_parts: Path, tmp_path: Path
) -> None:
    """`--ckpt_path` restores the model after its callbacks are made, and the class's own default is "auto"."""
    model = ResAD("resnet18", pre_trained=False, references=rotated_parts, visualizer=False, **given)  # type: ignore[arg-type]
    quiet_engine(tmp_path).predict(model, data_path=rotated_parts, ckpt_path=trained, return_predictions=False)
    assert model.hparams["variant"] == "resad"
    assert model.hparams["rotations"] == given.get("rotations", 1)
    assert model.model.bank.record.rotations == expected


def test_presets_rotate_nothing_unless_asked(trained: Path, rotated_parts: Path, tmp_path: Path) -> None:
    assert enroll(trained, rotated_parts, tmp_path).model.bank.record.rotations == 1
    model = enroll(trained, rotated_parts, tmp_path, rotations="auto", k_shot=4)
    assert model.model.bank.record.rotations == 8
    assert [len(level) for level in model.model.bank.rows.values] == [4 * kept_rows(side**2, 8) for side in (16, 8, 4)]


def test_a_reference_scores_against_others_as_its_photo_does(trained_default: Path, rotated_parts: Path) -> None:
    """Photo in, score out, with the others' rotated copies in the bank."""
    model = ResAD(checkpoint=trained_default).eval()
    paths = sorted(rotated_parts.glob("*.png"))
    photos = list(read_references(paths).values())
    rows, orientations = reference_rows(model.model, model.pre_processor, photos, "auto")
    model.model.bank.store(rows, BankRecord(photos=4, rotations=orientations))
    scores = leave_one_out(model.model, model.pre_processor).scores
    others, _ = reference_rows(model.model, model.pre_processor, photos[1:], orientations)
    others = model.model.bank.thin_out(others, 3, neighborhoods=orientations == 1)
    features = encode_photo(model.model, model.pre_processor, as_tensor(photos[0]))
    with torch.no_grad():
        found = model.model.detect(features, others, (64, 64)).pred_score.item()
    assert scores[0] == pytest.approx(found, abs=1e-5)
    model.model.bank.store(rows, BankRecord(photos=4, rotations=1))
    with pytest.raises(ValueError, match=r"4 whole photos of \[.*\] patches in 1 orientations"):
        leave_one_out(model.model, model.pre_processor)


def test_rotations_that_are_asked_for_later_are_made(
    trained_default: Path, rotated_parts: Path, tmp_path: Path
) -> None:
    """A bank of the same photos, each as it is, is not what was asked for."""
    engine, data = quiet_engine(tmp_path), product(rotated_parts.parents[2], "parts")
    engine.fit(ResAD(checkpoint=trained_default, rotations=1, references=rotated_parts, visualizer=False), data)
    for given, expected in ((1, 1), ("auto", 8)):
        model = ResAD(checkpoint=engine.best_model_path, rotations=given, references=rotated_parts, visualizer=False)  # type: ignore[arg-type]
        quiet_engine(tmp_path / "again").predict(model, data_path=rotated_parts, return_predictions=False)
        assert model.model.bank.record.rotations == expected
        assert model.model.bank.record.rotations_asked == given


def test_parity_of_a_rotated_product(
    trained_default: Path, bundle_default: Path, rotated_parts: Path, tmp_path: Path
) -> None:
    """Both runtimes choose the same copies' patches; test_export does the same for a file with the bank inside."""
    photos = sorted(rotated_parts.glob("*.png"))
    inferencer = ResADInferencer(bundle_default, banks=tmp_path)
    inferencer.enroll("parts", photos[:3])
    evaluation = TorchReference(load_model(trained_default), photos[:3])
    for photo in photos:
        theirs, ours = inferencer.predict(photo, "parts"), evaluation.predict(photo)
        assert theirs.score == pytest.approx(ours.score, abs=1e-4)
        assert theirs.label == ours.label


def test_the_edge_rotates_as_evaluation_does(
    trained_default: Path, bundle_default: Path, rotated_parts: Path, tmp_path: Path
) -> None:
    inferencer = ResADInferencer(bundle_default, banks=tmp_path)
    assert inferencer.manifest.rotations == "auto"
    photos = sorted(rotated_parts.glob("*.png"))
    bank = inferencer.enroll("parts", photos)
    assert bank.rotations == 8
    model = ResAD(checkpoint=trained_default).eval()
    ordered = [photos[[path.name for path in photos].index(each.name)] for each in bank.references]
    rows, _ = reference_rows(model.model, model.pre_processor, list(read_references(ordered).values()), "auto")
    for number, level in enumerate(as_list(rows)):
        np.testing.assert_allclose(bank.arrays[f"rows_{number}"], level.numpy(), atol=1e-4)
    again = inferencer.enroll("again", [photos[2], *photos[::-1]])
    assert all(np.array_equal(bank.arrays[name], again.arrays[name]) for name in bank.arrays), "order, duplicates"
    # Photos that are added follow those that are there.
    inferencer.enroll("some", photos[:3], rotations=8)
    added = inferencer.add("some", photos[3:])
    assert all(np.array_equal(bank.arrays[name], added.arrays[name]) for name in bank.arrays)
    inferencer.remove("some", photos[0].name)
    left = inferencer.bank("some").arrays
    assert {len(level) for name, level in left.items() if name != "rows_1"} == {3 * kept_rows(64, 8)}
    assert len(left["rows_1"]) == 3 * kept_rows(9, 8), "neighborhoods"
    told = resad(
        "enroll",
        "--bundle",
        bundle_default,
        "--banks",
        tmp_path,
        "--product",
        "told",
        "--photos",
        rotated_parts,
        "--rotations",
        2,
    )
    assert "4 photos in 2 orientations" in told
    assert inferencer.bank("told").rotations == 2
    assert "rotations=0" in resad(
        "enroll",
        "--bundle",
        bundle_default,
        "--banks",
        tmp_path,
        "--product",
        "none",
        "--photos",
        rotated_parts,
        "--rotations",
        0,
        status=2,
    )
    assert "none" not in inferencer.products
