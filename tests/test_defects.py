# SPDX-License-Identifier: Apache-2.0

"""The ten defects of the published code (github.com/xcyao00/ResAD, commit 0afc30e).

Each test holds a tiny version of the published behavior, shows that its check catches it, and that ours passes.
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anomalib_resad.method import flow, reference_bank
from anomalib_resad.method.anomaly_map import AnomalyMapGenerator
from anomalib_resad.method.likelihood_maps import average_maps, log_likelihood_to_anomaly
from anomalib_resad.method.loss import occ_radius
from anomalib_resad.method.reference_bank import nearest
from anomalib_resad.method.residual_flow import ResidualFlow
from anomalib_resad.torch_model import ResADModel, resad
from anomalib_resad.training.reference_pools import ReferencePools
from tests.conftest import cross_category, product


def small(**settings: object) -> tuple[ResADModel, ResidualFlow]:
    model = resad("resnet18", pre_trained=False, coupling_layers=1, position_channels=0, **settings)
    assert isinstance(model.estimator, ResidualFlow)
    return model, model.estimator


def test_defect_1_a_level_is_never_trained(images: Tensor) -> None:
    """32 images have 32 x 14 x 14 = 6272 patches on level 3, and the code takes 6272 // 8192 = 0 steps."""

    def trained(steps: list[int]) -> bool:
        return all(count > 0 for count in steps)

    batch_size = 100
    model, estimator = small(flow_batch_size=batch_size)
    features = model.encode(images).values
    masks = [torch.zeros(3, *level.shape[-2:]) for level in features]
    positions = [mask.numel() for mask in masks]
    assert positions == [768, 192, 48]
    assert not trained([count // batch_size for count in positions])

    steps = [0, 0, 0]
    for loss in estimator.flow_losses(features, masks):
        model.zero_grad()
        loss.backward()
        for level, each in enumerate(estimator.flows):
            steps[level] += all(p.grad is not None for p in each.parameters() if p.requires_grad)
    assert trained(steps)


def test_defect_2_the_test_set_chooses_the_checkpoint(trained: Path) -> None:
    """The code saves when the target's test metric is the best so far: AUPRO, which is -1 there, so never at all."""

    def published(metric_of_target: Callable[[], float]) -> bool:
        best, saved = -1.0, False
        for _ in range(3):
            metric = metric_of_target()
            saved, best = saved or metric > best, max(best, metric)
        return saved

    looked: list[str] = []
    assert not published(lambda: (looked.append("target"), -1.0)[1])
    assert looked, "it looks at the target's test images"

    callbacks = torch.load(trained, weights_only=True)["callbacks"]
    rule = next(state for name, state in callbacks.items() if name.startswith("ModelCheckpoint"))
    assert rule["monitor"] is None, "the last one, whatever any metric says"
    assert Path(rule["best_model_path"]).is_relative_to(trained.parent)


def test_defect_3_the_score_depends_on_the_other_images() -> None:
    """The code subtracts the maximum over the test set; ours is a constant learned from normal training patches."""
    _, estimator = small(layers=["layer1"])
    estimator.update_ceiling(0, torch.tensor([-0.5, -1.0, 3.0]), torch.tensor([0, 0, 1]))
    assert estimator.ceilings.tolist() == [-0.5], "abnormal positions do not count"
    generator = AnomalyMapGenerator(sigma=4)
    log_p = -torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    brighter = torch.cat([log_p[:1], log_p[1:] + 0.4])

    def published(batch: Tensor) -> Tensor:
        likelihood = torch.exp(batch - batch.max())
        return (likelihood.max() - likelihood).amax(dim=(1, 2))

    def ours(batch: Tensor) -> Tensor:
        return generator([log_likelihood_to_anomaly(batch, estimator.ceilings[0])], (32, 32))[0]

    def independent(score: Callable[[Tensor], Tensor]) -> bool:
        alone = score(log_p[:1])
        return all(torch.allclose(score(batch)[:1], alone) for batch in (log_p, brighter))

    assert not independent(published)
    assert independent(ours)


def test_defect_4_the_two_maps_have_different_ranges() -> None:
    """The code averages a sum over three levels and a mean over them: a lone signal in the second hardly counts."""
    zero, one = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)

    def published(likelihood: list[Tensor], probability: list[Tensor]) -> Tensor:
        return (torch.stack(likelihood).sum(dim=0) + torch.stack(probability).mean(dim=0)) / 2

    def ours(likelihood: list[Tensor], probability: list[Tensor]) -> Tensor:
        return AnomalyMapGenerator(sigma=0)(average_maps(likelihood, probability), (8, 8))[1]

    def on_one_scale(merge: Callable[[list[Tensor], list[Tensor]], Tensor]) -> bool:
        first, second, both = merge([one] * 3, [zero] * 3), merge([zero] * 3, [one] * 3), merge([one] * 3, [one] * 3)
        return torch.allclose(first, second) and torch.allclose(both, torch.ones_like(both))

    assert not on_one_scale(published)
    assert on_one_scale(ours)
    unlikely = ours([one - 3] * 3, [one] * 3)  # likelier than any normal patch of the training: 0, not -2
    assert torch.allclose(unlikely, torch.tensor(0.5))


def pools_of(root: Path) -> ReferencePools:
    data = cross_category(root)
    data.setup()
    pools = ReferencePools(data.train_data, data.val_data)
    assert not set(pools.good["products/pill"]) & set(data.val_data.samples.image_path), (
        "held-out ones are no references"
    )
    return pools


def test_defect_5_references_repeat_and_contain_the_image_itself(products: Path) -> None:
    """The code draws with replacement, from an unsorted listing: a photo may be its own reference, with residual 0."""
    pools = pools_of(products)
    good = pools.good["products/pill"]
    image = good[0]

    def published(epoch: int) -> list[str]:
        return random.Random(epoch).choices(good, k=3)  # noqa: S311

    def ours(epoch: int) -> list[str]:
        return pools.draw(image, 3, 0, epoch, image)

    def sound(draw: Callable[[int], list[str]]) -> bool:
        draws = [draw(epoch) for epoch in range(20)]
        return all(image not in drawn and len(set(drawn)) == 3 and set(drawn) <= set(good) for drawn in draws)

    assert not sound(published)
    assert sound(ours)
    before = [ours(epoch) for epoch in range(20)]
    pools.good["products/pill"] = good[::-1]
    assert [ours(epoch) for epoch in range(20)] == before, "the order of the listing changes nothing"
    with pytest.raises(ValueError, match=r"k_shot=50, but products/grain has \d+ good training images"):
        pools.draw(image, 50, 0)


def test_defect_6_one_draw_serves_the_whole_batch(products: Path) -> None:
    """The paper draws "for each input image"; the code draws once per class and batch."""
    pools = pools_of(products)
    good = pools.good["products/pill"]
    published = [tuple(good[:3])] * len(good)
    ours = [tuple(pools.draw(path, 3, 0, 0, path)) for path in good]
    assert len(set(published)) == 1
    assert len(set(ours)) > 1


def test_defect_7_names_are_hard_coded(products: Path, tmp_path: Path) -> None:
    """The code knows its classes from tables; ours trains on and enrolls any folder."""
    table = {"bottle": 0, "cable": 1}
    name = "widget no. 7"
    with pytest.raises(KeyError):
        table[name]
    root = tmp_path / "shelf"
    for source, target in (("pill", name), ("grain", "grain")):
        shutil.copytree(products / source, root / target)
    data = cross_category(root, source=name, target="grain")
    data.setup()
    assert set(data.train_data.samples.category) == {f"shelf/{name}"}
    enrolled = product(root, name)
    enrolled.setup()
    assert len(enrolled.train_data) > 0


def test_defect_8_the_radius_follows_one_tiny_residual() -> None:
    """The code takes nine tenths of the smallest abnormal residual in the batch, with no floor."""
    sizes = torch.linspace(0.3, 0.5, 100)
    tiny = torch.cat([torch.tensor([1e-4]), sizes])

    def published(abnormal: Tensor) -> Tensor:
        return (0.9 * abnormal.min()).clamp(max=0.4)

    def robust(radius: Callable[[Tensor], Tensor]) -> bool:
        return bool((radius(tiny) - radius(sizes)).abs() < 0.01) and bool(radius(tiny[:1]) >= 0.1)

    assert torch.allclose(occ_radius(tiny, quantile=0, floor=0), published(tiny))
    assert not robust(published)
    assert robust(occ_radius)
    assert occ_radius(tiny[:0]) == torch.tensor(0.4)


def test_defect_9_distribution_matching_at_test_only(images: Tensor) -> None:
    """The code matches distributions at test only: its flow never met what it judges."""
    torch.manual_seed(0)
    model, estimator = small(codebook_size=16, efdm=0.6, residual="squared", constraintor="none", occ="none")
    features = model.encode(images)
    model.bank.fill(features.photo(0))
    matched = model.bank(features)
    masks = [torch.zeros(3, *level.shape[-2:]) for level in features.values]
    _, in_training = estimator.constrain_loss(features, matched, masks)  # also starts the codebook
    seen: list[Tensor] = []
    for each in estimator.flows:
        each.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        each.maps = lambda level, maps=each.maps: (seen.append(level), maps(level))[1]  # type: ignore[method-assign]
    model.detect(features, model.bank.rows, (64, 64))
    published = estimator.residuals(features, matched)

    def as_in_test(training: list[Tensor]) -> bool:
        return all(torch.allclose(a, b) for a, b in zip(training, seen, strict=True))

    assert not as_in_test(published)
    assert as_in_test(in_training)


def test_defect_10_encodings_are_rebuilt_and_the_whole_matrix_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code builds the position encoding for each image, and compares all patches with the whole bank at once."""
    built: list[tuple[int, int]] = []
    encode = flow.position_encoding
    monkeypatch.setattr(flow, "position_encoding", lambda c, h, w: (built.append((h, w)), encode(c, h, w))[1])
    estimator = flow.PositionFlow(6, coupling_layers=1, position_channels=8)
    pictures = torch.randn(5, 6, 3, 4)
    for _ in pictures:
        flow.position_encoding(8, 3, 4)
    assert len(built) == 5, "published: one per image"
    built.clear()
    for picture in pictures:
        estimator(picture[None])
    assert built == [(3, 4)]

    widths: list[tuple[int, ...]] = []
    argmax_rows = reference_bank._argmax_rows
    monkeypatch.setattr(reference_bank, "_argmax_rows", lambda b: (widths.append(tuple(b.shape)), argmax_rows(b))[1])
    generator = torch.Generator().manual_seed(0)
    features, bank = torch.randn(2, 6, 4, 4, generator=generator), torch.randn(5000, 6, generator=generator)
    assert (features.permute(0, 2, 3, 1).reshape(-1, 6) @ bank.T).shape == (32, 5000), (
        "published: it grows with the bank"
    )
    nearest(features, bank)
    assert [rows for _, rows in widths[:4]] == [1280, 1280, 1280, 1160], "nearly equal ones"
    assert max(rows for _, rows in widths) <= reference_bank.BLOCK
    assert {queries for queries, _ in widths} == {16}
