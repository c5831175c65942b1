# SPDX-License-Identifier: Apache-2.0

"""The default model: levels joined and matched by keys, a head beside two distances."""

import math

import pytest
import torch
from torch import Tensor, nn

from anomalib_resad import ResADModel
from anomalib_resad.method.anomaly_map import AnomalyMapGenerator
from anomalib_resad.method.features import Features, Rows, as_list, to_rows
from anomalib_resad.method.head import ABNORMAL_SHARE, EQUAL, PATCHES, EvidenceHead
from anomalib_resad.method.joined_levels import JoinedLevels, neighborhoods_of
from anomalib_resad.method.reference_bank import ReferenceBank
from anomalib_resad.method.self_similarity import self_similarity_distance
from anomalib_resad.torch_model import TOP_SHARE, fused, resad


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
    model = fused("resnet18", pre_trained=False).eval()
    model.bank.fill(model.encode(torch.randn(2, 3, 64, 96)))
    return model


# -- joined levels ----------------------------------------------------------------------------------------------------


def test_levels_are_joined_where_they_belong() -> None:
    """Each position of the joined map holds the direction of the same place in every level."""
    join = JoinedLevels([2, 2, 2], 6)
    features = join(Coordinates()(torch.zeros(1, 3, 64, 96)))
    (joined,), keys = features.values, features.keys
    assert keys is not None
    for known, again in zip(as_list(features), as_list(join.with_keys(joined)), strict=True):
        torch.testing.assert_close(again, known, msg="the same, of levels that were joined before")
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
    (joined,), keys, _ = JoinedLevels([128, 128], 256)(levels)
    assert keys is not None
    torch.testing.assert_close(to_rows(keys) @ to_rows(keys).T, to_rows(joined) @ to_rows(joined).T)
    bank = ReferenceBank([256], 64, "cosine")
    bank.share.fill_(1.0)
    join = JoinedLevels([128, 128], 64)
    bank.fill(join(levels))
    near = [level + 0.3 * torch.randn_like(level) for level in levels]
    matched = bank(join(near))[0]
    right = (matched == join(levels).values[0]).all(dim=1)
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


def test_fewer_channels_than_keys() -> None:
    assert JoinedLevels([3, 4], 128).channels == [7, 7]


def test_projection_is_needed() -> None:
    with pytest.raises(ValueError, match="projection=0"):
        fused("resnet18", pre_trained=False, projection=0)


# -- distance within a photo ------------------------------------------------------------------------------------------


def test_what_recurs_elsewhere_is_near() -> None:
    """Of a photo of two stripes that repeat, one patch is like no other; its double next to it does not count."""
    keys = torch.zeros(2, 4, 28, 28)
    keys[:, 0, :, ::2] = 1
    keys[:, 1, :, 1::2] = 1
    keys[1, :, 10, 10:12] = torch.tensor([0.0, 0.0, 1.0, 0.0])[:, None]
    distances = self_similarity_distance(keys)
    assert distances.shape == (2, 28, 28)
    assert distances[0, :, ::2].max() == 0
    assert distances[0, :, 1::2].min() == 2, "the second stripe is in no second column: looked for in a quarter"
    assert distances[1, 10, 10] == distances[1, 10, 11] == 2
    keys[1, :, 4, 4] = keys[1, :, 10, 10]
    assert self_similarity_distance(keys)[1, 10, 10] == 0


@pytest.mark.parametrize("size", [(28, 28), (20, 31), (56, 42)])
def test_self_similarity_distance_leaves_out_the_surroundings(size: tuple[int, int]) -> None:
    """Against a search by hand, patch by patch."""
    torch.manual_seed(0)
    keys = nn.functional.normalize(torch.randn(1, 5, *size), dim=1)
    distances, margin = self_similarity_distance(keys)[0], min(size) // 14
    for row, column in ((0, 0), (9, 9), (size[0] - 1, 3)):
        elsewhere = [
            (keys[0, :, row, column] - keys[0, :, other, second]).square().sum()
            for other in range(0, size[0], 2)
            for second in range(0, size[1], 2)
            if max(abs(other - row), abs(second - column)) > margin
        ]
        torch.testing.assert_close(distances[row, column], torch.stack(elsewhere).min())


