# SPDX-License-Identifier: Apache-2.0

"""A trained ResAD in a Lightning checkpoint: checked when it is read, taken over, saved and restored."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib.pre_processing import PreProcessor
from torch import Tensor

from anomalib_resad.enrollment import Rotations
from anomalib_resad.post_processor import RankKeepingPostProcessor
from anomalib_resad.safe_load import load_weights_only
from anomalib_resad.torch_model import ResADModel
from anomalib_resad.variants import VARIANTS

logger = logging.getLogger(__name__)

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
    "image_size",
    "projection",
    "estimator",
)
# Settings that checkpoints from before there were variants lack: those were all the first.
ADDED = ("constraintor", "occ", "codebook_size", "efdm", "abnormal_gaussian", "push_pull", "projection", "estimator")
EARLIER = {"variant": "resad"} | {key: VARIANTS["resad"][key] for key in ADDED}
TRAINED_PARTS = ("codebooks", "fusion", "constraintors", "flows", "boundaries", "head")


@dataclass
class TrainedResAD:
    """What a checkpoint gives.

    Attributes:
        settings (dict[str, Any]): The architecture's hyperparameters, the variant's name, and how photos are turned.
        model (dict[str, Any]): State dict of the torch model.
        post_processor (dict[str, Any]): State dict of the post-processor: threshold and range.
        pre_processor (dict[str, Any] | None): Configuration of the pre-processor.
    """

    settings: dict[str, Any]
    model: dict[str, Any]
    post_processor: dict[str, Any]
    pre_processor: dict[str, Any] | None


def architecture(hyper_parameters: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's model was built with, its variant, and how photos are turned; empty if it holds none."""
    found = {key: hyper_parameters[key] for key in ("variant", *ARCHITECTURE, "rotations") if key in hyper_parameters}
    if not found:
        return {}
    settings = EARLIER | found
    return {"rotations": VARIANTS[settings["variant"]]["rotations"]} | settings


def read_trained(path: Path, estimator: str | None) -> TrainedResAD:
    """Read a checkpoint.

    Args:
        path (Path): The checkpoint.
        estimator (str | None): ``"distance"`` if the trained parts are not wanted; ``None`` for the checkpoint's own.

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
    made_with = settings["estimator"]
    if estimator not in (None, "distance", made_with):
        msg = f"{path} was made with estimator='{made_with}', not '{estimator}': leave estimator out."
        raise ValueError(msg)
    settings["estimator"] = estimator or made_with
    if estimator == "distance":
        model = {key: value for key, value in model.items() if not key.startswith(TRAINED_PARTS)}
    elif not any(key.startswith(TRAINED_PARTS) for key in model):
        msg = f"{path} was never trained (estimator '{made_with}'): pass estimator='distance' too."
        raise ValueError(msg)
    broken = [key for key, value in model.items() if _is_broken(key, value)]
    if broken:
        msg = f"{path} holds NaN or infinity in {len(broken)} tensors (first: {broken[0]}): its training diverged."
        raise ValueError(msg)
    return TrainedResAD(
        settings=settings,
        model=model,
        # Thresholds belong to the scores of one estimator.
        post_processor=_below("post_processor.", state) if settings["estimator"] == made_with else {},
        pre_processor=content.get("anomalib_pre_processor_config"),
    )


def _below(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """The entries of a state dict below ``prefix``, without the prefix."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _is_broken(key: str, value: Any) -> bool:  # noqa: ANN401
    """Whether a weight is not finite; ceilings and boundaries of an untrained level are NaN by design."""
    by_design = key in {"anomaly_map.ceilings", "boundaries"}
    return isinstance(value, Tensor) and not by_design and not bool(torch.isfinite(value.float()).all())


# For the type checker only: anomalib lists the direct subclasses of AnomalibModule as models, and this is none.
if TYPE_CHECKING:
    from anomalib.models import AnomalibModule as _Module
else:
    _Module = object


class CheckpointMixin(_Module):
    """Builds the model that hyperparameters or a checkpoint describe, and keeps both true to each other.

    Attributes:
        model (ResADModel): The torch model.
        keeps_bank (bool): Whether the bank came from a checkpoint that is being restored.
        given_rotations (Rotations | None): What the constructor was given, which goes before a checkpoint's.
    """

    model: ResADModel
    keeps_bank: bool = False
    given_rotations: Rotations | None = None

    def _build(self) -> ResADModel:
        """Make the torch model that the hyperparameters describe."""
        settings = {key: self.hparams[key] for key in ARCHITECTURE}
        return ResADModel(
            **settings,
            pre_trained=self.hparams["pre_trained"],
            weights=self.hparams["weights"],
        )

    def _start_from(self, path: Path, estimator: str | None, own_pre_processor: bool) -> None:
        """Take architecture, weights, threshold, bank, and what was not given of the rest from a trained ResAD.

        Raises:
            ValueError: If the checkpoint cannot be used.
            FileNotFoundError: If there is no such file.
        """
        trained = read_trained(path, estimator)
        self._keep_given(trained.settings)
        taken = {key: value for key, value in trained.settings.items() if value != self.hparams[key]}
        if taken:
            logger.info("Settings taken from %s: %s.", path, taken)
        self.hparams.update({"checkpoint": None})  # its content is saved with this model: the file is not needed again
        self._adopt(trained.settings)
        if trained.pre_processor and not own_pre_processor and isinstance(self.pre_processor, PreProcessor):
            self.pre_processor.load_checkpoint_config(trained.pre_processor)
        try:
            self.model.load_state_dict(trained.model)
            if isinstance(self.post_processor, RankKeepingPostProcessor):
                self.post_processor.load_state_dict(trained.post_processor, strict=False)
        except RuntimeError as error:
            msg = f"{path} does not fit this version of ResAD: {error}"
            raise ValueError(msg) from error

    def _keep_given(self, settings: dict[str, Any]) -> None:
        """Put what the constructor was given for the enrollment before a checkpoint's ``settings``."""
        if settings and self.given_rotations is not None:
            settings["rotations"] = self.given_rotations

    def _adopt(self, settings: dict[str, Any]) -> None:
        """Build the torch model with a checkpoint's settings; the checkpoint brings the backbone's weights."""
        self.hparams.update(settings)
        self.model = self._build()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the folder of references out: the bank is saved, and the folder may be gone when it is restored."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], "references": None}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the model if the checkpoint was made with other settings than the constructor was given."""
        super().on_load_checkpoint(checkpoint)
        self.keeps_bank = len(checkpoint["state_dict"].get("model.bank.rows_0", ())) > 0
        settings = architecture(checkpoint.get("hyper_parameters", {}))
        self._keep_given(settings)
        other = {key: value for key, value in settings.items() if value != self.hparams.get(key)}
        if other:
            logger.warning("The checkpoint was made with %s; these settings are used.", other)
            self._adopt(settings)
            self.model.to(self.device)
