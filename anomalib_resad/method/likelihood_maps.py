# SPDX-License-Identifier: Apache-2.0

"""From the log-likelihoods of a level to its anomaly: ResAD (arXiv 2410.20047), section 3.4, and ResAD++."""

from collections.abc import Sequence

import torch
from torch import Tensor


def log_likelihood_to_anomaly(log_p: Tensor, ceiling: Tensor) -> Tensor:
    """Anomaly of one level (ResAD, section 3.4): ``1 - exp(log p - ceiling)``, near 0 for the likeliest patches.

    The published code takes the maximum over the test set as the ceiling, so that an image's score depends on the
    other images. Here it is a constant that was learned in training.

    Args:
        log_p (Tensor): Log-likelihoods per channel, any shape.
        ceiling (Tensor): Highest log-likelihood of normal training patches, a scalar.
    """
    return 1 - torch.exp(log_p - ceiling)


def average_maps(likelihood_anomalies: Sequence[Tensor], probabilities: Sequence[Tensor]) -> list[Tensor]:
    """Average the two maps of ResAD++ level by level, so that their sum over the levels is a mean in 0..1.

    The published code sums the one over the levels and averages the other, so that they range over 0..3 and 0..1 and
    the second hardly counts. Here both are averaged. A patch that is likelier than any normal one of the training is
    as normal as these, 0: below zero it would leave the scale.

    Args:
        likelihood_anomalies (Sequence[Tensor]): Of each level, shape ``(B, H_l, W_l)``, at most 1.
        probabilities (Sequence[Tensor]): Probability of the abnormal Gaussian, of the same shapes, in 0..1.
    """
    share = 0.5 / len(probabilities)
    pairs = zip(likelihood_anomalies, probabilities, strict=True)
    return [share * (anomaly.clamp(min=0) + probability) for anomaly, probability in pairs]
