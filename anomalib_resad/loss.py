# SPDX-License-Identifier: Apache-2.0

"""The terms of the losses, as functions of tensors.

Paper: ResAD (arXiv 2410.20047), sections 3.3 and 3.4; the semi-push-pull terms are those of BGAD (CVPR 2023).
"""

import torch
from torch import Tensor


def _mean_or_zero(values: Tensor) -> Tensor:
    """The mean; 0, still attached to the graph, of no values."""
    return values.sum() / max(values.numel(), 1)


def abnormal_invariant_occ(constrained: Tensor, residual: Tensor, mask: Tensor) -> Tensor:
    """Abnormal-invariant one-class loss: normal residuals shrink, abnormal ones stay what they are.

    ``(1 - y) (sqrt(||f|| + 1) - 1) + y ||f - r||``, each term averaged over its own positions, as in the published
    code: averaged over all, the abnormal term would all but vanish, since about one position in fifty is abnormal.

    Args:
        constrained (Tensor): Constrained residuals f, shape ``(N, C)``.
        residual (Tensor): Residuals r before the constraintor, shape ``(N, C)``.
        mask (Tensor): y, 1 for abnormal positions, shape ``(N,)``.

    Returns:
        Tensor: The loss, a scalar.
    """
    shrink = torch.sqrt(constrained.norm(dim=1) + 1) - 1
    keep = (constrained - residual).norm(dim=1)
    return _mean_or_zero(shrink[mask == 0]) + _mean_or_zero(keep[mask > 0])


def normal_boundary(log_p: Tensor, quantile: float = 0.05) -> Tensor:
    """The log-likelihood below which the given share of normal positions lies; no gradient flows through it.

    Args:
        log_p (Tensor): Log-likelihoods of normal positions, shape ``(N,)``, ``N > 0``.
        quantile (float): The share.
    """
    return log_p.detach().sort().values[int(quantile * log_p.shape[0])]


def semi_push_pull(log_p: Tensor, mask: Tensor, quantile: float = 0.05, margin: float = 0.1) -> Tensor:
    """Boundary-guided semi-push-pull loss.

    Normal positions below the boundary ``b`` (the ``quantile`` of the normal ones) are pulled up to it, abnormal ones
    above ``b - margin`` are pushed down to that; each term is the mean over the positions that violate it.

    Args:
        log_p (Tensor): Log-likelihoods per channel, shape ``(N,)``.
        mask (Tensor): 1 for abnormal positions, shape ``(N,)``.
        quantile (float): Share of normal positions below the boundary.
        margin (float): Distance between the normal and the abnormal boundary.

    Returns:
        Tensor: The loss, a scalar; 0 where there is no normal position.
    """
    normal, abnormal = log_p[mask == 0], log_p[mask > 0]
    if normal.numel() == 0:
        return log_p.sum() * 0
    boundary = normal_boundary(normal, quantile)
    pull = boundary - normal[normal < boundary]
    push = abnormal[abnormal > boundary - margin] - (boundary - margin)
    return _mean_or_zero(pull) + _mean_or_zero(push)


def negative_log_likelihood(log_p: Tensor, mask: Tensor) -> Tensor:
    """Maximum-likelihood term: mean of ``-log p`` over the normal positions, a scalar."""
    return _mean_or_zero(-log_p[mask == 0])