def test_what_is_next_to_a_patch_is_not_elsewhere() -> None:
    """Up to a 14th of the shorter side, 2 of 28, in any direction; further away it is."""
    torch.manual_seed(0)
    for row, column, counts in ((12, 12, False), (10, 12, False), (12, 14, True), (14, 10, True)):
        keys = nn.functional.normalize(torch.randn(1, 64, 28, 30), dim=1)
        keys[0, :, row, column] = keys[0, :, 10, 10]
        assert (self_similarity_distance(keys)[0, 10, 10] < 1e-5) == counts, (row, column)


def test_a_photo_without_elsewhere_is_as_far_as_can_be() -> None:
    keys = nn.functional.normalize(torch.randn(2, 3, 1, 1), dim=1)
    assert self_similarity_distance(keys).tolist() == [[[4.0]], [[4.0]]]


# -- head -------------------------------------------------------------------------------------------------------------


def test_anomaly_is_the_evidence_in_units_of_normal_patches() -> None:
    torch.manual_seed(0)
    head = EvidenceHead(16)
    residuals, beside = torch.randn(500, 16), torch.rand(500, 2) + 1
    labels = torch.zeros(500, dtype=torch.bool)
    for _ in range(3):
        head.loss(residuals, beside, labels)
    head.eval()
    torch.testing.assert_close(head.power, residuals.square().mean(dim=0))
    evidence = head.evidence(residuals, beside)
    parts = (evidence - evidence.mean(dim=0)) / evidence.std(dim=0, correction=0)
    expected = (parts * torch.tensor(EvidenceHead.WEIGHTS)).sum(dim=1)
    anomalies = head.anomalies(residuals[:6], beside[:6].reshape(1, 2, 3, 2))
    torch.testing.assert_close(anomalies, expected[:6].reshape(1, 2, 3), atol=1e-4, rtol=0)
    before = head.mean.clone()
    head.loss(2 * residuals, beside, labels)
    assert torch.equal(head.mean, before), "nothing follows what is evaluated"


def test_head_counts_magnitudes_and_both_classes_alike() -> None:
    torch.manual_seed(0)
    head = EvidenceHead(8).eval()
    residuals, beside = torch.randn(10, 8), torch.rand(10, 2)
    torch.testing.assert_close(head.evidence(residuals, beside), head.evidence(-residuals, beside))
    least = head.evidence(torch.zeros(1, 8), torch.zeros(1, 2))[0, 1:].tolist()
    assert least == pytest.approx([math.log(8 * EQUAL)] * 3), "in units of normal residuals"
    rare = torch.zeros(10, dtype=torch.bool)
    rare[0] = True
    logits = head.evidence(residuals, beside)[:, 0]
    expected = nn.functional.softplus(-logits[:1]).mean() / 2 + nn.functional.softplus(logits[1:]).mean() / 2
    torch.testing.assert_close(head.loss(residuals, beside, rare), expected)


def test_head_learns_what_sets_defects_apart() -> None:
    """A defect that is no longer than normal residuals and as frequent as they are, but lies in other channels."""
    torch.manual_seed(0)
    head = EvidenceHead(16)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    labels = torch.arange(400) % 4 == 0
    beside = torch.ones(400, 2)

    def draw() -> Tensor:
        residuals = torch.randn(400, 16)
        residuals[:, 8:] *= 0.1
        residuals[labels] = residuals[labels].flip(1)
        return residuals

    for _ in range(100):
        optimizer.zero_grad()
        head.loss(draw(), beside, labels).backward()
        optimizer.step()
    head.eval()
    evidence = head.evidence(draw(), beside)
    assert evidence[labels, 0].min() > evidence[~labels, 0].median()
    anomaly = ((evidence[:, :2] - head.mean[:2]) / head.variance[:2].sqrt()).sum(dim=1)
    assert (anomaly[labels][:, None] > anomaly[~labels]).float().mean() > 0.95


