# SPDX-License-Identifier: Apache-2.0

"""What the processes of a distributed training must agree on. With one process, these functions change nothing."""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn


def is_distributed() -> bool:
    """Whether there are several processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def largest(value: Tensor) -> Tensor:
    """The largest value of all processes, a new tensor of the same shape."""
    if not is_distributed():
        return value
    value = value.clone()
    distributed.all_reduce(value, distributed.ReduceOp.MAX)
    return value


def total(value: Tensor) -> Tensor:
    """The sum over the processes, a new tensor of the same shape."""
    if not is_distributed():
        return value
    value = value.clone()
    distributed.all_reduce(value)
    return value


def mean_of_known(value: Tensor) -> Tensor:
    """The mean over the processes whose value is not NaN, a new scalar; NaN if there is none."""
    if not is_distributed():
        return value
    total = torch.stack([torch.nan_to_num(value), (~torch.isnan(value)).to(value.dtype)])
    distributed.all_reduce(total)
    return total[0] / total[1]


def take_from_first(*tensors: Tensor) -> None:
    """Overwrite tensors by those of the first process."""
    if is_distributed():
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


@torch.no_grad()
def average_batch_norms(modules: Iterable[nn.Module]) -> None:
    """Average the running statistics of batch norms.

    Each process normalizes by its own images (PyTorch's SyncBatchNorm, Lightning's ``sync_batchnorm=True``, is for GPUs
    alone); what is kept for evaluation must be the same in all, and is better estimated by all.
    """
    if not is_distributed():
        return
    for module in modules:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # the base class of all of them
            for statistic in (module.running_mean, module.running_var):
                if statistic is not None:
                    distributed.all_reduce(statistic)
                    statistic.div_(distributed.get_world_size())
