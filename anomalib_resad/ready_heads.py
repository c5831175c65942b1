# SPDX-License-Identifier: Apache-2.0

"""Heads that come with the package: what was trained, without the backbone, so that a fresh installation inspects.

A head is a file of a few hundred kilobytes, ``heads/<backbone>.safetensors``: the keys' directions, the estimator with
its statistics, the thresholds, and a card of how it was made (``python -m benchmarks.ready_heads``). It judges the
features of the weights that it was trained with and of no others. These weights come in several files, with batch norms
folded or not. So they are told by what the backbone makes of one picture, which lies in the file too.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from anomalib_resad.checkpoint import BUILT_WITH
from anomalib_resad.enrollment.files import write_whole
from anomalib_resad.method.backbone import FeaturePyramid

HEADS = Path(__file__).with_name("heads")
CARD = "card"  # metadata of the file; a single entry, because safetensors keeps no order of several
PROBE = "probe"
TRAINED = ("model.encoder.join.", "model.estimator.", "post_processor.")  # what of a ResAD is in a head
OF_PRODUCT = "post_processor.product_threshold"
PROBE_SIDE = 64


def head_file(backbone: str, folder: Path = HEADS) -> Path:
    """Where the head of a backbone is, whichever of its weights are meant (``resnet18.tv_in1k``: ``resnet18``)."""
    return folder / f"{backbone.partition('.')[0]}.safetensors"


@torch.no_grad()
def probe(backbone: FeaturePyramid) -> Tensor:
    """What tells the weights of a backbone: the mean of each channel, on one picture of waves.

    Args:
        backbone (FeaturePyramid): A backbone of convolutions, which takes any size.

    Returns:
        Tensor: On the CPU, shape ``(C_1 + C_2 + ...,)``.
    """
    device = next(backbone.parameters()).device
    steps = torch.arange(PROBE_SIDE, dtype=torch.float64) / PROBE_SIDE
    waves = [torch.sin(20 * steps[:, None] * (1 + c) + 13 * steps[None] ** 2) for c in range(3)]
    levels = backbone(torch.stack(waves)[None].float().to(device))
    return torch.cat([level.mean(dim=(0, 2, 3)) for level in levels]).cpu()


def write_head(module: Any, path: Path, about: dict[str, Any]) -> None:  # noqa: ANN401  # a ResAD
    """Write the head of a trained ResAD; the same model gives the same bytes.

    Args:
        module (Any): The ResAD.
        path (Path): The file.
        about (dict[str, Any]): What the card tells beside settings and weights: plain values only.

    Raises:
        ValueError: If something that was trained is not finite, as the threshold is where none was learned.
    """
    state = module.state_dict()
    tensors = {name: value.cpu().contiguous() for name, value in state.items() if name.startswith(TRAINED)}
    del tensors[OF_PRODUCT]
    broken = [name for name, value in tensors.items() if not bool(torch.isfinite(value.float()).all())]
    if broken:
        msg = f"No head was written: {broken} are not finite. Train on products with good and defective photos."
        raise ValueError(msg)
    backbone = module.model.encoder.backbone
    card = {
        "settings": {name: module.hparams[name] for name in (*BUILT_WITH, "rotations")},
        "weights": backbone.origin,
    }
    write_whole(path, save(tensors | {PROBE: probe(backbone)}, {CARD: json.dumps(card | about, sort_keys=True)}))


def read_card(path: Path) -> dict[str, Any]:
    """How a head was made: its settings, weights, sources and licenses, training."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[CARD])