def test_loss_of_a_batch_by_hand() -> None:
    """Which patches are normal and abnormal, against whose references, what they count: all patches are taken here."""
    torch.manual_seed(0)
    head = EvidenceHead(6, dropout=0.0).eval()
    values, keys = torch.randn(2, 6, 4, 4), nn.functional.normalize(torch.randn(2, 3, 4, 4), dim=1)
    around = nn.functional.normalize(torch.randn(4, 3), dim=1)
    references = [
        Rows([torch.randn(9, 6)], nn.functional.normalize(torch.randn(9, 3), dim=1), around) for _ in range(2)
    ]
    mask = torch.zeros(2, 8, 8)
    mask[0, 0, 0] = 1  # a quarter of one patch: abnormal
    mask[1, :2, :2] = 1  # a whole patch
    mask[1, 4:6, 4:6] = ABNORMAL_SHARE / 2  # too little to be abnormal, too much to be normal
    assert min(PATCHES) >= 16
    expected: dict[bool, list[Tensor]] = {False: [], True: []}
    for photo in range(2):
        for row in range(4):
            for column in range(4):
                share = mask[photo, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean()
                if 0 < share < ABNORMAL_SHARE:
                    continue
                rows = references[photo]
                assert rows.keys is not None
                nearest = (rows.keys @ keys[photo, :, row, column]).argmax()
                residual = values[photo, :, row, column] - rows.values[0][nearest]
                expected[bool(share > 0)].append(head.classifier(residual.abs())[0])
    assert [len(expected[side]) for side in (False, True)] == [29, 2]
    loss = (
        nn.functional.softplus(torch.stack(expected[False])).mean()
        + nn.functional.softplus(-torch.stack(expected[True])).mean()
    ) / 2
    (step,) = head.losses(Features([values], keys, neighborhoods_of(keys)).photos, references, mask, progress=0.5)
    torch.testing.assert_close(step["head"], loss)


def test_loss_takes_no_more_patches_than_it_should() -> None:
    """However large photo and defect are; which ones is drawn anew each time."""
    torch.manual_seed(0)
    head = EvidenceHead(4)
    keys, around = (nn.functional.normalize(torch.randn(shape), dim=1) for shape in ((1, 3, 20, 20), (9, 3)))
    features = Features([torch.randn(1, 4, 20, 20)], keys, neighborhoods_of(keys))
    rows = Rows([torch.randn(50, 4)], nn.functional.normalize(torch.randn(50, 3), dim=1), around)
    mask = torch.zeros(1, 40, 40)
    mask[:, :20] = 1
    counts, losses = [], set()
    original = head.loss
    head.loss = lambda *arguments: (counts.append(arguments[2].sum().item()), original(*arguments))[1]  # type: ignore[method-assign]
    for _ in range(3):
        (step,) = head.losses([features], [rows], mask, progress=0.0)
        losses.add(round(step["head"].item(), 6))
    assert counts == [PATCHES[1]] * 3
    assert len(losses) == 3


# -- score ------------------------------------------------------------------------------------------------------------


def test_score_is_the_mean_of_the_most_anomalous_patches() -> None:
    """Two of 196 patches, however they are smoothed in the map; the papers' presets take the map's maximum."""
    anomalies = torch.zeros(1, 14, 14)
    anomalies[0, 3, 3], anomalies[0, 9, 2], anomalies[0, 1, 1] = 4, 2, 1
    score, anomaly_map = AnomalyMapGenerator(sigma=4.0, top_share=0.01)([anomalies], (112, 112))
    assert score.tolist() == [3.0]
    highest, same_map = AnomalyMapGenerator(sigma=4.0)([anomalies], (112, 112))
    assert torch.equal(anomaly_map, same_map)
    assert highest == anomaly_map.max()
    assert fused("resnet18", pre_trained=False).anomaly_map.top_share == TOP_SHARE
    assert resad("resnet18", pre_trained=False, coupling_layers=1).anomaly_map.top_share == 0


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
        alone = model.detect(features.photo(1), model.bank.enrolled, (64, 96)).anomaly_map
    assert together is not None
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)


def test_references_score_lowest(model: ResADModel) -> None:
    references = torch.randn(2, 3, 64, 96)
    model.bank.share.fill_(1.0)  # else a reference's own patches are not all searched
    with torch.no_grad():
        model.bank.fill(model.encode(references))
        own, other = model(references), model(torch.randn(2, 3, 64, 96))
    assert own.pred_score is not None
    assert other.pred_score is not None
    assert own.pred_score.max() < other.pred_score.min()
