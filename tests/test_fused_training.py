# SPDX-License-Identifier: Apache-2.0

"""How the default model is trained: synthetic defects, features that are kept, the target enrolled after the keys."""

import copy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from lightning.pytorch import Callback, seed_everything
from PIL import Image
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms import v2

from anomalib_resad import ResAD
from anomalib_resad.method.features import to_rows
from anomalib_resad.method.head import EvidenceHead
from anomalib_resad.method.presets import PRESETS
from anomalib_resad.training.optimizer import adam_with_milestones
from anomalib_resad.training.source_photos import SourceBatch, augments
from anomalib_resad.training.synthetic_defects import is_painted, paint, paint_photo
from tests.conftest import DEFAULT, cross_category, product, quiet_engine

# -- synthetic defects ------------------------------------------------------------------------------------------------


def test_painted_photos_differ_in_the_mask_alone() -> None:
    torch.manual_seed(0)
    generator = PerlinAnomalyGenerator(None, probability=1.0)
    image = torch.rand(3, 64, 48)
    kinds = set()
    for _ in range(12):
        painted, mask = paint(generator, image)
        assert mask.shape == (64, 48)
        assert 0 < mask.float().mean() < 1
        assert 0 <= painted.min() <= painted.max() <= 1
        changed = (painted != image).any(dim=0)
        assert not (changed & ~mask).any()
        assert changed.any()
        kinds.add(round(float((painted - image).abs().mean()), 3))
    assert len(kinds) > 6


def test_impossible_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"synthetic=1\.5"):
        ResAD(**DEFAULT, synthetic=1.5)


@pytest.mark.parametrize("k_shot", [0, -1])
def test_impossible_numbers_of_references_are_refused_at_once(k_shot: int) -> None:
    with pytest.raises(ValueError, match=f"k_shot={k_shot} must be a whole number of at least 1"):
        ResAD(**DEFAULT | {"k_shot": k_shot})


def test_each_photo_has_one_painted_version_and_epochs_differ_in_which_are_shown() -> None:
    image = torch.rand(3, 32, 32)
    first, again, other = (paint_photo(image, path, 0) for path in ("a.png", "a.png", "b.png"))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[1], other[1])
    torch.manual_seed(1)
    before = torch.rand(1)
    torch.manual_seed(1)
    paint_photo(image, "a.png", 0)
    assert torch.equal(torch.rand(1), before), "the generators of the training are left alone"
    paths = [f"{index}.png" for index in range(400)]
    shown = [[is_painted(0, epoch, path, 0.5) for path in paths] for epoch in range(2)]
    assert shown[0] != shown[1]
    assert 150 < sum(shown[0]) < 250
    assert not any(is_painted(0, 0, path, 0.0) for path in paths)


# -- training ---------------------------------------------------------------------------------------------------------


