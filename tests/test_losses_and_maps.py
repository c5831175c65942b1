# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from anomalib_resad.method.anomaly_map import AnomalyMapGenerator
from anomalib_resad.method.loss import abnormal_invariant_occ, negative_log_likelihood, semi_push_pull
from anomalib_resad.method.residual_flow import ResidualFlow


def test_occ_by_hand() -> None:
    f = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 1.0]])
    r = torch.tensor([[0.0, 0.0], [5.0, 5.0], [4.0, 5.0]])
    loss = abnormal_invariant_occ(f, r, torch.tensor([0.0, 0.0, 1.0]))
    assert math.isclose(loss.item(), ((math.sqrt(6) - 1) + 0) / 2 + 5, rel_tol=1e-6)


def test_occ_has_finite_gradients_at_zero() -> None:
    f = torch.zeros(4, 3, requires_grad=True)
    abnormal_invariant_occ(f, torch.zeros(4, 3), torch.tensor([0, 0, 1, 1])).backward()
    assert f.grad is not None
    assert torch.isfinite(f.grad).all()


def test_semi_push_pull_by_hand() -> None:
    normal = torch.linspace(0, 1, 41)  # the 5 % quantile is the third: 0.05; below it 0 and 0.025
    abnormal = torch.tensor([-3.0, 0.0, 0.5])  # above 0.05 - 0.1 = -0.05: two
    log_p = torch.cat([normal, abnormal]).requires_grad_()
    mask = torch.cat([torch.zeros(41), torch.ones(3)])
    loss = semi_push_pull(log_p, mask)
    assert math.isclose(loss.item(), (0.05 + 0.025) / 2 + (0.05 + 0.55) / 2, rel_tol=1e-5)
    loss.backward()
    assert log_p.grad is not None
    assert log_p.grad[2] == 0, "no gradient flows through the boundary"
    assert log_p.grad[41] == 0, "an abnormal position far below is left alone"
    assert log_p.grad[43] > 0


def test_losses_without_normal_or_abnormal_positions() -> None:
    log_p = torch.randn(8, requires_grad=True)
    for mask in (torch.zeros(8), torch.ones(8)):
        loss = semi_push_pull(log_p, mask) + negative_log_likelihood(log_p, mask)
        loss.backward()
        assert torch.isfinite(loss)


def test_score_is_the_maximum_of_the_summed_levels() -> None:
    generator = AnomalyMapGenerator(sigma=0)
    score, anomaly_map = generator([torch.full((1, 4, 4), 0.25), torch.full((1, 2, 2), 0.5)], (8, 8))
    assert anomaly_map.shape == (1, 1, 8, 8)
    assert torch.allclose(anomaly_map, torch.tensor(0.75))
    assert torch.allclose(score, torch.tensor([0.75]))


def test_ceiling_is_a_moving_average() -> None:
    flow = ResidualFlow([4], coupling_layers=1, position_channels=0)
    for value in (0.0, 1.0):
        flow.update_ceiling(0, torch.tensor([value]), torch.tensor([0]))
    assert flow.ceilings.item() == pytest.approx(0.1)
    flow.update_ceiling(0, torch.tensor([9.0]), torch.tensor([1]))
    assert flow.ceilings.item() == pytest.approx(0.1)
