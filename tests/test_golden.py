# SPDX-License-Identifier: Apache-2.0

"""Figures of the published code (float64, fixed seeds), copied from the project's reference figures.

Where ours differs on purpose, the test holds the published arithmetic too, shows that it gives the figure, and shows
the difference. Left out: ``occ/bidirectional_linear``, a form without the barrier that neither method uses.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_resad.method.anomaly_map import AnomalyMapGenerator
from anomalib_resad.method.codebook import Codebook, codebook_loss, match_distribution
from anomalib_resad.method.constraintor import ConvBnReLU
from anomalib_resad.method.flow import PositionFlow, position_encoding
from anomalib_resad.method.likelihood_maps import average_maps, log_likelihood_to_anomaly
from anomalib_resad.method.loss import (
    abnormal_invariant_occ,
    abnormal_probability,
    average_boundary,
    focal,
    log_barrier_likelihood,
    log_barrier_occ,
    log_barrier_push_pull,
    negative_log_likelihood,
    normal_boundary,
    one_class_loss,
    orthogonality,
)
from anomalib_resad.method.reference_bank import nearest
from anomalib_resad.method.residual_flow import residual

FIGURES = np.load(Path(__file__).parent / "data" / "golden.npz")


def golden(key: str) -> Tensor:
    return torch.from_numpy(FIGURES[key])


def state(prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): golden(key) for key in FIGURES.files if key.startswith(prefix)}


def test_golden_match_and_residual() -> None:
    """The published code matches by cosine."""
    features = golden("match/features")
    matched = nearest(features, golden("match/bank"), "cosine")
    assert torch.equal(matched, golden("match/matched"))
    assert torch.equal(residual(features, matched), golden("match/residual_difference"))
    torch.testing.assert_close(residual(features, matched, "squared"), golden("match/residual_squared"))


def test_golden_position_encoding() -> None:
    encoding = position_encoding(16, 5, 7).T.reshape(16, 5, 7)
    torch.testing.assert_close(encoding, golden("position/16x5x7"), rtol=0, atol=1e-6)
    sums = position_encoding(256, 56, 56).double().sum(dim=0)
    torch.testing.assert_close(sums, golden("position/256x56x56_sum_per_channel"), rtol=0, atol=1e-2)


@pytest.mark.parametrize(("kind", "position_channels"), [("conditional", 8), ("plain", 0)])
def test_golden_flow(kind: str, position_channels: int) -> None:
    flow = PositionFlow(16, coupling_layers=2, position_channels=position_channels).double()
    flow.blocks.load_state_dict(state(f"flownet/{kind}/state/"))
    z, log_det = flow.transform(golden(f"flownet/{kind}/input"), golden(f"flownet/{kind}/condition"))
    torch.testing.assert_close(z, golden(f"flownet/{kind}/z"), rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det, golden(f"flownet/{kind}/logdet"), rtol=0, atol=1e-9)


class Given(PositionFlow):
    """A flow whose transform is the figures' z and log-determinant."""

    def transform(self, vectors: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        del positions
        return vectors, golden("flow/logdet")


def close(ours: Tensor, key: str, atol: float = 1e-9) -> None:
    torch.testing.assert_close(ours, golden(key), rtol=0, atol=atol)


def test_golden_log_likelihoods_per_channel() -> None:
    """Scale of the likelihoods, of the normal and of the abnormal Gaussian: nats per channel."""
    normal, abnormal = Given(16, coupling_layers=1, position_channels=0).log_likelihoods(golden("flow/z"), None)
    close(normal, "flow/logp_normal")
    close(abnormal, "flow/logp_abnormal")
    close(abnormal_probability(normal, abnormal), "flow/abnormal_probability")


@pytest.mark.parametrize(("level", "channels"), [(1, 4), (2, 6), (3, 8)])
def test_golden_constraintor(level: int, channels: int) -> None:
    constraintor = ConvBnReLU(channels).double().eval()
    constraintor.load_state_dict(state(f"constraintor/state/l{level}_proj."))
    with torch.no_grad():
        close(constraintor(golden(f"constraintor/input{level}")), f"constraintor/output{level}")


# -- the constraintor's losses ----------------------------------------------------------------------------------------


def occ_rows() -> tuple[Tensor, Tensor, Tensor]:
    return golden("occ/features"), golden("occ/target"), golden("occ/mask")


def test_golden_occ_abnormal_invariant() -> None:
    """Normal positions as published. Abnormal ones: the paper has the distance, the code the mean square."""
    f, r, y = occ_rows()
    close(abnormal_invariant_occ(f, r, torch.zeros(len(f))), "occ/pseudo_huber_normal_only")
    close(one_class_loss("normal_only", f, r, torch.zeros(len(f))), "occ/pseudo_huber_normal_only")
    normal = one_class_loss("normal_only", f, r, y)
    mean_square, distance = (f - r)[y > 0].square().mean(), (f - r)[y > 0].norm(dim=1).mean()
    close(normal + mean_square, "occ/pseudo_huber")
    torch.testing.assert_close(abnormal_invariant_occ(f, r, y), normal + distance)


@pytest.mark.parametrize(("bidirectional", "key"), [(False, "log_barrier"), (True, "log_barrier_bidirectional")])
def test_golden_occ_log_barrier(bidirectional: bool, key: str) -> None:
    """As published with the smallest abnormal residual for the radius; ours takes a quantile and a floor."""
    f, r, y = occ_rows()
    kind = "log_barrier_bidirectional" if bidirectional else "log_barrier"
    published = log_barrier_occ(f, r, y, bidirectional, quantile=0, floor=0)
    close(published, f"occ/{key}")
    close(golden(f"occ/{key}_normal") + golden(f"occ/{key}_abnormal"), f"occ/{key}")
    close(one_class_loss(kind, f, r, torch.zeros(len(f))), f"occ/{key}_normal_only")
    ours = one_class_loss(kind, f, r, y)
    assert not torch.isclose(ours, published)
    torch.testing.assert_close(ours, log_barrier_occ(f, r, y, bidirectional, quantile=0.05, floor=0.1))


@pytest.mark.parametrize(("bidirectional", "key"), [(False, "log_barrier"), (True, "log_barrier_bidirectional")])
def test_golden_occ_log_barrier_of_abnormal_positions(bidirectional: bool, key: str) -> None:
    """Without normal positions, what is left is the abnormal part."""
    f, r, y = occ_rows()
    abnormal = log_barrier_occ(f[y > 0], r[y > 0], y[y > 0], bidirectional, quantile=0, floor=0)
    close(abnormal, f"occ/{key}_abnormal")


def test_golden_occ_orthogonality() -> None:
    """The published term grows with the number of positions; training gives it columns of unit length."""
    f, _, y = occ_rows()
    normal = f[y == 0]
    close(orthogonality(normal), "occ/orthogonal_regularizer")
    twice = torch.cat([normal, normal])
    assert orthogonality(twice) > 3 * orthogonality(normal)
    ours = [orthogonality(F.normalize(rows, dim=0)) for rows in (normal, twice)]
    torch.testing.assert_close(ours[0], ours[1])
    assert orthogonality(torch.eye(16)[:, :4]) == 0


# -- the flow's losses ------------------------------------------------------------------------------------------------


def likelihoods() -> tuple[Tensor, Tensor, Tensor]:
    return golden("flow/logp_normal"), golden("flow/logp_abnormal"), golden("flow/mask")


def push_pull() -> Tensor:
    log_p, _, y = likelihoods()
    return log_barrier_push_pull(log_p, y, normal_boundary(log_p[y == 0]))


def test_golden_flow_log_barrier_likelihoods() -> None:
    normal, abnormal, y = likelihoods()
    close(log_barrier_likelihood(normal, torch.zeros(len(y))), "flow/stage1")
    close(log_barrier_likelihood(normal, y), "flow/ml_normal")
    close(log_barrier_likelihood(abnormal, 1 - y), "flow/ml_abnormal")


def test_golden_flow_push_pull() -> None:
    log_p, _, y = likelihoods()
    boundary = normal_boundary(log_p[y == 0])
    close(boundary, "flow/normal_boundary_beta_0.05")
    close(log_barrier_push_pull(log_p[y == 0], y[y == 0], boundary), "flow/bgspp_normal")
    close(log_barrier_push_pull(log_p[y > 0], y[y > 0], boundary), "flow/bgspp_abnormal")
    close(push_pull() - golden("flow/bgspp_normal"), "flow/bgspp_abnormal")


def test_golden_flow_focal() -> None:
    """As published but for its label smoothing of 1e-5, which keeps its logarithm finite; a log-sigmoid needs none."""
    normal, abnormal, y = likelihoods()
    probability = abnormal_probability(normal, abnormal)
    labels = F.one_hot(y.long(), 2).float().clamp(1e-5, 1 - 1e-5)  # float32, as published
    right = (labels * torch.stack([1 - probability, probability], dim=1)).sum(dim=1) + 1e-5
    close(-((1 - right) ** 2 * right.log()).mean(), "flow/focal")
    close(focal(normal, abnormal, y), "flow/focal", atol=1e-5)
    certain = focal(torch.tensor([0.0]), torch.tensor([-200.0]), torch.tensor([1.0]))
    assert torch.isfinite(certain)


def test_golden_flow_totals() -> None:
    normal, abnormal, y = likelihoods()
    both = log_barrier_likelihood(normal, y) + log_barrier_likelihood(abnormal, 1 - y)
    close(both + focal(normal, abnormal, y) + push_pull(), "flow/stage2_total", atol=1e-5)
    plain = negative_log_likelihood(normal, y) + negative_log_likelihood(abnormal, 1 - y)
    close(plain + focal(normal, abnormal, y), "flow/imagebind_stage1", atol=1e-5)
    close(plain + focal(normal, abnormal, y) + push_pull(), "flow/imagebind_stage2", atol=1e-5)


def test_golden_flow_average_of_the_boundary() -> None:
    """As published when it starts from 0; ours starts from the first boundary, since 0 is far above all of them."""
    published, ours = torch.tensor(0.0), torch.tensor(float("nan"))
    for boundary in (-1.0, -1.2, -0.9):
        published = average_boundary(published, torch.tensor(boundary))
        ours = average_boundary(ours, torch.tensor(boundary))
    close(published.double(), "flow/boundary_average_after_-1.0_-1.2_-0.9", atol=1e-7)
    assert ours.item() == pytest.approx(-0.9 * 1.02 - 0.1 * 0.9)


# -- codebook, distribution matching and maps -------------------------------------------------------------------------


def test_golden_vq() -> None:
    """The published value has the commitment term, a constant factor for residuals of a frozen backbone."""
    rows = golden("vq/features").permute(0, 2, 3, 1).reshape(-1, 8)
    codebook = Codebook(8, 12).double()
    codebook.codes.data = golden("vq/codebook")
    close(codebook(golden("vq/features")), "vq/quantized")
    loss = codebook_loss(rows, codebook.codes, golden("vq/mask").flatten())
    close((1 + 0.25) * loss.detach(), "vq/loss_beta_0.25")


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_golden_efdm(alpha: float) -> None:
    matched = match_distribution(golden("vq/features"), golden("vq/quantized"), strength=1 - alpha)
    close(matched, f"efdm/alpha_{alpha}")


LEVELS = (1, 2, 3)


def enlarge(level: Tensor, align_corners: bool) -> Tensor:
    return F.interpolate(level[:, None], size=(32, 32), mode="bilinear", align_corners=align_corners)[:, 0]


def smooth(maps: Tensor) -> Tensor:
    """SciPy's Gaussian filter, which the published code uses: borders mirrored with the edge repeated."""
    return torch.from_numpy(np.stack([gaussian_filter(each.numpy(), 4) for each in maps]))


def test_golden_score_maps_as_published() -> None:
    """What the published code does: corners aligned, the test set's maxima, one map summed and one averaged."""
    log_p = [golden(f"score/logp{level}") for level in LEVELS]
    likelihood = sum(enlarge((level - level.max()).exp(), align_corners=True) for level in log_p)
    assert isinstance(likelihood, Tensor)
    close(smooth(likelihood.max() - likelihood), "score/map_from_logp_32px")
    close(torch.stack([level.max() for level in log_p]), "score/max_logp_per_level")
    probabilities = [enlarge(golden(f"score/abnormal_probability{level}"), align_corners=True) for level in LEVELS]
    close(smooth(torch.stack(probabilities).mean(dim=0)), "score/map_from_probability_32px")


def test_golden_score_smoothing_side_by_side() -> None:
    """Ours mirrors without repeating the edge: the same map from sigma 4 x 4 pixels inside the border on."""
    raw = torch.rand(1, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blur = AnomalyMapGenerator(sigma=4.0).double().blur
    assert blur is not None
    ours, published = blur(raw[:, None])[:, 0], smooth(raw)
    torch.testing.assert_close(ours[:, 16:-16, 16:-16], published[:, 16:-16, 16:-16], rtol=0, atol=1e-6)
    assert 1e-4 < (ours - published).abs().max() < 0.1


def test_golden_score_enlarging_side_by_side() -> None:
    """A patch covers its own pixels: cell 1 of 4 is centered at pixel 11.5 of 32; aligned corners put it at 10.3."""
    level = torch.zeros(1, 4, 4)
    level[0, 1, 1] = 1

    def center(maps: Tensor) -> float:
        return float((maps[0].sum(dim=0) * torch.arange(32)).sum() / maps.sum())

    assert center(enlarge(level, align_corners=False)) == pytest.approx(11.5, abs=1e-4)
    assert center(enlarge(level, align_corners=True)) == pytest.approx(31 / 3, abs=0.02)
    ours = AnomalyMapGenerator(sigma=0)([level], (32, 32))[1][:, 0]
    assert torch.equal(ours, enlarge(level, align_corners=False))


def test_golden_score_maps_of_ours() -> None:
    """The figures' levels through our generator: near the published maps' mean, once both are on one scale."""
    log_p = [golden(f"score/logp{level}") for level in LEVELS]
    probabilities = [golden(f"score/abnormal_probability{level}") for level in LEVELS]
    ceilings = golden("score/max_logp_per_level")
    anomalies = [log_likelihood_to_anomaly(*pair) for pair in zip(log_p, ceilings, strict=True)]
    ours = AnomalyMapGenerator().double()(average_maps(anomalies, probabilities), (32, 32))[1][:, 0]
    highest = sum(enlarge((level - level.max()).exp(), align_corners=True) for level in log_p)
    assert isinstance(highest, Tensor)
    likelihood = (golden("score/map_from_logp_32px") + 3 - highest.max()) / 3  # 1 - mean, not max - sum
    published = (likelihood + golden("score/map_from_probability_32px")) / 2
    assert (ours - published).abs().max() < 0.1
    correlation = torch.corrcoef(torch.stack([ours.flatten(), published.flatten()]))[0, 1]
    assert correlation > 0.9