class Watch(Callback):
    """What training sees: losses, how many pictures are kept, and in which epochs photos are painted."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.kept = 0
        self.defective: list[int] = []

    def on_train_start(self, trainer: Any, pl_module: ResAD) -> None:
        del trainer
        original = pl_module.source.prepare

        def prepare(batch: SourceBatch, epoch: int) -> tuple:
            found = original(batch, epoch)
            labels = [photo.label for photo in batch.photos]
            self.defective += [int(mask.any()) - label for mask, label in zip(found[2], labels, strict=True)]
            return found

        pl_module.source.prepare = prepare  # type: ignore[method-assign]

    def on_train_epoch_end(self, trainer: Any, pl_module: ResAD) -> None:
        self.kept = len(pl_module.source.cache)
        self.losses.append(float(trainer.callback_metrics["train_head"]))


def fit(products: Path, folder: Path, epochs: int = 3, **settings: Any) -> tuple[ResAD, Watch, int]:
    seed_everything(0, verbose=False)
    model, watch, photos = ResAD(**DEFAULT, visualizer=False, **settings), Watch(), []
    model.model.encoder.backbone.register_forward_hook(lambda _, inputs, __: photos.append(len(inputs[0])))
    quiet_engine(folder, max_epochs=epochs, callbacks=[watch], limit_val_batches=0).fit(
        model, datamodule=cross_category(products)
    )
    return model, watch, sum(photos)


def head_of(model: ResAD) -> EvidenceHead:
    assert isinstance(model.model.estimator, EvidenceHead)
    return model.model.estimator


def test_kept_features_change_the_cost_and_nothing_else(products: Path, tmp_path: Path) -> None:
    kept, watch, encoded = fit(products, tmp_path / "kept")
    computed, other, more = fit(products, tmp_path / "computed", cache_gb=0.0)
    assert watch.kept == 2 * (8 + 8 + 2), "good photos, their painted versions, defective photos"
    assert other.kept == 0
    target = 2 + 2 * 7  # two references in eight orientations
    assert encoded <= 1 + watch.kept + target < more, "each picture needs the backbone once"
    assert watch.defective == other.defective
    assert watch.losses == pytest.approx(other.losses, rel=1e-3)
    for name, value in head_of(kept).state_dict().items():
        torch.testing.assert_close(value, head_of(computed).state_dict()[name], rtol=1e-2, atol=1e-3, msg=name)


def test_each_photo_is_read_once(products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its own step, as a reference of others, and for the keys; in three epochs."""
    opened: Counter[str] = Counter()
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (opened.update([str(path)]), read_bytes(path))[1])
    model, _, _ = fit(products, tmp_path)
    shown = {path for path in opened if "/ground_truth/" not in path}
    trained = {path for path in shown if "/grain/" in path or "/pill/" in path}
    sources = [path for name in ("grain", "pill") for path in (products / name).glob("t*/*/*.png")]
    assert trained == {str(path) for path in sources}, "those that are held out are checked"
    assert all(opened[path] == 1 for path in trained)
    assert model.source.cache.bytes == 0, "freed at the end"


def test_the_datamodule_is_given_back(products: Path, tmp_path: Path) -> None:
    data = cross_category(products)
    model = ResAD(**DEFAULT, visualizer=False)
    quiet_engine(tmp_path, max_epochs=1, limit_val_batches=0).fit(model, datamodule=data)
    assert type(data.train_data).__name__ == "SamplesDataset"
    assert data.train_data[0].image.shape[0] == 3


