# SPDX-License-Identifier: Apache-2.0

"""A bundle: one folder that holds an exported model, and a manifest that says what it is.

``encoder.xml`` makes features of photos, ``detector.xml`` scores and maps of features and a bank. Every file stands in
``manifest.json`` with its SHA-256.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from anomalib_resad.enrollment.files import write_whole
from anomalib_resad.enrollment.rotations import Rotations

Precision = Literal["fp32", "fp16", "int8"]
FORMAT = 1
MANIFEST = "manifest.json"
ENCODER, DETECTOR = "encoder.xml", "detector.xml"
FILES = (ENCODER, DETECTOR, "encoder.bin", "detector.bin")
LARGEST = 3e38  # of numbers that scores are compared with, in float32


class BundleError(ValueError):
    """A bundle cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Level:
    """Shape of one level's feature map."""

    channels: int
    height: int
    width: int

    @property
    def patches(self) -> int:
        """Patches of one photo."""
        return self.height * self.width


@dataclass(frozen=True)
class Scale:
    """How raw values become 0..1 with 0.5 at the threshold; ``None`` where nothing was learned.

    Attributes:
        threshold (float | None): Raw value above which it is anomalous.
        low (float | None): Lowest raw value of the validation.
        high (float | None): Highest raw value of the validation.
    """

    threshold: float | None
    low: float | None
    high: float | None

    @property
    def numbers(self) -> tuple[float, float, float]:
        """Threshold, low and high for :mod:`anomalib_resad.enrollment.thresholds`, which says NaN for unknown."""
        threshold, low, high = (math.nan if each is None else each for each in (self.threshold, self.low, self.high))
        return threshold, low, high


@dataclass(frozen=True)
class Manifest:
    """What a bundle is.

    Attributes:
        model (str): SHA-256 of weights and settings, the same for every precision and every export of one model.
        precision (Precision): How the weights are stored: 32 or 16 bits, or an encoder of 8 bits.
        backbone (str): Name of the backbone.
        image_size (tuple[int, int]): Height and width of the maps.
        levels (tuple[Level, ...]): The levels of the features.
        keyed (bool): Whether the last level holds keys to the rows of the others.
        rotations (Rotations): Orientations of each photo that is enrolled, unless another number is asked for.
        row_multiple (int): The detector takes a bank whose rows are a multiple of this.
        score (Scale): Normalization of the score.
        map (Scale): Normalization of the map.
        label_above (float): Normalized score above which a photo is anomalous.
        versions (dict[str, str]): Packages that made it.
        files (dict[str, str]): SHA-256 of each file.
        weights (str): Where the backbone's weights are from; version 0.1.0 did not say.
    """

    model: str
    precision: Precision
    backbone: str
    image_size: tuple[int, int]
    levels: tuple[Level, ...]
    keyed: bool
    rotations: Rotations
    row_multiple: int
    score: Scale
    map: Scale
    label_above: float
    versions: dict[str, str]
    files: dict[str, str]
    weights: str = "unknown"

    @property
    def encoder(self) -> str:
        """What a bank must have been made with: features of other weights, or of 8 bits, are other features."""
        return f"{self.model}/{'int8' if self.precision == 'int8' else 'float'}"

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder."""
        content = {"format": FORMAT, **asdict(self)}
        text = json.dumps(content | {"checksum": _checksum(content)}, indent=2)
        write_whole(folder / MANIFEST, (text + "\n").encode())


def _checksum(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, however its text is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        msg = f"a key stands there twice, among {[key for key, _ in pairs]}"
        raise ValueError(msg)
    return dict(pairs)


def _no_constant(name: str) -> None:
    msg = f"{name} is no number that could be used"
    raise ValueError(msg)


def _parse(text: str) -> Manifest | None:
    """The manifest, or ``None`` if it has another format. Version 0.1.0 wrote no checksum.

    Raises:
        ValueError: If something in it cannot be.
    """
    known = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    if known["format"] != FORMAT:
        return None
    checksum = known.pop("checksum", None)
    if checksum is not None and checksum != _checksum(known):
        msg = "its checksum differs: it was altered"
        raise ValueError(msg)
    del known["format"]
    known["image_size"] = tuple(known["image_size"])
    known["levels"] = tuple(Level(**level) for level in known["levels"])
    known["score"], known["map"] = Scale(**known["score"]), Scale(**known["map"])
    for scale in (known["score"], known["map"]):
        _, low, high = scale.numbers
        if low > high or not all(each is None or abs(each) < LARGEST for each in asdict(scale).values()):
            msg = f"{scale} is no range"
            raise ValueError(msg)
    if set(FILES) - known["files"].keys():
        msg = f"it lists {sorted(known['files'])}, not {sorted(FILES)}"
        raise ValueError(msg)
    return Manifest(**known)


def read_manifest(bundle: Path) -> Manifest:
    """Read and check a bundle; see :func:`read_bundle`."""
    return read_bundle(bundle)[0]


def read_bundle(bundle: Path) -> tuple[Manifest, dict[str, bytes]]:
    """Read and check a bundle: its manifest, and that every file is as it was written.

    Returns:
        tuple[Manifest, dict[str, bytes]]: The manifest, and the content of each file that was checked.

    Raises:
        BundleError: If something is missing, altered, or of another version.
    """
    path = bundle / MANIFEST
    again = "Copy the folder again, or make it with `resad export`."
    if not path.is_file():
        msg = f"{bundle} is no bundle: it has no {MANIFEST}. Make one with `resad export`."
        raise BundleError(msg)
    try:
        manifest = _parse(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        msg = f"{path} cannot be read ({error!r}). {again}"
        raise BundleError(msg) from error
    if manifest is None:
        msg = f"{path} has another format than {FORMAT}, which this version reads. Export the checkpoint again."
        raise BundleError(msg)
    contents = {}
    for name, digest in manifest.files.items():
        file = bundle / name
        contents[name] = file.read_bytes() if Path(name).name == name and file.is_file() else b""
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            problem = "altered or truncated" if file.is_file() else "missing"
            msg = f"{file} is {problem}. {again}"
            raise BundleError(msg)
    return manifest, contents
