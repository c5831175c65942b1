# SPDX-License-Identifier: Apache-2.0

"""What :mod:`benchmarks.speed` times: untrained models that know some photos, and the clock that takes them in turn."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from anomalib.models import Patchcore
from rich.progress import track
from torch import Tensor

from anomalib_resad import ResAD
from anomalib_resad.enrollment.rotations import ORIENTATIONS, kept_rows
from anomalib_resad.method.bank_record import BankRecord
from anomalib_resad.method.features import as_list, rows_from_list, rows_of

Actions = dict[str, Callable[[], Any]]
Row = dict[str, Any]
BACKBONE = "backbone alone"
ROTATED = "fused, rotated product"


def in_turn(actions: Actions, repeats: int, what: str) -> list[Row]:
    """Time actions in turn: medians over the rounds; of the ratios to a round's first action the quartiles too."""
    rounds: list[list[float]] = []
    for _ in track(range(repeats + 1), what, transient=True):
        times = []
        for action in actions.values():
            start = time.perf_counter()
            action()
            times.append(1000 * (time.perf_counter() - start))
        rounds.append(times)
    counted = np.array(rounds[1:])  # the first round warms up
    ratios = np.quantile(counted / counted[:, :1], (0.25, 0.5, 0.75), axis=0)  # (3, actions)
    return [
        {"item": name, "ms": ms, "ratio": ratio, "ratio_low": low, "ratio_high": high}
        for name, ms, low, ratio, high in zip(actions, np.median(counted, axis=0), *ratios, strict=True)
    ]


def enrolled(backbone: str, photos: Tensor, orientations: int = 1, **arguments: Any) -> ResAD:  # noqa: ANN401
    """A ResAD that knows some photos, in evaluation mode.

    Args:
        backbone (str): timm model name.
        photos (Tensor): Images, shape ``(B, 3, H, W)``.
        orientations (int): Of each photo. More than one make a bank half as large again, here of the photo's own rows.
        **arguments (Any): The constructor's.
    """
    model = ResAD(backbone, pre_trained=False, visualizer=False, evaluator=False, **arguments).eval()
    bank, features = model.model.bank, model.model.encode(photos)
    photos_rows = [as_list(rows_of(features.photo(index))) for index in range(len(photos))]
    levels = []
    for level in zip(*photos_rows, strict=True):
        kept = torch.arange(kept_rows(len(level[0]), orientations)) % len(level[0])
        levels.append(torch.cat([rows[kept] for rows in level]))
    bank.store(rows_from_list(levels, bank.keyed), BankRecord(photos=len(photos), rotations=orientations))
    return model


def known(backbone: str, others: Mapping[str, dict[str, Any]], references: Tensor) -> dict[str, ResAD]:
    """The default, other models by name and arguments, and the default with a product whose photos are rotated."""
    models = {"fused": enrolled(backbone, references)}
    models |= {name: enrolled(backbone, references, **arguments) for name, arguments in others.items()}
    return models | {ROTATED: enrolled(backbone, references, ORIENTATIONS)}


def rivals(backbone: str, ratios: Sequence[float], photos: Tensor) -> dict[str, Patchcore]:
    """Patchcore of anomalib with a bank of the same photos, for each share of their rows that its coreset keeps."""
    found = {}
    for ratio in ratios:
        model = Patchcore(backbone, pre_trained=False, coreset_sampling_ratio=ratio, visualizer=False, evaluator=False)
        model.model.train()
        model.model(photos)
        model.model.subsample_embedding(ratio)
        found[f"Patchcore {ratio:g}"] = model.eval()
    return found