def test_each_image_gets_references_of_its_own(products: Path, tmp_path: Path) -> None:
    """Through the real training: the features that a step works on, traced back to their photos."""
    seed_everything(0, verbose=False)
    model = ResAD(**DEFAULT, visualizer=False)
    seen: dict[tuple[int, str], list[str]] = {}

    class Spy(Callback):
        def on_train_start(self, trainer: Any, pl_module: ResAD) -> None:
            del trainer
            source, prepare = pl_module.source, pl_module.source.prepare

            def watched(batch: SourceBatch, epoch: int) -> tuple:
                features, references, mask = prepare(batch, epoch)
                photos = {path: source.cache.get(path) for path in source._pools.category_of if source.cache.get(path)}  # type: ignore[union-attr]
                first_rows = {path: kept.features.values[0][0, :, 0, 0] for path, kept in photos.items()}  # type: ignore[union-attr]
                for photo, rows in zip(batch.photos, references, strict=True):
                    starts = rows.values[0][:: len(rows.values[0]) // 2]
                    names = [path for row in starts for path, first in first_rows.items() if torch.equal(first, row)]
                    seen[epoch, photo.path] = names
                return features, references, mask

            source.prepare = watched  # type: ignore[method-assign]

    quiet_engine(tmp_path, max_epochs=2, callbacks=[Spy()], limit_val_batches=0).fit(
        model, datamodule=cross_category(products)
    )
    assert len(seen) == 2 * 2 * (8 + 2)
    for (_, path), references in seen.items():
        assert len(set(references)) == 2, "two different photos"
        assert path not in references
        assert all(Path(reference).parent.name == "good" for reference in references)
        assert all(Path(reference).parents[2] == Path(path).parents[2] for reference in references), "of its product"
    assert len({tuple(references) for references in seen.values()}) > 20, "drawn for each image and epoch"
    assert any(seen[0, path] != seen[1, path] for _, path in seen)


def test_learning_rate_and_weight_decay(products: Path, tmp_path: Path) -> None:
    """Adam; a tenth after 70 % and again after 90 % of the epochs; codes are not decayed."""
    rates: list[float] = []
    groups: list[dict] = []

    class Rates(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: ResAD) -> None:
            del pl_module
            (optimizer,) = trainer.optimizers
            assert isinstance(optimizer, torch.optim.Adam)
            rates.append(optimizer.param_groups[0]["lr"])
            groups[:] = optimizer.param_groups

    engine = quiet_engine(tmp_path, max_epochs=10, callbacks=[Rates()], limit_val_batches=0, limit_train_batches=1)
    engine.fit(ResAD(**DEFAULT, visualizer=False), datamodule=cross_category(products))
    assert rates == pytest.approx([3e-4] * 7 + [3e-5] * 2 + [3e-6])
    assert [group["weight_decay"] for group in groups] == [5e-4]
    for variant, expected in (("resad", [5e-4]), ("resad++", [1e-3, 0.0])):
        model = ResAD(**DEFAULT, variant=variant, coupling_layers=1, weight_decay=expected[0])
        decays = adam_with_milestones(model.model.estimator, model.hparams, 100)["optimizer"]  # type: ignore[index]
        assert [group["weight_decay"] for group in decays.param_groups] == expected


def test_keys_are_learned_once_and_kept(products: Path, tmp_path: Path) -> None:
    first, _, _ = fit(products, tmp_path / "first", epochs=1)
    second, _, _ = fit(products, tmp_path / "second", epochs=1)
    assert first.model.encoder.join is not None
    assert second.model.encoder.join is not None
    assert first.model.encoder.join.learned
    torch.testing.assert_close(first.model.encoder.join.directions, second.model.encoder.join.directions)
    untrained = ResAD(**DEFAULT, visualizer=False).model.encoder.join
    assert untrained is not None
    assert not torch.allclose(first.model.encoder.join.directions, untrained.directions, atol=0.1)


def test_the_target_is_enrolled_with_the_keys_that_were_learned(trained_default: Path) -> None:
    """Not with those that the training began with."""
    model = ResAD.load_from_checkpoint(trained_default).model
    (values,), keys, _ = model.bank.rows
    join = model.encoder.join
    assert join is not None
    assert join.learned
    assert keys is not None
    expected = nn.functional.normalize(values @ join.directions.T, dim=1)
    torch.testing.assert_close(expected, keys, rtol=0, atol=1e-3)  # both are kept in half precision


def test_augmented_images_are_not_kept() -> None:
    """anomalib's own resizing is no augmentation."""
    for transform, expected in (
        (None, False),
        (v2.Resize((64, 64)), False),
        (v2.Compose([v2.Resize((64, 64))]), False),
        (v2.RandomHorizontalFlip(), True),
        (v2.Compose([v2.Resize((64, 64)), v2.ColorJitter()]), True),
    ):
        assert augments(SimpleNamespace(augmentations=transform)) == expected  # type: ignore[arg-type]


def test_little_room_keeps_what_fits(products: Path, tmp_path: Path) -> None:
    """448 channels of 8 x 8 patches of 4 bytes and their keys are 0.13 MB: room for some of the photos."""
    _, watch, few = fit(products, tmp_path, epochs=1, cache_gb=5e-4)
    assert watch.kept == 3
    _, _, none = fit(products, tmp_path, epochs=1, cache_gb=0.0)
    assert few != none


def test_real_and_synthetic_defects_stand_beside_each_other(products: Path, tmp_path: Path) -> None:
    _, watch, _ = fit(products, tmp_path, epochs=2)
    assert set(watch.defective) == {0, 1}, "some good photos are painted, real defects stay"
    _, watch, _ = fit(products, tmp_path, epochs=1, synthetic=0.0)
    assert set(watch.defective) == {0}, "nothing is painted"


def test_estimator_comes_from_the_checkpoint(trained: Path, trained_default: Path) -> None:
    """Whatever the variant of the constructor; the distance of the same features can be asked for."""
    assert ResAD(checkpoint=trained).hparams["estimator"] == "flow"
    assert ResAD(checkpoint=trained_default, variant="resad").hparams["estimator"] == "head"
    distance = ResAD(checkpoint=trained_default, estimator="distance")
    assert type(distance.model.estimator).__name__ == "Distance"
    assert distance.hparams["projection"] == PRESETS["fused"]["projection"]
    assert not distance.post_processor.has_statistics, "a threshold belongs to the scores that it was learned on"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="made with estimator='head', not 'flow'"):
        ResAD(checkpoint=trained_default, estimator="flow")


