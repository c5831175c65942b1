# SPDX-License-Identifier: Apache-2.0

"""Figures of the published code (float64, fixed seeds), copied from the project's reference figures."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from anomalib_resad.constraintor import ConvBnReLU
from anomalib_resad.flow import PositionFlow, position_encoding
from anomalib_resad.loss import abnormal_invariant_occ, normal_boundary
from anomalib_resad.reference_bank import match
from anomalib_resad.torch_model import residual

FIGURES = np.load(Path(__file__).parent / "data" / "golden.npz")


def golden(key: str) -> Tensor:
    return torch.from_numpy(FIGURES[key])


def state(prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): golden(key) for key in FIGURES.files if key.startswith(prefix)}


def test_golden_match_and_residual() -> None:
    """The published code matches by cosine."""
    features = golden("match/features")
    matched = match(features, golden("match/bank"), "cosine")
    assert torch.equal(matched, golden("match/matched"))
    assert torch.equal(residual(features, matched), golden("match/residual_difference"))
    torch.testing.assert_close(residual(features, matched, "squared"), golden("match/residual_squared"))


def test_golden_position_encoding() -> None:
    encoding = position_encoding(16, 5, 7).T.reshape(16, 5, 7)
    torch.testing.assert_close(encoding, golden("position/16x5x7"), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "position_channels"), [("conditional", 8), ("plain", 0)])
def test_golden_flow(kind: str, position_channels: int) -> None:
    flow = PositionFlow(16, coupling_layers=2, position_channels=position_channels).double()
    flow.blocks.load_state_dict(state(f"flownet/{kind}/state/"))
    z, log_det = flow.transform(golden(f"flownet/{kind}/input"), golden(f"flownet/{kind}/condition"))
    torch.testing.assert_close(z, golden(f"flownet/{kind}/z"), rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det, golden(f"flownet/{kind}/logdet"), rtol=0, atol=1e-9)


def test_golden_log_likelihood_per_channel() -> None:
    """Scale of the likelihoods: nats per channel."""

    class Given(PositionFlow):
        def transform(self, vectors: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
            del positions
            return vectors, golden("flow/logdet")

    log_p = Given(16, coupling_layers=1, position_channels=0).log_likelihood(golden("flow/z"), None)
    torch.testing.assert_close(log_p, golden("flow/logp_normal"), rtol=0, atol=1e-9)
    assert math.isclose(
        normal_boundary(log_p[golden("flow/mask") == 0], 0.05), golden("flow/normal_boundary_beta_0.05"), abs_tol=1e-9
    )


def test_golden_constraintor() -> None:
    constraintor = ConvBnReLU(4).double().eval()
    constraintor.load_state_dict(state("constraintor/state/l1_proj."))
    with torch.no_grad():
        output = constraintor(golden("constraintor/input1"))
    torch.testing.assert_close(output, golden("constraintor/output1"), rtol=0, atol=1e-9)


def test_golden_occ_of_normal_positions() -> None:
    features = golden("occ/features")
    loss = abnormal_invariant_occ(features, torch.zeros_like(features), torch.zeros(len(features)))
    torch.testing.assert_close(loss, golden("occ/pseudo_huber_normal_only"), rtol=0, atol=1e-9)
