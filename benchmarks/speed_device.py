# SPDX-License-Identifier: Apache-2.0

"""Times in PyTorch on a device of choice: eager and compiled, in float32 and in bfloat16."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from anomalib_resad import ResAD
from benchmarks.settings import cpu
from benchmarks.speed_models import BACKBONE, Actions, Row, in_turn

WAYS = ("eager", "compiled")
PRECISIONS = {"f32": torch.float32, "bf16": torch.bfloat16}


def device_name(device: str) -> str:
    """What the device is."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu()


def device_rows(
    backbone: str, models: Mapping[str, Any], batches: Sequence[int], repeats: int, device: str
) -> list[Row]:
    """Times per batch, each over that of the backbone which is run in the same way and precision.

    Args:
        backbone (str): Its name.
        models (Mapping[str, Any]): Lightning models of whole methods, the default as ``fused`` among them.
        batches (Sequence[int]): Batch sizes.
        repeats (int): Counted rounds.
        device (str): Where they run.
    """
    default: ResAD = models["fused"]
    nets = {BACKBONE: default.model.encoder.backbone, **{name: each.model for name, each in models.items()}}
    for net in nets.values():
        net.to(device)
    rows: list[Row] = []
    for way, (precision, kind), batch in product(WAYS, PRECISIONS.items(), batches):
        torch.compiler.reset()
        photos = torch.randn(batch, 3, 224, 224, device=device)
        actions: Actions = {}
        for name, net in nets.items():
            run: Callable[[Tensor], Any] = torch.compile(net) if way == "compiled" else net
            actions[name] = partial(_run, run, photos, kind)
        runtime = f"torch {device}, {way}, {precision}"
        timed = in_turn(actions, repeats, f"{backbone}, {runtime}, batch {batch}")  # the first round compiles
        rows += [{"backbone": backbone, "runtime": runtime, "batch": batch} | row for row in timed]
    return rows


def _run(run: Callable[[Tensor], Any], photos: Tensor, kind: torch.dtype) -> None:
    with torch.no_grad(), torch.autocast(photos.device.type, kind, enabled=kind is not torch.float32):
        run(photos)
    if photos.device.type == "cuda":
        torch.cuda.synchronize()
