# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from anomalib_resad.method.codebook import Codebook, codebook_loss, match_distribution


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matching_keeps_the_order_and_takes_the_distribution(dtype: torch.dtype) -> None:
    residual, quantized = random(2, 3, 4, 5).to(dtype), random(2, 3, 4, 5, seed=1).to(dtype)
    matched = match_distribution(residual, quantized, 1.0)
    assert matched.dtype == dtype
    assert torch.equal(matched.flatten(2).argsort(dim=2), residual.flatten(2).argsort(dim=2))
    torch.testing.assert_close(matched.flatten(2).sort(dim=2).values, quantized.flatten(2).sort(dim=2).values)
    torch.testing.assert_close(match_distribution(residual, quantized, 0.0), residual)


def test_matching_does_not_see_the_other_images() -> None:
    residual, quantized = random(3, 3, 4, 5), random(3, 3, 4, 5, seed=1)
    alone = match_distribution(residual[1:2], quantized[1:2], 0.6)
    assert torch.equal(match_distribution(residual, quantized, 0.6)[1:2], alone)


def test_zeros_share_their_targets() -> None:
    """Else the order of equal values, which no runtime promises, would decide what each becomes."""
    residual = torch.tensor([0.0, 3.0, 0.0, 1.0]).reshape(1, 1, 2, 2)
    quantized = torch.tensor([4.0, 0.0, 2.0, 6.0]).reshape(1, 1, 2, 2)
    assert match_distribution(residual, quantized, 1.0).flatten().tolist() == [1.0, 6.0, 1.0, 4.0]


def test_only_normal_residuals_shape_the_codebook() -> None:
    rows, mask = random(50, 4), torch.cat([torch.zeros(40), torch.ones(10)])
    codebook = Codebook(4, 8)
    codebook.start_from(rows, torch.ones(50))
    assert not codebook.started, "abnormal residuals are no start"
    codebook.start_from(rows, mask)
    assert all(any(torch.equal(code, row) for row in rows[:40]) for code in codebook.codes)
    before = codebook.codes.detach().clone()
    codebook.start_from(rows + 1, mask)
    assert torch.equal(codebook.codes, before), "it starts once"
    loss = codebook_loss(rows, codebook.codes, mask)
    torch.testing.assert_close(loss, codebook_loss(rows[:40], codebook.codes, mask[:40]))
    loss.backward()
    assert codebook.codes.grad is not None
    assert codebook_loss(rows, codebook.codes, torch.ones(50)) == 0


def test_training_brings_codes_to_the_residuals() -> None:
    centers = torch.tensor([[0.0, 0.0], [4.0, 4.0]])
    rows = centers.repeat(20, 1) + 0.1 * random(40, 2)
    codebook = Codebook(2, 2)
    codebook.codes.data = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    optimizer = torch.optim.Adam(codebook.parameters(), lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        codebook_loss(rows, codebook.codes, torch.zeros(40)).backward()
        optimizer.step()
    torch.testing.assert_close(codebook.codes.detach(), centers, rtol=0, atol=0.2)
    restored = Codebook(2, 2)
    restored.load_state_dict(codebook.state_dict())
    residual = random(1, 2, 3, 3)
    assert torch.equal(restored(residual), codebook(residual))
