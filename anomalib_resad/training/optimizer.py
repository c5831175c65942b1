# SPDX-License-Identifier: Apache-2.0

"""The optimizer of all methods: ResAD (arXiv 2410.20047), section 4.1."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from anomalib_resad.method.estimators import Estimator

EPOCHS = 100  # the paper's, where the trainer knows no end


def adam_with_milestones(
    estimator: Estimator, settings: Mapping[str, Any], max_epochs: int | None
) -> OptimizerLRScheduler:
    """Adam; the learning rate is multiplied by 0.1 after 70 % and after 90 % of the epochs.

    One optimizer serves all parts, since their losses share no parameter.

    Args:
        estimator (Estimator): What is trained.
        settings (Mapping[str, Any]): ``lr`` and ``weight_decay``; the estimator may except parameters from decay.
        max_epochs (int | None): Epochs of the training; ``None`` or a negative number if the trainer knows no end.
    """
    decayed, exempt = estimator.parameter_groups()
    groups: list[dict[str, Any]] = [{"params": decayed}]
    if exempt:
        groups.append({"params": exempt, "weight_decay": 0.0})
    optimizer = torch.optim.Adam(groups, lr=settings["lr"], weight_decay=settings["weight_decay"])
    epochs = epochs_of(max_epochs)
    milestones = sorted({max(1, int(0.7 * epochs)), max(1, int(0.9 * epochs))})
    return {
        "optimizer": optimizer,
        "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1),
    }


def epochs_of(max_epochs: int | None) -> int:
    """Epochs of a training; the paper's where the trainer knows no end."""
    return max_epochs if max_epochs and max_epochs > 0 else EPOCHS


def take_steps(
    steps: Iterator[dict[str, Tensor]],
    optimizer: Any,  # noqa: ANN401  # Lightning wraps it
    backward: Callable[[Tensor], None],
) -> dict[str, Tensor]:
    """Minimize the sum of the losses of each step, one after the other.

    Args:
        steps (Iterator[dict[str, Tensor]]): Losses of each step by name.
        optimizer (Any): The optimizer.
        backward (Callable[[Tensor], None]): Computes the gradients; Lightning's, for its strategies.

    Returns:
        dict[str, Tensor]: The losses of the last step without gradient, under ``train_<name>``.
    """
    losses: dict[str, Tensor] = {}
    for losses in steps:
        optimizer.zero_grad()
        backward(torch.stack([*losses.values()]).sum())
        optimizer.step()
    return {f"train_{name}": loss.detach() for name, loss in losses.items()}