def draw_spotted(root: Path, name: str, seed: int, grain: int) -> None:
    """Four good and four defective photos of noise with light and dark spots, which are normal; red ones are not."""
    rng, red = np.random.default_rng(seed), (230, 40, 40)
    for folder, count in (("train/good", 4), ("test/good", 2), ("ground_truth/red", 0), ("test/red", 4)):
        (root / name / folder).mkdir(parents=True)
        for index in range(count):
            noise = Image.fromarray(rng.integers(60, 200, (64 // grain, 64 // grain), dtype=np.uint8))
            gray = np.asarray(noise.resize((64, 64), Image.Resampling.BILINEAR))
            pixels, mask = np.repeat(gray[:, :, None], 3, axis=2), np.zeros((64, 64), np.uint8)
            for color in ((230, 230, 230), (20, 20, 20), *([red] if folder == "test/red" else [])):
                row, column = rng.integers(4, 48, 2)
                pixels[row : row + 12, column : column + 12] = color
                mask[row : row + 12, column : column + 12] = 255 if color == red else 0
            Image.fromarray(pixels).save(root / name / folder / f"{index}.png")
            if folder == "test/red":
                Image.fromarray(mask).save(root / name / "ground_truth" / "red" / f"{index}_mask.png")


def test_training_raises_the_quality_on_a_product_that_it_never_saw(tmp_path: Path) -> None:
    """Pixel AUROC of the classifier's logit: for it to rise, labels, references and masks all have to be right."""
    root = tmp_path / "spotted"
    for seed, (name, grain) in enumerate((("fine", 2), ("coarse", 8), ("medium", 4))):
        draw_spotted(root, name, seed, grain)
    target = product(root, "medium")
    target.setup()
    photos = [target.test_data[index] for index in range(len(target.test_data))]

    def quality(model: ResAD) -> float:
        model.eval()
        logits, masks = [], []
        for photo in photos:
            with torch.no_grad():
                features = model.model.encode(model.pre_processor.transform(photo.image[None]))  # type: ignore[union-attr, operator]
                residuals = to_rows(features.values[0] - model.model.bank(features)[0])
                logits.append(head_of(model).evidence(residuals, torch.ones(len(residuals), 2))[:, 0])
            grid = features.values[0].shape[-2:]
            masks.append(F.adaptive_max_pool2d(photo.gt_mask[None].float(), grid).flatten())
        return binary_auroc(torch.cat(logits).sigmoid(), torch.cat(masks).int()).item()

    before, after = [], []
    for seed in (0, 3):
        seed_everything(seed, verbose=False)
        model = ResAD(**DEFAULT, lr=3e-3, synthetic=0.0, visualizer=False)
        data = cross_category(root, "fine, coarse", "medium")
        data.val_ratio = 0.0
        engine = quiet_engine(tmp_path, max_epochs=30, limit_val_batches=0)
        untrained = copy.deepcopy(model.model.estimator.state_dict())
        engine.fit(model, datamodule=data)
        after.append(quality(model))
        model.model.estimator.load_state_dict(untrained)
        before.append(quality(model))
    assert np.mean(after) > 0.85
    assert np.mean(after) > np.mean(before) + 0.1
