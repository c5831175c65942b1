# SPDX-License-Identifier: Apache-2.0

"""The default model and the two published methods as settings of one model.

``resad`` is the conference paper (NeurIPS 2024, arXiv 2410.20047), ``resad++`` its successor (IJCV 2026, arXiv
2509.23741) as published in code (github.com/xcyao00/ResAD, commit 0afc30e). ``fused`` is this
package's default: the levels are joined and matched once, and a small head judges the residuals, together with their
length; benchmarks/experiments.md has what led to it. Each setting is a constructor argument of
:class:`~anomalib_resad.lightning_model.ResAD`, so that every ablation is one more argument.
"""

from collections.abc import Mapping
from typing import Any, Literal

Variant = Literal["fused", "resad", "resad++"]

# Settings of training and enrollment, not of the model between them.
TRAINING = ("lr", "synthetic", "warmup", "rotations")

VARIANTS: dict[str, dict[str, Any]] = {
    "fused": {
        "estimator": "fused",
        "projection": 64,
        "synthetic": 0.5,
        "match": "cosine",
        "residual": "difference",
        "constraintor": "none",
        "occ": "none",
        "coupling_layers": 0,
        "position_channels": 0,
        "codebook_size": 0,
        "efdm": 0.0,
        "abnormal_gaussian": False,
        "push_pull": "hinge",
        "warmup": 0.0,
        "rotations": "auto",
        "lr": 3e-4,
    },
    "resad": {
        "estimator": "flow",
        "projection": 0,
        "synthetic": 0.0,
        "match": "l2",
        "residual": "difference",
        "constraintor": "conv_bn_relu",
        "occ": "abnormal_invariant",
        "coupling_layers": 8,
        "position_channels": 256,
        "codebook_size": 0,
        "efdm": 0.0,
        "abnormal_gaussian": False,
        "push_pull": "hinge",
        "warmup": 0.0,
        "rotations": 1,
        "lr": 1e-5,
    },
    "resad++": {
        "estimator": "flow",
        "projection": 0,
        "synthetic": 0.0,
        "match": "cosine",
        "residual": "squared",
        "constraintor": "conv_bn_relu",
        "occ": "log_barrier_bidirectional",
        "coupling_layers": 10,
        "position_channels": 256,
        "codebook_size": 1536,
        "efdm": 0.6,
        "abnormal_gaussian": True,
        "push_pull": "log_barrier",
        "warmup": 0.1,
        "rotations": 1,
        "lr": 1e-5,
    },
}


def resolve(variant: str, given: Mapping[Any, Any]) -> dict[str, Any]:
    """Fill the settings that were not given with the variant's.

    Args:
        variant (str): ``"fused"``, ``"resad"`` or ``"resad++"``.
        given (Mapping[Any, Any]): Settings; ``None`` for the variant's value.

    Returns:
        dict[str, Any]: All settings of the variant, plain values.

    Raises:
        ValueError: If there is no such variant.
    """
    check_known("variant", variant, tuple(VARIANTS))
    return {key: value if given.get(key) is None else given[key] for key, value in VARIANTS[variant].items()}


def check_known(argument: str, value: object, known: tuple[Any, ...]) -> None:
    """Refuse a value that an argument does not have.

    Raises:
        ValueError: If ``value`` is not among the known ones; the message lists them.
    """
    if value not in known:
        msg = f"{argument}='{value}' is not known; use one of {known}."
        raise ValueError(msg)
