# SPDX-License-Identifier: Apache-2.0

"""The default model: levels joined and matched by keys, a head beside the distance, features kept in training."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn
from torchvision.transforms import v2

from anomalib_resad import ResAD, ResADModel
from anomalib_resad.anomaly_map import AnomalyMapGenerator
from anomalib_resad.callback import augments
from anomalib_resad.embedding import JoinedLevels, distance_within
from anomalib_resad.head import EQUAL, FusedHead
from anomalib_resad.reference_bank import ReferenceBank, to_rows
from anomalib_resad.synthetic import SyntheticDefects, paint
from anomalib_resad.torch_model import TOP_SHARE
from anomalib_resad.variants import TRAINING, VARIANTS
from tests.conftest import cross_category, quiet_engine

FUSED: dict[str, Any] = {"backbone": "resnet18", "pre_trained": False, "image_size": (64, 64), "k_shot": 2}
SETTINGS = {key: value for key, value in VARIANTS["fused"].items() if key not in TRAINING}


class Coordinates(nn.Module):
    """A backbone whose features say where they are: channel 0 the row, channel 1 the column, from 0 to 1."""

    def forward(self, images: Tensor) -> list[Tensor]:
        sizes = [tuple(side // stride for side in images.shape[-2:]) for stride in (4, 8, 16)]
        return [self.grid(len(images), *size) for size in sizes]

    @staticmethod
    def grid(batch: int, height: int, width: int) -> Tensor:
        rows = (torch.arange(height) + 0.5) / height
        columns = (torch.arange(width) + 0.5) / width
        both = torch.stack([rows[:, None].expand(height, width), columns[None].expand(height, width)])
        return both[None].expand(batch, -1, -1, -1).clone()


@pytest.fixture(scope="module")
def model() -> ResADModel:
    torch.manual_seed(0)
    model = ResADModel("resnet18", pre_trained=False, **SETTINGS).eval()
    model.bank.fill(model.encode(torch.randn(2, 3, 64, 96)))
    return model


# -- joined levels ----------------------------------------------------------------------------------------------------


def test_levels_are_joined_where_they_belong() -> None:
    """Each position of the joined map holds the direction of the same place in every level."""
    join = JoinedLevels([2, 2, 2], 6)
    joined, keys = join(Coordinates()(torch.zeros(1, 3, 64, 96)))
    assert joined.shape == (1, 6, 8, 12)
    assert keys.shape == (1, 6, 8, 12)
    place = nn.functional.normalize(Coordinates.grid(1, 8, 12), dim=1) / 3**0.5
    torch.testing.assert_close(joined[:, :2], place, atol=0.02, rtol=0)  # pooled
    torch.testing.assert_close(joined[:, 2:4], place)
    torch.testing.assert_close(joined[:, 4:, 1:-1, 1:-1], place[..., 1:-1, 1:-1], atol=0.02, rtol=0)  # enlarged
    for whole in (joined, keys):
        torch.testing.assert_close(whole.norm(dim=1), torch.ones(1, 8, 12))


def test_keys_keep_who_is_near() -> None:
    """As many keys as channels keep every angle; a quarter of them, nearly every neighbor that stands out."""
    torch.manual_seed(0)
    levels = [torch.randn(1, 128, 16, 16), torch.randn(1, 128, 8, 8)]
    joined, keys = JoinedLevels([128, 128], 256)(levels)
    torch.testing.assert_close(to_rows(keys) @ to_rows(keys).T, to_rows(joined) @ to_rows(joined).T)
    bank = ReferenceBank([256, 64], "cosine", keyed=True)
    join = JoinedLevels([128, 128], 64)
    bank.fill(join(levels))
    near = [level + 0.3 * torch.randn_like(level) for level in levels]
    (matched,) = bank(join(near))
    right = (matched == join(levels)[0]).all(dim=1)
    assert right.float().mean() > 0.99


def test_learned_keys_are_the_principal_directions() -> None:
    """Features in three directions need three keys; random ones would lose some of each."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 3)).Q
    photos = [(torch.randn(1, 10, 10, 3) * torch.tensor([3.0, 2.0, 1.0]) @ basis.T).permute(0, 3, 1, 2) for _ in "ab"]
    join = JoinedLevels([16, 16], 3)
    assert not join.learned
    join.learn(photos)
    assert join.learned
    torch.testing.assert_close((join.directions @ basis).abs(), torch.eye(3), atol=0.1, rtol=0)
    rows = to_rows(photos[0])
    torch.testing.assert_close((rows @ join.directions.T).norm(dim=1), rows.norm(dim=1))


