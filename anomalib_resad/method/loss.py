# SPDX-License-Identifier: Apache-2.0

"""The terms of the losses, as functions of tensors: first the constraintor's, then the flow's.

Papers: ResAD (arXiv 2410.20047), sections 3.3 and 3.4, whose semi-push-pull terms are those of BGAD (CVPR 2023);
ResAD++ (arXiv 2509.23741), whose log-barrier terms follow its published code.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

OneClass = Literal["abnormal_invariant", "normal_only", "log_barrier", "log_barrier_bidirectional", "none"]
PushPull = Literal["hinge", "log_barrier"]


def _mean_or_zero(values: Tensor) -> Tensor:
    """The mean; 0, still attached to the graph, of no values."""
    return values.sum() / max(values.numel(), 1)


# -- of the constraintor ----------------------------------------------------------------------------------------------


def one_class_loss(kind: OneClass, constrained: Tensor, residual: Tensor, mask: Tensor) -> Tensor:
    """The one-class loss of a kind; see the functions below. All take the same rows.

    Args:
        kind (OneClass): ``"normal_only"`` is the abnormal-invariant loss without its abnormal term, ``"none"`` is 0.
        constrained (Tensor): Constrained residuals f, shape ``(N, C)``.
        residual (Tensor): Residuals r before the constraintor, shape ``(N, C)``.
        mask (Tensor): y, 1 for abnormal positions, shape ``(N,)``.
    """
    if kind == "none":
        return constrained.new_zeros(())
    if kind == "normal_only":
        return _mean_or_zero(pseudo_huber(constrained[mask == 0]))
    if kind == "abnormal_invariant":
        return abnormal_invariant_occ(constrained, residual, mask)
    return log_barrier_occ(constrained, residual, mask, bidirectional=kind == "log_barrier_bidirectional")


def pseudo_huber(rows: Tensor) -> Tensor:
    """How far residuals are from zero, ``sqrt(||f|| + 1) - 1``, shape ``(N, C)`` to ``(N,)``."""
    return torch.sqrt(rows.norm(dim=1) + 1) - 1


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
    shrink = pseudo_huber(constrained)
    keep = (constrained - residual).norm(dim=1)
    return _mean_or_zero(shrink[mask == 0]) + _mean_or_zero(keep[mask > 0])


def occ_radius(abnormal: Tensor, quantile: float = 0.05, floor: float = 0.1, ceiling: float = 0.4) -> Tensor:
    """Outer radius of the shell for normal residuals: nine tenths of the small abnormal ones, ``r_max``.

    The published code takes the smallest abnormal residual of the batch (``quantile`` and ``floor`` 0), so that one
    that is nearly zero, at the rim of a mask, say, squeezes all normal ones to a point. A quantile outlives
    single ones, and the floor batches with so few abnormal positions that the quantile is the smallest again.

    Args:
        abnormal (Tensor): Pseudo-Huber sizes of abnormal residuals, shape ``(N,)``; may be empty.
        quantile (float): Share of abnormal residuals that may be smaller.
        floor (float): Least radius; 0.1 is a norm of 0.21.
        ceiling (float): Largest radius, and the radius where nothing is abnormal; 0.4 is a norm of 0.96.

    Returns:
        Tensor: The radius, a scalar without gradient.
    """
    if abnormal.numel() == 0:
        return abnormal.new_tensor(ceiling)
    small = abnormal.detach().sort().values[int(quantile * abnormal.numel())]
    return (0.9 * small).clamp(floor, ceiling)


def _barrier(gap: Tensor, weighted: bool = False) -> Tensor:
    """Log-sigmoid barrier on the positive gaps, ``-log sigmoid(-gap)``, averaged over them; 0 if there are none.

    With ``weighted``, times ``exp(gap)``, so that far ones count more. The weight is no term of its own (no gradient),
    and it stops growing at a gap of 10, where it would soon overflow.
    """
    beyond = gap[gap > 0]
    weight = beyond.detach().clamp(max=10).exp() if weighted else 1
    return _mean_or_zero(weight * F.softplus(beyond))


def log_barrier_occ(
    constrained: Tensor,
    residual: Tensor,
    mask: Tensor,
    bidirectional: bool = True,
    quantile: float = 0.05,
    floor: float = 0.1,
) -> Tensor:
    """Log-barrier one-class loss: normal residuals go into a thin shell, abnormal ones stay, outside of it.

    With ``A = sqrt(||f|| + 1) - 1``: normal ``A`` above ``r_max`` are pulled down; if ``bidirectional``, those below
    ``r_min = 0.99 r_max`` are pulled up (else all could shrink to zero) and abnormal ones below ``r_max + 0.1`` pushed
    up. Abnormal residuals keep their values (mean square) and their direction (cosine).

    Args:
        constrained (Tensor): Constrained residuals f, shape ``(N, C)``.
        residual (Tensor): Residuals r before the constraintor, shape ``(N, C)``.
        mask (Tensor): y, 1 for abnormal positions, shape ``(N,)``.
        bidirectional (bool): Whether the barrier has two sides.
        quantile (float): See :func:`occ_radius`.
        floor (float): See :func:`occ_radius`.

    Returns:
        Tensor: The loss, a scalar.
    """
    size = pseudo_huber(constrained)
    normal, abnormal = size[mask == 0], size[mask > 0]
    f, r = constrained[mask > 0], residual[mask > 0]
    radius = occ_radius(abnormal, quantile, floor)
    loss = _barrier(normal - radius, weighted=True)
    loss = loss + _mean_or_zero((f - r).square()) + _mean_or_zero(1 - F.cosine_similarity(f, r, dim=1))
    if bidirectional:
        loss = loss + _barrier(0.99 * radius - normal, weighted=True) + _barrier(radius + 0.1 - abnormal, weighted=True)
    return loss


def orthogonality(rows: Tensor) -> Tensor:
    """Orthogonality term of the MLP constraintor, ``||F^T F - I||^2 / (2 C^2)`` of normal rows F, a scalar.

    Args:
        rows (Tensor): Constrained residuals of normal positions, shape ``(N, C)``. With columns of unit length the
            term is 0 for channels that are orthogonal over the positions, whatever their number.
    """
    gram = rows.T @ rows
    return (gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)).square().mean() / 2


# -- of the flow ------------------------------------------------------------------------------------------------------


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


def log_barrier_likelihood(log_p: Tensor, mask: Tensor) -> Tensor:
    """Log-barrier form of the maximum-likelihood term: mean of ``-log sigmoid(log p)`` over normal positions."""
    return _mean_or_zero(F.softplus(-log_p[mask == 0]))


def log_barrier_push_pull(log_p: Tensor, mask: Tensor, boundary: Tensor, margin: float = 0.1) -> Tensor:
    """Log-barrier form of the semi-push-pull loss, against a boundary that is averaged over batches.

    Args:
        log_p (Tensor): Log-likelihoods per channel, shape ``(N,)``.
        mask (Tensor): 1 for abnormal positions, shape ``(N,)``.
        boundary (Tensor): Normal boundary, a scalar; see :func:`average_boundary`.
        margin (float): Distance between the normal and the abnormal boundary.

    Returns:
        Tensor: The loss, a scalar.
    """
    normal, abnormal = log_p[mask == 0], log_p[mask > 0]
    # The published code counts a normal position on the boundary as one beyond it.
    pull = _mean_or_zero(F.softplus(boundary - normal[normal <= boundary]))
    return pull + _barrier(abnormal - (boundary - margin))


def flow_loss(
    kind: PushPull,
    likelihoods: tuple[Tensor, Tensor],
    mask: Tensor,
    push_pull_weight: float,
    abnormal_gaussian: bool,
    boundary: Tensor | None,
) -> Tensor:
    """All terms of one level's flow in one step.

    Args:
        kind (PushPull): Plain terms, or their log-barrier forms.
        likelihoods (tuple[Tensor, Tensor]): Log-likelihoods per channel under the normal and the abnormal Gaussian,
            shape ``(N,)``.
        mask (Tensor): 1 for abnormal positions, shape ``(N,)``.
        push_pull_weight (float): Weight of the semi-push-pull terms (lambda); 0 leaves them out.
        abnormal_gaussian (bool): Whether the abnormal Gaussian is learned too.
        boundary (Tensor | None): Averaged boundary of the log-barrier form; without one its term is left out.

    Returns:
        Tensor: The loss, a scalar.
    """
    log_p, log_p_abnormal = likelihoods
    likelihood = log_barrier_likelihood if kind == "log_barrier" else negative_log_likelihood
    loss = likelihood(log_p, mask)
    if abnormal_gaussian:
        loss = loss + likelihood(log_p_abnormal, 1 - mask) + focal(log_p, log_p_abnormal, mask)
    if not push_pull_weight:
        return loss
    if kind == "hinge":
        return loss + push_pull_weight * semi_push_pull(log_p, mask)
    if boundary is None:
        return loss
    return loss + push_pull_weight * log_barrier_push_pull(log_p, mask, boundary)


def average_boundary(average: Tensor, boundary: Tensor, momentum: float = 0.9) -> Tensor:
    """Exponential average of the boundary; NaN stands for none yet, and the first value is then the average.

    The published code starts from 0, which is far above any boundary.
    """
    return torch.where(torch.isnan(average), boundary, momentum * average + (1 - momentum) * boundary)


def abnormal_probability(log_p: Tensor, log_p_abnormal: Tensor) -> Tensor:
    """Probability of the abnormal Gaussian, the softmax over the two log-likelihoods, any shape."""
    return torch.sigmoid(log_p_abnormal - log_p)


def focal(log_p: Tensor, log_p_abnormal: Tensor, mask: Tensor, gamma: float = 2.0) -> Tensor:
    """Focal loss (arXiv 1708.02002) of the normal and the abnormal Gaussian as two classes.

    Args:
        log_p (Tensor): Log-likelihoods per channel under the normal Gaussian, shape ``(N,)``.
        log_p_abnormal (Tensor): The same under the abnormal one.
        mask (Tensor): 1 for abnormal positions, shape ``(N,)``.
        gamma (float): How much easy positions are played down.

    Returns:
        Tensor: The mean over the positions, a scalar.
    """
    toward_abnormal = log_p_abnormal - log_p
    log_q = F.logsigmoid(torch.where(mask > 0, toward_abnormal, -toward_abnormal))  # of the right class
    return -((1 - log_q.exp()) ** gamma * log_q).mean()
