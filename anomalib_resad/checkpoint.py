# SPDX-License-Identifier: Apache-2.0

"""A trained ResAD in a Lightning checkpoint: checked when it is read, also where an earlier version wrote it."""

import io
import logging
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from anomalib.pre_processing import PreProcessor
from torch import Tensor

from anomalib_resad.checkpoint_io import REQUIRED, WHAT, parse_checkpoint, read_checkpoint
from anomalib_resad.method.presets import (
    ARCHITECTURE,
    FLOW_TRAINING,
    OF_DISTANCE,
    PRESETS,
    PROCEDURE,
    SETTINGS,
    check_belong,
    resolve,
    settings_of,
)
from anomalib_resad.method.safe_load import read_file
from anomalib_resad.post_processor import RankKeepingPostProcessor
from anomalib_resad.torch_model import BUILD_ARGUMENTS, build

logger = logging.getLogger(__name__)

# What a trained model is made of beside its method: restored from its checkpoint, whatever the constructor was given.
BUILT_WITH = ("variant", "backbone", "layers", "sigma", "image_size", *ARCHITECTURE)

# Version 0.1.0 kept all parts beside each other, and called the estimator of the variant "fused" by the same name.
PARTS_0_1 = {
    "model.backbone.": "model.encoder.backbone.",
    "model.join.": "model.encoder.join.",
    "model.head.": "model.estimator.",
    "model.codebooks.": "model.estimator.codebooks.",
    "model.fusion.": "model.estimator.fusion.",
    "model.constraintors.": "model.estimator.constraintors.",
    "model.flows.": "model.estimator.flows.",
    "model.boundaries": "model.estimator.boundaries",
    "model.anomaly_map.ceilings": "model.estimator.ceilings",
}
# Statistics that are NaN by design where nothing was learned.
MAY_BE_NAN = ("estimator.ceilings", "estimator.boundaries")


@dataclass
class TrainedResAD:
    """What a checkpoint gives.

    Attributes:
        settings (dict[str, Any]): The variant, the architecture's hyperparameters, and the orientations of references.
        model (dict[str, Any]): State dict of the torch model.
        post_processor (dict[str, Any]): State dict of the post-processor: threshold and range.
        pre_processor (dict[str, Any] | None): Configuration of the pre-processor.
    """

    settings: dict[str, Any]
    model: dict[str, Any]
    post_processor: dict[str, Any]
    pre_processor: dict[str, Any] | None


