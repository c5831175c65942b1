# SPDX-License-Identifier: Apache-2.0

import io

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from anomalib_resad.method.flow import PositionFlow, position_encoding


def bent_flow(position_channels: int = 8) -> PositionFlow:
    """A flow far from the identity: subnets with large outputs, permutations that are exact in float64."""
    torch.manual_seed(0)
    flow = PositionFlow(6, coupling_layers=3, position_channels=position_channels).double()
    for module in flow.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.8)
    for block in flow.blocks.module_list:
        block.w_perm.data = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
        block.w_perm_inv.data = block.w_perm.data.T.contiguous()
    return flow


def vectors(count: int, position_channels: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Random patch vectors and, for a conditional flow, their conditions."""
    x = torch.randn(count, 6, dtype=torch.float64)
    return x, torch.randn(count, position_channels, dtype=torch.float64) if position_channels else None


@pytest.mark.parametrize("position_channels", [0, 8])
def test_inverse(position_channels: int) -> None:
    flow = bent_flow(position_channels)
    x, positions = vectors(5, position_channels)
    z, _ = flow.transform(x, positions)
    back, _ = flow.blocks(z, [positions] if position_channels else None, rev=True)
    assert (z - x).abs().max() > 0.5
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("position_channels", [0, 8])
def test_log_determinant_and_likelihood_against_autograd(position_channels: int) -> None:
    flow = bent_flow(position_channels)
    x, positions = vectors(4, position_channels)
    z, log_det = flow.transform(x, positions)
    for index in range(4):
        where = positions[index : index + 1] if positions is not None else None

        def one(vector: torch.Tensor, where: torch.Tensor | None = where) -> torch.Tensor:
            return flow.transform(vector[None], where)[0][0]

        jacobian = torch.autograd.functional.jacobian(one, x[index])
        torch.testing.assert_close(log_det[index], torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-9)
    normal = MultivariateNormal(torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64))
    expected = (normal.log_prob(z) + log_det) / 6
    torch.testing.assert_close(flow.log_likelihood(x, positions), expected, rtol=0, atol=1e-9)


def test_every_parameter_gets_a_gradient() -> None:
    flow = bent_flow()
    flow(torch.randn(2, 6, 3, 4, dtype=torch.float64)).mean().backward()
    without = [name for name, value in flow.named_parameters() if value.requires_grad and value.grad is None]
    assert not without


def test_map_is_laid_out_as_the_image() -> None:
    """Each patch meets the encoding of its own row and column, in a non-square map, in every image of a batch."""
    flow = bent_flow().float()
    features = torch.randn(2, 6, 3, 5)
    grid = position_encoding(8, 3, 5).reshape(3, 5, 8)
    whole = flow(features)
    for image, row, column in ((0, 0, 0), (0, 2, 1), (1, 1, 4)):
        alone = flow.log_likelihood(features[image, :, row, column][None], grid[row, column][None])
        torch.testing.assert_close(whole[image, row, column], alone[0], rtol=0, atol=1e-5)


def test_positions_are_kept_and_follow_the_size() -> None:
    flow = PositionFlow(6, coupling_layers=1, position_channels=8)
    first = flow.positions(3, 5)
    assert flow.positions(3, 5) is first
    assert flow.positions(4, 4).shape == (16, 8)
    assert not [key for key in flow.state_dict() if "position" in key]


def test_can_be_pickled() -> None:
    """anomalib's torch export pickles the whole model."""
    flow = bent_flow().float()
    x = torch.randn(1, 6, 2, 2)
    buffer = io.BytesIO()
    torch.save(flow, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), flow(x))


def test_wrong_number_of_position_channels() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        position_encoding(6, 2, 2)
