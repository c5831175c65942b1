# SPDX-License-Identifier: Apache-2.0

"""The default method and the two published ones as settings of the parts that they are made of.

``resad`` is the conference paper (NeurIPS 2024, arXiv 2410.20047), ``resad++`` its successor (IJCV 2026, arXiv
2509.23741) as published in code (github.com/xcyao00/ResAD, commit 0afc30e). ``fused`` is this package's default: the
levels are joined and matched once, and a small head judges the residuals, together with two distances;
benchmarks/experiments.md has what led to it.

A method has the settings that stand under its name and no others. The names are those of the constructor of
:class:`~anomalib_resad.lightning_model.ResAD`, so that an ablation is one more argument.
"""

from collections.abc import Mapping
from typing import Any, Literal

Variant = Literal["fused", "resad", "resad++"]
EstimatorKind = Literal["head", "flow", "distance"]

_RESAD: dict[str, Any] = {
    "estimator": "flow",
    "match": "l2",
    "projection": 0,
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
    "push_pull_weight": 1.0,
    "flow_batch_size": 8192,
    "flow_steps": None,
    "synthetic": 0.0,
    "rotations": 1,
    "lr": 1e-5,
    "weight_decay": 5e-4,
}

PRESETS: dict[str, dict[str, Any]] = {
    "fused": {
        "estimator": "head",
        "match": "cosine",
        "projection": 64,
        "synthetic": 0.5,
        "rotations": "auto",
        "lr": 3e-4,
        "weight_decay": 5e-4,
    },
    "resad": _RESAD,
    "resad++": _RESAD
    | {
        "match": "cosine",
        "residual": "squared",
        "occ": "log_barrier_bidirectional",
        "coupling_layers": 10,
        "codebook_size": 1536,
        "efdm": 0.6,
        "abnormal_gaussian": True,
        "push_pull": "log_barrier",
        "warmup": 0.1,
    },
}

# Settings of training and enrollment, not of the model between them.
PROCEDURE = ("synthetic", "rotations", "lr", "weight_decay")
# Settings of the flow that only training reads: they may change when a training goes on.
FLOW_TRAINING = ("warmup", "push_pull_weight", "flow_batch_size", "flow_steps")
# What the plain distance has of a method's settings.
OF_DISTANCE = ("estimator", "match", "projection", "rotations")
SETTINGS = tuple(_RESAD)
# Settings that decide what a trained model computes.
ARCHITECTURE = tuple(name for name in SETTINGS if name not in PROCEDURE + FLOW_TRAINING)


def settings_of(variant: str, estimator: str | None = None) -> dict[str, Any]:
    """The settings that a method has, with its values.

    Args:
        variant (str): ``"fused"``, ``"resad"`` or ``"resad++"``.
        estimator (str | None): ``"distance"`` for the plain distance of the method's features.

    Raises:
        ValueError: If there is no such variant, or the variant has no such estimator.
    """
    check_known("variant", variant, tuple(PRESETS))
    settings = PRESETS[variant]
    if estimator == "distance":
        return {name: settings[name] for name in OF_DISTANCE} | {"estimator": "distance"}
    if estimator is not None:
        check_known("estimator", estimator, (settings["estimator"], "distance"))
    return dict(settings)


def resolve(variant: str, given: Mapping[Any, Any]) -> dict[str, Any]:
    """Fill the settings that were not given with the method's.

    Args:
        variant (str): ``"fused"``, ``"resad"`` or ``"resad++"``.
        given (Mapping[Any, Any]): Settings by name, others are ignored; ``None`` stands for the method's value.

    Returns:
        dict[str, Any]: All settings that there are; ``None`` for those that the method does not have.

    Raises:
        ValueError: If there is no such variant, or the method does not have a setting that was given.
    """
    own = settings_of(variant, given.get("estimator"))
    check_belong(variant, own, given)
    filled = {name: value if given.get(name) is None else given[name] for name, value in own.items()}
    return dict.fromkeys(SETTINGS) | filled


def check_belong(variant: str, own: Mapping[str, Any], given: Mapping[Any, Any]) -> None:
    """Refuse settings that were given and are not among a method's own.

    Raises:
        ValueError: If there is one; the message names the methods that have it.
    """
    foreign = [name for name in SETTINGS if given.get(name) is not None and name not in own]
    if not foreign:
        return
    method = "estimator='distance'" if own["estimator"] == "distance" else f"variant='{variant}'"
    having = [f"'{name}'" for name, settings in PRESETS.items() if foreign[0] in settings]
    listed = ", ".join(f"{name}={given[name]!r}" for name in foreign)
    msg = (
        f"{method} has no {listed}: leave out what it does not have, or choose a method that has it "
        f"({foreign[0]}: variant {' or '.join(having)}, trained). {method} has: {', '.join(own)}."
    )
    raise ValueError(msg)


def check_known(argument: str, value: object, known: tuple[Any, ...]) -> None:
    """Refuse a value that an argument does not have.

    Raises:
        ValueError: If ``value`` is not among the known ones; the message lists them.
    """
    if value not in known:
        msg = f"{argument}='{value}' is not known; use one of {known}."
        raise ValueError(msg)
