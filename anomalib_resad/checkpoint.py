# SPDX-License-Identifier: Apache-2.0

"""Read a trained ResAD from a Lightning checkpoint, checked before anything is taken from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomalib_resad.safe_load import load_weights_only

# What a trained model is made of: restored from its checkpoint, whatever the constructor was given.
ARCHITECTURE = ("backbone", "layers", "match", "residual", "coupling_layers", "position_channels", "sigma")
TRAINED_PARTS = ("constraintors", "flows")


@dataclass
class TrainedResAD:
    """What a checkpoint gives.

    Attributes:
        settings (dict[str, Any]): The architecture's hyperparameters.
        model (dict[str, Any]): State dict of the torch model.
        post_processor (dict[str, Any]): State dict of the post-processor: threshold and range.
        pre_processor (dict[str, Any] | None): Configuration of the pre-processor.
    """

    settings: dict[str, Any]
    model: dict[str, Any]
    post_processor: dict[str, Any]
    pre_processor: dict[str, Any] | None


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
    state, settings = content.get("state_dict"), content.get("hyper_parameters", {})
    missing = [key for key in ARCHITECTURE if key not in settings]
    if not isinstance(state, dict) or missing:
        msg = f"{path} is no ResAD checkpoint: it lacks {missing or 'state_dict'}. Train one with `anomalib train`."
        raise ValueError(msg)
    model = _below("model.", state)
    if estimator == "distance":
        model = {key: value for key, value in model.items() if not key.startswith(TRAINED_PARTS)}
    elif not any(key.startswith(TRAINED_PARTS) for key in model):
        msg = f"{path} was never trained (estimator '{settings.get('estimator')}'): pass estimator='distance' too."
        raise ValueError(msg)
    broken = [key for key, value in model.items() if _is_broken(key, value)]
    if broken:
        msg = f"{path} holds NaN or infinity in {len(broken)} tensors (first: {broken[0]}): its training diverged."
        raise ValueError(msg)
    return TrainedResAD(
        settings={key: settings[key] for key in ARCHITECTURE},
        model=model,
        post_processor=_below("post_processor.", state),
        pre_processor=content.get("anomalib_pre_processor_config"),
    )


def _below(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """The entries of a state dict below ``prefix``, without the prefix."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _is_broken(key: str, value: Any) -> bool:  # noqa: ANN401
    """Whether a weight is not finite; the ceilings of an untrained level are NaN by design."""
    return isinstance(value, Tensor) and "ceilings" not in key and not bool(torch.isfinite(value.float()).all())
