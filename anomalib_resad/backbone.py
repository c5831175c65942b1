# SPDX-License-Identifier: Apache-2.0

"""The frozen feature extractor: one timm backbone, several levels.

The network comes from timm's "getter" wrapper, which takes its intermediate features through ``forward_intermediates``
and so covers CNNs and vision transformers alike, and drops the layers behind the last level.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from anomalib_resad.safe_load import load_weights_only

logger = logging.getLogger(__name__)

WAYS_OUT = (
    "Three ways out: (1) fill the model hub's cache on a machine with a network and copy it here (HF_HOME; with "
    "HF_HUB_OFFLINE=1 the hub is not asked first), "
    "(2) pass a local file with `weights=<file>`, (3) go without pretrained weights with `pre_trained=False`."
)


def _level_indices(name: str, layers: Sequence[str]) -> tuple[int, ...]:
    """Translate level names (``layer1``) into timm's feature indices.

    Raises:
        ValueError: If timm has no such backbone, or the backbone no such level.
    """
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.partition('_')[0]}*")[:8]) or "see timm.list_models()"
        msg = f"timm has no backbone named '{name}'. Similar names: {close}."
        raise ValueError(msg)
    with torch.device("meta"):
        probe: Any = timm.create_model(name, pretrained=False, features_only=True, feature_cls="getter")
    known = {info["module"]: int(info.get("index", position)) for position, info in enumerate(probe.feature_info.info)}
    unknown = [layer for layer in layers if layer not in known]
    if unknown or not layers or len(set(layers)) != len(layers):
        msg = f"layers={list(layers)} must name different levels of backbone '{name}', which has {list(known)}."
        raise ValueError(msg)
    return tuple(known[layer] for layer in layers)


def check_state_dict(state: Mapping[str, Any], net: nn.Module, name: str, source: Path | str) -> None:
    """Check that a state dict is one of backbone ``name``, with everything that ``net`` needs.

    A file of a deeper sibling (ResNet-34 for ResNet-18) holds every tensor that is needed, with the right shape: so
    tensors that the whole backbone does not have are refused too.

    Raises:
        ValueError: If tensors are missing, foreign, of another shape, or not finite.
    """
    needed = {key.removeprefix("model."): value for key, value in net.state_dict().items()}
    with torch.device("meta"):
        whole = timm.create_model(name, pretrained=False).state_dict()
    problems = {
        "missing": [key for key in needed if key not in state],
        "foreign": [key for key in state if key not in whole],
        "other shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in needed.items()
            if key in state and state[key].shape != value.shape
        ],
        "not finite": [key for key in needed if key in state and not torch.isfinite(state[key].float()).all()],
    }
    found = [f"{len(keys)} {kind} (first: {keys[0]})" for kind, keys in problems.items() if keys]
    if found:
        msg = (
            f"{source} does not fit backbone '{name}': {', '.join(found)}. Pass the backbone that the file was made "
            "for, or write a fitting file with torch.save(timm.create_model(name, pretrained=True).state_dict(), file)."
        )
        raise ValueError(msg)


class FeaturePyramid(nn.Module):
    """A frozen timm backbone that returns one feature map per level.

    Weights are brought in at first use, not in the constructor: a model that is restored from a checkpoint gets them
    from there, without a network and without the original file.

    Args:
        name (str): timm model name.
        layers (Sequence[str]): Level names, as timm calls them (``layer1`` for ResNets, ``blocks.2`` for others).
        pre_trained (bool): Use timm's pretrained weights (model hub or its cache).
        weights (Path | str | None): Local file with a timm state dict (``.pth`` or ``.safetensors``); comes before
            ``pre_trained``.

    Raises:
        ValueError: If the backbone or a level is unknown.
        FileNotFoundError: If ``weights`` names no file (when the weights are brought in).
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[str],
        pre_trained: bool = True,
        weights: Path | str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.layers = tuple(layers)
        self.pre_trained = pre_trained
        self.weights = Path(weights) if weights else None
        self._indices = _level_indices(name, layers)
        self.net = self._create(pretrained=False)
        self.net.eval().requires_grad_(requires_grad=False)
        self.channels: list[int] = list(self.net.feature_info.channels())
        self._ready = False

    def _create(self, pretrained: bool) -> Any:  # noqa: ANN401  # timm does not export its type
        return timm.create_model(
            self.name,
            pretrained=pretrained,
            features_only=True,
            feature_cls="getter",
            out_indices=self._indices,
        )

    def bring_weights(self) -> None:
        """Load the weights unless they are there already (loaded before, or restored from a checkpoint).

        Raises:
            FileNotFoundError: If the local file is missing.
            ValueError: If the local file does not fit the backbone.
            RuntimeError: If the download fails.
        """
        if self._ready:
            return
        if self.weights is not None:
            state = load_weights_only(self.weights, what="backbone weights")
            state = state.get("state_dict", state) if isinstance(state, Mapping) else state
            check_state_dict(state, self.net, self.name, self.weights)
            self.net.load_state_dict({f"model.{key}": value for key, value in state.items()}, strict=False)
        elif self.pre_trained:
            self.net.load_state_dict(self._download().state_dict())
        else:
            logger.warning("Backbone '%s' has random weights (pre_trained=False, no weights file).", self.name)
        self._ready = True

    def _download(self) -> Any:  # noqa: ANN401  # timm does not export its type
        logger.info("Loading the pretrained weights of backbone '%s' from timm's hub or its cache.", self.name)
        try:
            return self._create(pretrained=True)
        except Exception as error:  # the hub client's errors share no base class
            msg = f"The pretrained weights of backbone '{self.name}' could not be loaded: {error}. {WAYS_OUT}"
            raise RuntimeError(msg) from error

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._ready = self._ready or any(key.startswith(f"{prefix}net.") for key in state_dict)

    def train(self, mode: bool = True) -> "FeaturePyramid":
        """Stay in evaluation mode: batch norms with folded statistics must not see training batches."""
        del mode
        return super().train(mode=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Extract the features of normalized images.

        Args:
            images (Tensor): Images, shape ``(B, 3, H, W)``.

        Returns:
            list[Tensor]: One feature map per level, shape ``(B, C_l, H_l, W_l)``.
        """
        self.bring_weights()
        return list(self.net(images))
