# SPDX-License-Identifier: Apache-2.0

"""What the API says about products, and errors that name no folders of the server."""

from typing import Any

import numpy as np
from fastapi import HTTPException

from anomalib_resad.deploy.bank import USED, Bank, product_name
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.deploy.messages import printable, without_folders
from anomalib_resad.deploy.prediction import scales_of
from anomalib_resad.enrollment.photos import Reference


def known(inferencer: ResADInferencer, name: str) -> str:
    """The name of a product that is enrolled.

    Raises:
        HTTPException: If it is not (404).
        ValueError: If it cannot be a name.
    """
    name = product_name(name)
    if name not in inferencer.products:
        raise HTTPException(404, f"{name!r} is not enrolled.")
    return name


def about(inferencer: ResADInferencer, bank: Bank) -> dict[str, Any]:
    """A product as JSON."""
    used = bank.arrays.get(USED, np.empty(0))
    return {
        "product": bank.product,
        "photos": _listed(bank.references),
        "rotations": bank.rotations,
        "bit_depth": bank.bit_depth,
        "threshold": threshold_told(inferencer, bank),
        "own_threshold": bank.threshold is not None,
        "false_alarm_rate": bank.false_alarm_rate,
        "min_area": bank.min_area,
        "region": None if bank.region is None else round(float(bank.region.mean()), 6),
        "taught": {"photos": _listed(bank.taught), "patches": len(used), "counting": int(used.sum())},
    }


def threshold_told(inferencer: ResADInferencer, bank: Bank) -> float | None:
    """On the scale of the raw score; ``None`` where the model has none."""
    threshold = float(scales_of(inferencer.manifest, bank)[0][0])
    return None if np.isnan(threshold) else threshold


def public(inferencer: ResADInferencer, error: Exception) -> str:
    """An error's text, without the server's folders."""
    return printable(without_folders(str(error), (inferencer.banks, inferencer.bundle)))


def _listed(photos: tuple[Reference, ...]) -> list[dict[str, str]]:
    return [{"name": each.name, "sha256": each.sha256} for each in photos]
