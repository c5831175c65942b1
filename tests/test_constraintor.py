# SPDX-License-Identifier: Apache-2.0

from typing import get_args

import pytest
import torch
from torch import Tensor

from anomalib_resad.method.constraintor import MLP, ConstraintorKind, ConvBnReLU, make_constraintors, resize_map

CHANNELS, SIZES = (4, 6, 8), (12, 6, 3)


def levels(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(2, c, s, s + 1, generator=generator) for c, s in zip(CHANNELS, SIZES, strict=True)]


class Whole(torch.nn.Module):
    def __init__(self, kind: ConstraintorKind) -> None:
        super().__init__()
        self.fusion, self.blocks = make_constraintors(kind, CHANNELS)

    def forward(self, residuals: list[Tensor]) -> list[Tensor]:
        fused = residuals if self.fusion is None else self.fusion(residuals)
        return [block(level) for block, level in zip(self.blocks, fused, strict=True)]


@pytest.mark.parametrize("kind", get_args(ConstraintorKind))
def test_each_kind(kind: ConstraintorKind) -> None:
    """It keeps the shapes, every parameter gets a gradient, what is saved can be loaded."""
    torch.manual_seed(0)
    constraintor = Whole(kind)
    outputs = constraintor(levels())
    assert [output.shape for output in outputs] == [level.shape for level in levels()]
    parameters = dict(constraintor.named_parameters())
    assert bool(parameters) == (kind != "none")
    if parameters:
        torch.stack([(output * torch.randn_like(output)).mean() for output in outputs]).sum().backward()
    without = [name for name, value in parameters.items() if value.grad is None or not value.grad.any()]
    assert not without
    torch.manual_seed(1)
    other = Whole(kind).eval()
    other.load_state_dict(constraintor.state_dict())
    for ours, theirs in zip(constraintor.eval()(levels(1)), other(levels(1)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", get_args(ConstraintorKind))
def test_batch_composition_changes_nothing(kind: ConstraintorKind) -> None:
    constraintor = Whole(kind).eval()
    for whole, alone in zip(constraintor(levels()), constraintor([level[1:] for level in levels()]), strict=True):
        torch.testing.assert_close(whole[1:], alone)


def test_conv_bn_relu_starts_from_the_identity() -> None:
    residual = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    constrained = ConvBnReLU(4).train()(residual)
    deviation = residual.var(dim=(0, 2, 3), unbiased=False, keepdim=True).add(1e-5).sqrt()
    expected = ((residual - residual.mean(dim=(0, 2, 3), keepdim=True)) / deviation).relu()
    torch.testing.assert_close(constrained, expected, rtol=0, atol=1e-5)


def test_mlp_starts_from_the_identity() -> None:
    residual = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(MLP(4)(residual), residual)


def test_fused_levels_meet_at_the_same_place() -> None:
    """A patch of one level reaches the patches of the others that cover the same pixels."""
    grid = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert resize_map(grid, (4, 4)) is grid
    assert resize_map(grid, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    hot = torch.zeros(1, 1, 2, 2)
    hot[0, 0, 1, 0] = 1
    assert resize_map(hot, (4, 4))[0, 0, 3, 0] == 1
    assert resize_map(hot, (4, 4))[0, 0, :, 3].sum() == 0
