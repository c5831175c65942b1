# SPDX-License-Identifier: Apache-2.0

"""Read a trained ResAD from a Lightning checkpoint, checked before anything is taken from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomalib_resad.safe_load import load_weights_only
from anomalib_resad.variants import VARIANTS

# What a trained model is made of: restored from its checkpoint, whatever the constructor was given.
# (`occ` and `push_pull` are losses, but training may go on from a checkpoint, whose boundary is kept with it.)
ARCHITECTURE = (
    "backbone",
    "layers",
    "match",
    "residual",
    "constraintor",
    "occ",
    "coupling_layers",
    "position_channels",
    "codebook_size",
    "efdm",
    "abnormal_gaussian",
    "push_pull",
    "sigma",
)
# Settings that checkpoints from before there were variants lack: those were all the first.
ADDED = ("constraintor", "occ", "codebook_size", "efdm", "abnormal_gaussian", "push_pull")
EARLIER = {"variant": "resad"} | {key: VARIANTS["resad"][key] for key in ADDED}
TRAINED_PARTS = ("codebooks", "fusion", "constraintors", "flows", "boundaries")


@dataclass
class TrainedResAD:
    """What a checkpoint gives.

    Attributes:
        settings (dict[str, Any]): The architecture's hyperparameters, and the variant's name.
        model (dict[str, Any]): State dict of the torch model.
        post_processor (dict[str, Any]): State dict of the post-processor: threshold and range.
        pre_processor (dict[str, Any] | None): Configuration of the pre-processor.
    """

    settings: dict[str, Any]
    model: dict[str, Any]
    post_processor: dict[str, Any]
    pre_processor: dict[str, Any] | None


def architecture(hyper_parameters: dict[str, Any]) -> dict[str, Any]:
    """The settings that a checkpoint's model was built with, and its variant's name; empty if it holds none."""
    found = {key: hyper_parameters[key] for key in ("variant", *ARCHITECTURE) if key in hyper_parameters}
    return EARLIER | found if found else {}


def read_trained(path: Path, estimator: str) -> TrainedResAD:
    """Read a checkpoint.

    Args:
        path (Path): The checkpoint.
        estimator (str): ``"flow"`` if the trained parts are wanted, ``"distance"`` if not.

    Raises:
        ValueError: If the file is damaged, unsafe, no ResAD, never trained, or of a training that diverged.
        FileNotFoundError: If there is no such file.
    """
    content = load_weights_only(path, what="trained ResAD")
    state, hyper_parameters = content.get("state_dict"), content.get("hyper_parameters", {})
    settings = architecture(hyper_parameters)
    missing = [key for key in ARCHITECTURE if key not in settings]
    if not isinstance(state, dict) or missing:
        msg = f"{path} is no ResAD checkpoint: it lacks {missing or 'state_dict'}. Train one with `anomalib train`."
        raise ValueError(msg)
    model = _below("model.", state)
    if estimator == "distance":
        model = {key: value for key, value in model.items() if not key.startswith(TRAINED_PARTS)}
    elif not any(key.startswith(TRAINED_PARTS) for key in model):
        made_with = hyper_parameters.get("estimator")
        msg = f"{path} was never trained (estimator '{made_with}'): pass estimator='distance' too."
        raise ValueError(msg)
    broken = [key for key, value in model.items() if _is_broken(key, value)]
    if broken:
        msg = f"{path} holds NaN or infinity in {len(broken)} tensors (first: {broken[0]}): its training diverged."
        raise ValueError(msg)
    return TrainedResAD(
        settings=settings,
        model=model,
        post_processor=_below("post_processor.", state),
        pre_processor=content.get("anomalib_pre_processor_config"),
    )


def _below(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """The entries of a state dict below ``prefix``, without the prefix."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _is_broken(key: str, value: Any) -> bool:  # noqa: ANN401
    """Whether a weight is not finite; ceilings and boundaries of an untrained level are NaN by design."""
    by_design = key in {"anomaly_map.ceilings", "boundaries"}
    return isinstance(value, Tensor) and not by_design and not bool(torch.isfinite(value.float()).all())