def upgrade_hyper_parameters(given: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters as this version saves them: settings that the method does not have are ``None``.

    Those of checkpoints from before there were variants lack some settings: they are of the first method.
    """
    found = dict(given)
    found.setdefault("variant", "resad")
    if found["variant"] not in PRESETS:
        return found
    if found.get("estimator") == "fused":
        found["estimator"] = "head"
    own = settings_of(found["variant"])
    found.setdefault("estimator", own["estimator"])
    if found["estimator"] == "distance":
        own = {name: own[name] for name in OF_DISTANCE}
    missing = {name: value for name, value in own.items() if found.get(name) is None and name not in REQUIRED}
    return found | missing | {name: None for name in SETTINGS if name not in own}


def upgrade_state(state: dict[str, Any], estimator: str) -> dict[str, Any]:
    """A checkpoint's state dict with the names of this version.

    Args:
        state (dict[str, Any]): State dict of the whole Lightning model, whose order is kept.
        estimator (str): The estimator that it was made with.
    """
    if not any(name.startswith("model.backbone.") for name in state):
        return state
    upgraded = {}
    for name, value in state.items():
        if name == "model.anomaly_map.ceilings" and estimator != "flow":
            continue
        old = next((part for part in PARTS_0_1 if name.startswith(part)), None)
        upgraded[name if old is None else PARTS_0_1[old] + name.removeprefix(old)] = value
    return upgraded


def built_with(hyper_parameters: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's model was built with, and the orientations of its references; nothing of other models."""
    if not any(name in hyper_parameters for name in (*REQUIRED[1:], "variant")):
        return {}
    upgraded = upgrade_hyper_parameters(hyper_parameters)
    return {name: upgraded[name] for name in (*BUILT_WITH, "rotations") if name in upgraded}


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint without running code from it; parameters of this version's names.

    Raises:
        ValueError: If the file is damaged, unsafe, or no ResAD.
        FileNotFoundError: If there is no such file.
    """
    content = read_checkpoint(path)
    upgraded = upgrade_hyper_parameters(content["hyper_parameters"])
    state = upgrade_state(content["state_dict"], upgraded["estimator"])
    return content | {"hyper_parameters": upgraded, "state_dict": state}


def restored_with(path: Path | str) -> tuple[io.BytesIO, dict[str, Any]]:
    """What Lightning restores a model from: a checkpoint's bytes, which were checked, and the settings of its method.

    Raises:
        ValueError: If the file is damaged, unsafe, or no ResAD.
        FileNotFoundError: If there is no such file.
    """
    file = read_file(path, WHAT)
    upgraded = upgrade_hyper_parameters(parse_checkpoint(file, path)["hyper_parameters"])
    return io.BytesIO(file), {name: upgraded[name] for name in ("variant", *SETTINGS)}


def read_trained(path: Path, estimator: str | None) -> TrainedResAD:
    """Read a checkpoint to start from.

    Args:
        path (Path): The checkpoint.
        estimator (str | None): ``"distance"`` if the trained parts are not wanted; ``None`` for the checkpoint's own.

    Raises:
        ValueError: If the file is damaged, unsafe, no ResAD, never trained, or of a training that diverged.
        FileNotFoundError: If there is no such file.
    """
    content = load_checkpoint(path)
    settings, model = built_with(content["hyper_parameters"]), _below("model.", content["state_dict"])
    made_with = settings["estimator"]
    if estimator not in (None, "distance", made_with):
        msg = f"{path} was made with estimator='{made_with}', not '{estimator}': leave estimator out."
        raise ValueError(msg)
    if estimator == "distance":
        model = {name: value for name, value in model.items() if not name.startswith("estimator.")}
        dropped = {name: None for name in ARCHITECTURE if name not in OF_DISTANCE}
        settings |= {**dropped, "estimator": "distance"}
    elif not any(name.startswith("estimator.") for name in model):
        msg = f"{path} was never trained (estimator '{made_with}'): pass estimator='distance' too."
        raise ValueError(msg)
    broken = [name for name, value in model.items() if _is_broken(name, value)]
    if broken:
        msg = f"{path} holds NaN or infinity in {len(broken)} tensors (first: {broken[0]}): its training diverged."
        raise ValueError(msg)
    return TrainedResAD(
        settings=settings,
        model=model,
        # Thresholds belong to the scores of one estimator.
        post_processor=_below("post_processor.", content["state_dict"]) if settings["estimator"] == made_with else {},
        pre_processor=content.get("anomalib_pre_processor_config"),
    )


def _below(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """The entries of a state dict below ``prefix``, without the prefix."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _is_broken(name: str, value: Any) -> bool:  # noqa: ANN401
    """Whether a weight is not finite and should be."""
    return isinstance(value, Tensor) and name not in MAY_BE_NAN and not bool(torch.isfinite(value.float()).all())


# -- into a Lightning model -------------------------------------------------------------------------------------------


def start_from(module: Any, path: Path, given: dict[str, Any], own_pre_processor: bool) -> None:  # noqa: ANN401
    """Take architecture, weights, threshold, bank, and what was not given of the rest from a trained ResAD.

    Args:
        module (Any): The ResAD that starts from it.
        path (Path): The checkpoint.
        given (dict[str, Any]): Settings that its constructor was given; ``None`` for those that were not.
        own_pre_processor (bool): Keep the pre-processor that the constructor was given.

    Raises:
        ValueError: If the checkpoint cannot be used, or its method does not have a setting that was given.
        FileNotFoundError: If there is no such file.
    """
    trained = read_trained(path, given["estimator"])
    settings = trained.settings
    check_belong(settings["variant"], settings_of(settings["variant"], given["estimator"]), given)
    taken = {name: value for name, value in settings.items() if module.hparams[name] not in (None, value)}
    if taken:
        logger.info("Settings taken from %s: %s.", path, taken)
    module.hparams.update({"checkpoint": None})  # its content is saved with this model: the file is not needed again
    adopt(module, settings, given)
    if trained.pre_processor and not own_pre_processor and isinstance(module.pre_processor, PreProcessor):
        module.pre_processor.load_checkpoint_config(trained.pre_processor)
    try:
        module.model.load_state_dict(trained.model)
        if isinstance(module.post_processor, RankKeepingPostProcessor):
            module.post_processor.load_state_dict(trained.post_processor, strict=False)
    except RuntimeError as error:
        msg = f"{path} does not fit this version of ResAD: {_shortened(error)} Train it again with `anomalib train`."
        raise ValueError(msg) from error


def adopt(module: Any, settings: dict[str, Any], given: dict[str, Any]) -> None:  # noqa: ANN401
    """Build the torch model with a checkpoint's settings; what was given of the procedure goes before them.

    Raises:
        ValueError: If they are none that a model can be built with.
    """
    procedure = {name: given[name] for name in (*PROCEDURE, *FLOW_TRAINING) if given[name] is not None}
    try:
        module.hparams.update(settings | resolve(settings["variant"], settings | procedure))
        module.model = build(module.hparams, **{name: module.hparams[name] for name in BUILD_ARGUMENTS})
    except (RuntimeError, TypeError, LookupError, AttributeError) as error:  # of a file that this package did not write
        msg = f"The checkpoint's settings make no model: {_shortened(error)}. Train it again with `anomalib train`."
        raise ValueError(msg) from error


def _shortened(error: Exception) -> str:
    """What a library says, in one line."""
    return textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")


def restore(module: Any, checkpoint: dict[str, Any], given: dict[str, Any]) -> bool:  # noqa: ANN401
    """Make a model fit a checkpoint that Lightning is about to load, also one of an earlier version.

    Args:
        module (Any): The ResAD that is restored.
        checkpoint (dict[str, Any]): The checkpoint; its state dict gets this version's names.
        given (dict[str, Any]): As of :func:`start_from`.

    Returns:
        bool: Whether the model was built anew, with other settings than the constructor was given.
    """
    settings = built_with(checkpoint.get("hyper_parameters", {}))
    checkpoint["state_dict"] = upgrade_state(checkpoint["state_dict"], settings.get("estimator", ""))
    if settings and given["rotations"] is not None:
        settings["rotations"] = given["rotations"]
    other = {name: value for name, value in settings.items() if value != module.hparams.get(name)}
    if not other:
        return False
    logger.warning("The checkpoint was made with %s; these settings are used.", other)
    adopt(module, settings, given)
    return True