def test_keys_are_learned_once_and_kept(products: Path, tmp_path: Path) -> None:
    first, _, _ = fit(products, tmp_path / "first", epochs=1)
    second, _, _ = fit(products, tmp_path / "second", epochs=1)
    assert first.model.join is not None
    assert second.model.join is not None
    assert first.model.join.learned
    torch.testing.assert_close(first.model.join.directions, second.model.join.directions)
    untrained = ResADModel("resnet18", pre_trained=False, **SETTINGS).join
    assert untrained is not None
    assert not torch.allclose(first.model.join.directions, untrained.directions, atol=0.1)


def test_fewer_channels_than_keys() -> None:
    assert JoinedLevels([3, 4], 128).channels == [7, 7]


def test_projection_is_needed() -> None:
    with pytest.raises(ValueError, match="projection=0"):
        ResADModel("resnet18", pre_trained=False, estimator="fused")


# -- distance within a photo ------------------------------------------------------------------------------------------


def test_what_recurs_elsewhere_is_near() -> None:
    """Of a photo of two stripes that repeat, one patch is like no other; its double next to it does not count."""
    keys = torch.zeros(2, 4, 28, 28)
    keys[:, 0, :, ::2] = 1
    keys[:, 1, :, 1::2] = 1
    keys[1, :, 10, 10:12] = torch.tensor([0.0, 0.0, 1.0, 0.0])[:, None]
    distances = distance_within(keys)
    assert distances.shape == (2, 28, 28)
    assert distances[0, :, ::2].max() == 0
    assert distances[0, :, 1::2].min() == 2, "the second stripe is in no second column: looked for in a quarter"
    assert distances[1, 10, 10] == distances[1, 10, 11] == 2
    keys[1, :, 4, 4] = keys[1, :, 10, 10]
    assert distance_within(keys)[1, 10, 10] == 0


@pytest.mark.parametrize("size", [(28, 28), (20, 31), (56, 42)])
def test_distance_within_leaves_out_the_surroundings(size: tuple[int, int]) -> None:
    """Against a search by hand, patch by patch."""
    torch.manual_seed(0)
    keys = nn.functional.normalize(torch.randn(1, 5, *size), dim=1)
    distances, margin = distance_within(keys)[0], min(size) // 14
    for row, column in ((0, 0), (9, 9), (size[0] - 1, 3)):
        elsewhere = [
            (keys[0, :, row, column] - keys[0, :, other, second]).square().sum()
            for other in range(0, size[0], 2)
            for second in range(0, size[1], 2)
            if max(abs(other - row), abs(second - column)) > margin
        ]
        torch.testing.assert_close(distances[row, column], torch.stack(elsewhere).min())


def test_a_photo_without_elsewhere_is_as_far_as_can_be() -> None:
    assert distance_within(nn.functional.normalize(torch.randn(2, 3, 1, 1), dim=1)).tolist() == [[[4.0]], [[4.0]]]


# -- head -------------------------------------------------------------------------------------------------------------


