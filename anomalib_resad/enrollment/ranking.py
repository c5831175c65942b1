# SPDX-License-Identifier: Apache-2.0

"""How well scores rank photos. No torch: benchmarks of the edge use it too."""

from collections.abc import Sequence

import numpy as np


def auroc(scores: Sequence[float], anomalous: Sequence[bool]) -> float | None:
    """Area under the ROC curve: how often an anomalous photo scores higher than a good one; ties count half.

    Args:
        scores (Sequence[float]): One score per photo.
        anomalous (Sequence[bool]): Whether each photo is anomalous.

    Returns:
        float | None: 0 to 1; ``None`` where the photos are all good or all anomalous.
    """
    good = np.array([score for score, bad in zip(scores, anomalous, strict=True) if not bad])
    bad = np.array([score for score, bad in zip(scores, anomalous, strict=True) if bad])
    if not len(good) or not len(bad):
        return None
    difference = bad[:, None] - good[None]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))
