# SPDX-License-Identifier: Apache-2.0

"""How the default model is trained: synthetic defects, features that are kept, the target enrolled after the keys."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from lightning.pytorch import Callback, seed_everything
from torch import nn
from torchvision.transforms import v2

from anomalib_resad import ResAD
from anomalib_resad.few_shot_references import augments
from anomalib_resad.method.presets import VARIANTS
from anomalib_resad.training.synthetic_defects import SyntheticDefects, paint
from tests.conftest import cross_category, quiet_engine

FUSED: dict[str, Any] = {"backbone": "resnet18", "pre_trained": False, "image_size": (64, 64), "k_shot": 2}


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
        SyntheticDefects(1.5)


# -- training ---------------------------------------------------------------------------------------------------------


class Watch(Callback):
    """What training sees: losses, backbone runs, and which versions of the photos."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.versions: set[str] = set()
        self.kept: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: ResAD, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics.get("train_head", torch.nan)))
        self.versions.update(pl_module.batch_versions or [])

    def on_train_epoch_end(self, trainer: Any, pl_module: ResAD) -> None:
        del pl_module
        references = next(one for one in trainer.callbacks if type(one).__name__ == "FewShotReferences")
        self.kept.append(len(references.cache))
        self.losses.append(float(trainer.callback_metrics["train_head"]))


def fit(products: Path, folder: Path, epochs: int = 3, **settings: Any) -> tuple[ResAD, Watch, int]:
    seed_everything(0, verbose=False)
    model, watch, runs = ResAD(**FUSED, visualizer=False, **settings), Watch(), []
    model.model.backbone.register_forward_hook(lambda *_: runs.append(1))
    quiet_engine(folder, max_epochs=epochs, callbacks=[watch], limit_val_batches=0).fit(
        model, datamodule=cross_category(products)
    )
    return model, watch, len(runs)


def test_kept_features_change_the_cost_and_nothing_else(products: Path, tmp_path: Path) -> None:
    kept, watch, runs = fit(products, tmp_path / "kept")
    computed, other, more_runs = fit(products, tmp_path / "computed", cache_gb=0.0)
    assert watch.kept[-1] > 0 == other.kept[-1]
    good, defective, painted, keys = 2 * 9, 2 * 3, 2 * 9, 2 * 9  # of two source products, less what is held out
    most = good + defective + painted + keys + 8 * kept.hparams["k_shot"]  # target, perhaps turned
    assert runs <= most < more_runs, "each picture needs the backbone once, and once for the keys"
    assert watch.versions == other.versions
    losses = [[value for value in one.losses if value == value] for one in (watch, other)]  # noqa: PLR0124  # NaN
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for name, value in kept.model.head.state_dict().items():  # type: ignore[union-attr]
        torch.testing.assert_close(value, computed.model.head.state_dict()[name], rtol=1e-2, atol=1e-3, msg=name)  # type: ignore[union-attr]


def test_keys_are_learned_once_and_kept(products: Path, tmp_path: Path) -> None:
    first, _, _ = fit(products, tmp_path / "first", epochs=1)
    second, _, _ = fit(products, tmp_path / "second", epochs=1)
    assert first.model.join is not None
    assert second.model.join is not None
    assert first.model.join.learned
    torch.testing.assert_close(first.model.join.directions, second.model.join.directions)
    untrained = ResAD(**FUSED, visualizer=False).model.join
    assert untrained is not None
    assert not torch.allclose(first.model.join.directions, untrained.directions, atol=0.1)


def test_the_target_is_enrolled_with_the_keys_that_were_learned(trained_default: Path) -> None:
    """Not with those that the training began with."""
    model = ResAD.load_from_checkpoint(trained_default).model
    values, keys = model.bank.levels
    assert model.join is not None
    assert model.join.learned
    torch.testing.assert_close(
        nn.functional.normalize(values @ model.join.directions.T, dim=1), keys, rtol=0, atol=1e-5
    )


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
    """4 channels of 8 x 8 patches of 4 bytes and a few keys: room for some of the photos."""
    _, watch, _ = fit(products, tmp_path, epochs=1, cache_gb=5e-4)
    assert 0 < watch.kept[-1] < 8


def test_real_and_synthetic_defects_stand_beside_each_other(products: Path, tmp_path: Path) -> None:
    _, watch, _ = fit(products, tmp_path, epochs=2)
    painted = {name for name in watch.versions if name.endswith(" painted")}
    assert painted
    assert watch.versions - painted
    _, watch, _ = fit(products, tmp_path, epochs=1, synthetic=0.0)
    assert not watch.versions, "nothing is painted"


def test_estimator_comes_from_the_checkpoint(trained: Path, products: Path, tmp_path: Path) -> None:
    """Whatever the variant of the constructor; the distance of the same features can be asked for."""
    assert ResAD(checkpoint=trained).hparams["estimator"] == "flow"
    seed_everything(0, verbose=False)
    engine = quiet_engine(tmp_path, max_epochs=1)
    engine.fit(ResAD(**FUSED, visualizer=False), datamodule=cross_category(products))
    path = Path(engine.best_model_path)
    assert ResAD(checkpoint=path, variant="resad").hparams["estimator"] == "fused"
    distance = ResAD(checkpoint=path, estimator="distance")
    assert distance.model.head is None
    assert distance.hparams["projection"] == VARIANTS["fused"]["projection"]
    assert not distance.post_processor.has_statistics, "a threshold belongs to the scores that it was learned on"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="made with estimator='fused', not 'flow'"):
        ResAD(checkpoint=path, estimator="flow")