def test_anomaly_is_the_evidence_in_units_of_normal_patches() -> None:
    torch.manual_seed(0)
    head = FusedHead(16)
    residuals, within = torch.randn(500, 16), torch.rand(500) + 1
    labels = torch.zeros(500, dtype=torch.bool)
    for _ in range(3):
        head.loss(residuals, within, labels)
    head.eval()
    torch.testing.assert_close(head.power, residuals.square().mean(dim=0))
    evidence = head.evidence(residuals, within)
    parts = (evidence - evidence.mean(dim=0)) / evidence.std(dim=0, correction=0)
    expected = (parts * torch.tensor(FusedHead.WEIGHTS)).sum(dim=1)
    maps = residuals[:6].reshape(1, 2, 3, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(head(maps, within[:6].reshape(1, 2, 3)).flatten(), expected[:6], atol=1e-4, rtol=0)
    before = head.mean.clone()
    head.loss(2 * residuals, within, labels)
    assert torch.equal(head.mean, before), "nothing follows what is evaluated"


def test_head_counts_magnitudes_and_both_classes_alike() -> None:
    torch.manual_seed(0)
    head = FusedHead(8).eval()
    residuals, within = torch.randn(10, 8), torch.rand(10)
    torch.testing.assert_close(head.evidence(residuals, within), head.evidence(-residuals, within))
    least = head.evidence(torch.zeros(1, 8), torch.zeros(1))[0, 1:].tolist()
    assert least == pytest.approx([math.log(8 * EQUAL)] * 2), "in units of normal residuals"
    rare = torch.zeros(10, dtype=torch.bool)
    rare[0] = True
    logits = head.evidence(residuals, within)[:, 0]
    expected = nn.functional.softplus(-logits[:1]).mean() / 2 + nn.functional.softplus(logits[1:]).mean() / 2
    torch.testing.assert_close(head.loss(residuals, within, rare), expected)


def test_head_learns_what_sets_defects_apart() -> None:
    """A defect that is no longer than normal residuals and as frequent as they are, but lies in other channels."""
    torch.manual_seed(0)
    head = FusedHead(16)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    labels = torch.arange(400) % 4 == 0
    within = torch.ones(400)

    def draw() -> Tensor:
        residuals = torch.randn(400, 16)
        residuals[:, 8:] *= 0.1
        residuals[labels] = residuals[labels].flip(1)
        return residuals

    for _ in range(100):
        optimizer.zero_grad()
        head.loss(draw(), within, labels).backward()
        optimizer.step()
    head.eval()
    evidence = head.evidence(draw(), within)
    assert evidence[labels, 0].min() > evidence[~labels, 0].median()
    anomaly = ((evidence[:, :2] - head.mean[:2]) / head.variance[:2].sqrt()).sum(dim=1)
    assert (anomaly[labels][:, None] > anomaly[~labels]).float().mean() > 0.95


# -- score ------------------------------------------------------------------------------------------------------------


def test_score_is_the_mean_of_the_most_anomalous_patches() -> None:
    """Two of 196 patches, however they are smoothed in the map; the papers' presets take the map's maximum."""
    anomalies = torch.zeros(1, 14, 14)
    anomalies[0, 3, 3], anomalies[0, 9, 2], anomalies[0, 1, 1] = 4, 2, 1
    result = AnomalyMapGenerator(1, sigma=4.0, top_share=0.01)([anomalies], (112, 112))
    assert result.pred_score is not None
    assert result.pred_score.tolist() == [3.0]
    whole = AnomalyMapGenerator(1, sigma=4.0)([anomalies], (112, 112))
    assert whole.anomaly_map is not None
    assert torch.equal(whole.anomaly_map, result.anomaly_map)
    assert whole.pred_score == whole.anomaly_map.max()
    assert ResADModel("resnet18", pre_trained=False, **SETTINGS).anomaly_map.top_share == TOP_SHARE
    assert ResADModel("resnet18", pre_trained=False).anomaly_map.top_share == 0


# -- properties -------------------------------------------------------------------------------------------------------


def test_order_and_repeats_of_references_change_nothing(model: ResADModel) -> None:
    photos, references = torch.randn(2, 3, 64, 96), torch.randn(3, 3, 64, 96)
    results = []
    for chosen in ([0, 1, 2], [2, 0, 1], [0, 1, 2, 1]):
        with torch.no_grad():
            model.bank.fill(model.encode(references[chosen]))
            results.append(model(photos).anomaly_map)
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(results[0], results[2], atol=1e-5, rtol=0)


def test_batch_composition_changes_nothing(model: ResADModel) -> None:
    """Exactly, from the features on: a backbone rounds differently with the batch size."""
    with torch.no_grad():
        features = model.encode(torch.randn(3, 3, 64, 96))
        together = model.detect(features, model.bank.enrolled, (64, 96)).anomaly_map
        alone = model.detect([level[1:2] for level in features], model.bank.enrolled, (64, 96)).anomaly_map
    assert together is not None
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)


def test_references_score_lowest(model: ResADModel) -> None:
    references = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        model.bank.fill(model.encode(references))
        own, other = model(references), model(torch.randn(2, 3, 64, 96))
    assert own.pred_score is not None
    assert other.pred_score is not None
    assert own.pred_score.max() < other.pred_score.min()


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
