# SPDX-License-Identifier: Apache-2.0

"""The optimizer of all methods: ResAD (arXiv 2410.20047), section 4.1."""

from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from anomalib_resad.method.estimators import Estimator

EPOCHS = 100  # the paper's, where the trainer knows no end


def adam_with_milestones(
    estimator: Estimator, lr: float, weight_decay: float, max_epochs: int | None
) -> OptimizerLRScheduler:
    """Adam; the learning rate is multiplied by 0.1 after 70 % and after 90 % of the epochs.

    One optimizer serves all parts, since their losses share no parameter.

    Args:
        estimator (Estimator): What is trained.
        lr (float): Learning rate.
        weight_decay (float): Weight decay, but for parameters that the estimator excludes.
        max_epochs (int | None): Epochs of the training; ``None`` or a negative number if the trainer knows no end.
    """
    decayed, exempt = estimator.parameter_groups()
    groups: list[dict[str, Any]] = [{"params": decayed}]
    if exempt:
        groups.append({"params": exempt, "weight_decay": 0.0})
    optimizer = torch.optim.Adam(groups, lr=lr, weight_decay=weight_decay)
    epochs = epochs_of(max_epochs)
    milestones = sorted({max(1, int(0.7 * epochs)), max(1, int(0.9 * epochs))})
    return {
        "optimizer": optimizer,
        "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1),
    }


def epochs_of(max_epochs: int | None) -> int:
    """Epochs of a training; the paper's where the trainer knows no end."""
    return max_epochs if max_epochs and max_epochs > 0 else EPOCHS
