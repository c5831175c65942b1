# SPDX-License-Identifier: Apache-2.0

"""A bundle: one folder, or one packed file, that holds an exported model, and a manifest that says what it is.

``encoder.xml`` makes features of photos, ``detector.xml`` scores and maps of features and a bank. Every file stands in
``manifest.json`` with its SHA-256.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from anomalib_resad.deploy.json_reading import strict_json
from anomalib_resad.deploy.packed import read_file
from anomalib_resad.enrollment.files import write_whole
from anomalib_resad.enrollment.image_size import Size, size_of_photos
from anomalib_resad.enrollment.neighborhoods import NEIGHBORHOODS, has_neighborhoods, neighborhoods_along
from anomalib_resad.enrollment.rotations import Rotations, check_rotations
from anomalib_resad.enrollment.thresholds import is_threshold

Precision = Literal["fp32", "fp16", "bf16", "int8"]
REDUCED = ("bf16", "int8")  # precisions with features of their own
FORMAT = 1
FORMAT_OF_NEIGHBORHOODS = 2  # of a model that judges neighborhoods, too: versions that know none refuse it
MANIFEST = "manifest.json"
ENCODER, DETECTOR = "encoder.xml", "detector.xml"
FILES = (ENCODER, DETECTOR, "encoder.bin", "detector.bin")
FOLDER = "(model-[0-9a-f]{32})?"  # of the files, in a bundle that replaced another


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

    Raises:
        ValueError: If they are no finite numbers, or the lowest is above the highest.
    """

    threshold: float | None
    low: float | None
    high: float | None

    def __post_init__(self) -> None:
        """Check the numbers."""
        known = [each for each in (self.threshold, self.low, self.high) if each is not None]
        _, low, high = self.numbers if all(map(is_threshold, known)) else (0, 1, 0)
        if low > high:
            msg = f"{self} is no range of finite numbers"
            raise ValueError(msg)

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
        precision (Precision): How the weights are stored, 32 or 16 bits; or what the backbone is computed in.
        backbone (str): Name of the backbone.
        image_size (tuple[int, int]): Height and width of the maps.
        levels (tuple[Level, ...]): The levels of the features.
        keyed (bool): Whether the last level holds keys to the rows of the first; between them may lie neighborhoods.
        rotations (Rotations): Orientations of each photo that is enrolled, unless another number is asked for.
        row_multiple (int): The detector takes a bank whose rows are a multiple of this.
        score (Scale): Normalization of the score.
        map (Scale): Normalization of the map.
        label_above (float): Normalized score above which a photo is anomalous.
        versions (dict[str, str]): Packages that made it.
        files (dict[str, str]): SHA-256 of each file.
        weights (str): Where the backbone's weights are from; version 0.1.0 did not say.
        folder (str): Folder of the files in the bundle, of one that replaced another; none for the bundle itself.
        searched (float): Share of each photo's rows that is searched; all of them in bundles of version 0.1.0.
        spread (float | None): Standard deviation of good photos' raw scores within the source categories; version 0.1.0
            did not say.
        patch_spread (float | None): The same where single patches are judged alone, without their neighborhoods;
            ``None`` if unknown, or if the model judges no neighborhoods.
        area_side (int | None): Side of the square with as many pixels as photos have where each product has a size of
            its own, in the shape of its photos; then ``image_size`` and ``levels`` are those of that square. ``None``
            where all products have one size.
        stride (int | None): Pixels per patch of the coarsest level, in which such sizes are whole.

    Raises:
        ValueError: If something in it cannot be.
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
    folder: str = ""
    searched: float = 1.0
    spread: float | None = None
    patch_spread: float | None = None
    area_side: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        """Check types and values."""
        texts = [self.model, self.backbone, self.weights, self.folder, *self.versions.values(), *self.files.values()]
        shapes = [each for level in self.levels for each in (level.channels, level.height, level.width)]
        check_rotations(self.rotations)
        wrong = {
            "text": not all(isinstance(each, str) for each in texts),
            "number": not all(
                type(each) is int and each > 0 for each in (*self.image_size, *shapes, self.row_multiple)
            ),
            "precision": self.precision not in get_args(Precision),
            "image_size": len(self.image_size) != 2,
            "levels": not self.levels,
            "keyed": not isinstance(self.keyed, bool),
            "label_above": not (is_threshold(self.label_above) and 0 <= self.label_above <= 1),
            "searched": not (is_threshold(self.searched) and 0 < self.searched <= 1),
            "spread": not all(
                each is None or (is_threshold(each) and each >= 0) for each in (self.spread, self.patch_spread)
            ),
            "area_side": (self.area_side, self.stride) != (None, None)
            and not all(type(each) is int and each > 0 for each in (self.area_side, self.stride)),
            "files": sorted(self.files) != sorted(FILES),
            "folder": re.fullmatch(FOLDER, self.folder) is None,
        }
        if any(wrong.values()):
            msg = f"it says what cannot be ({', '.join(name for name, is_wrong in wrong.items() if is_wrong)})"
            raise ValueError(msg)

    @property
    def judges_neighborhoods(self) -> bool:
        """Whether neighborhoods are judged beside patches."""
        return self.keyed and has_neighborhoods(self.levels)

    @property
    def format(self) -> int:
        """The format of the manifest's file."""
        return FORMAT_OF_NEIGHBORHOODS if self.judges_neighborhoods else FORMAT

    @property
    def encoder(self) -> str:
        """What a bank must have been made with: features of other weights, or of fewer bits, are other features."""
        return f"{self.model}/{self.precision if self.precision in REDUCED else 'float'}"

    def size_for(self, sizes: Iterable[Size]) -> Size | None:
        """The size of its own that a product has, by the sizes of its good photos; ``None`` if all have one size."""
        if self.area_side is None or self.stride is None:
            return None
        return size_of_photos(sizes, self.area_side, self.stride)

    def levels_at(self, size: Size | None) -> tuple[Level, ...]:
        """The levels of photos of a product's own size, which is of whole strides; those of all without one."""
        if size is None:
            return self.levels
        height, width = self.image_size
        levels = [
            Level(each.channels, each.height * size[0] // height, each.width * size[1] // width) for each in self.levels
        ]
        if self.judges_neighborhoods:
            keys = levels[-1]
            sides = (neighborhoods_along(side) for side in (keys.height, keys.width))
            levels[NEIGHBORHOODS] = Level(keys.channels, *sides)
        return tuple(levels)

    def place(self, file: str) -> str:
        """Where one of the files is in the bundle."""
        return f"{self.folder}/{file}" if self.folder else file

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder."""
        content = {"format": self.format, **asdict(self)}
        text = json.dumps(content | {"checksum": _checksum(content)}, indent=2)
        write_whole(folder / MANIFEST, (text + "\n").encode())


def _checksum(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, however its text is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parse(text: bytes) -> Manifest | None:
    """The manifest, or ``None`` if it has another format. Version 0.1.0 wrote no checksum, and none of the weights.

    Raises:
        ValueError: If something in it cannot be.
    """
    known = strict_json(text)
    if known["format"] not in (FORMAT, FORMAT_OF_NEIGHBORHOODS):
        return None
    checksum = known.pop("checksum", None)
    if checksum != _checksum(known) and not (checksum is None and "weights" not in known):
        msg = "its checksum differs: it was altered"
        raise ValueError(msg)
    del known["format"]
    known["image_size"] = tuple(known["image_size"])
    known["levels"] = tuple(Level(**level) for level in known["levels"])
    known["score"], known["map"] = Scale(**known["score"]), Scale(**known["map"])
    return Manifest(**known)


def read_manifest(bundle: Path) -> Manifest:
    """Read and check a bundle; see :func:`read_bundle`."""
    return read_bundle(bundle)[0]


def read_bundle(bundle: Path) -> tuple[Manifest, dict[str, bytes]]:
    """Read and check a bundle: its manifest, and that every file is as it was written.

    Returns:
        tuple[Manifest, dict[str, bytes]]: The manifest, and the content of each file that was checked, its own too.

    Raises:
        BundleError: If something is missing, altered, or of another version.
    """
    path = dated(bundle)
    again = "Copy the bundle again, or make it with `resad export`."
    if not path.is_file():
        msg = f"{bundle} is no bundle: it has no {MANIFEST}. Make one with `resad export`."
        raise BundleError(msg)
    try:
        contents = {MANIFEST: read_file(bundle, MANIFEST)}
        manifest = _parse(contents[MANIFEST])
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        msg = f"{path} cannot be read ({error!r}). {again}"
        raise BundleError(msg) from error
    if manifest is None:
        msg = (
            f"{path} has another format than {FORMAT} and {FORMAT_OF_NEIGHBORHOODS}, which this version reads. Export "
            "the checkpoint again."
        )
        raise BundleError(msg)
    for name, digest in manifest.files.items():
        try:
            contents[name] = read_file(bundle, manifest.place(name))
            problem = "altered or truncated"
        except (OSError, ValueError) as error:
            contents[name], problem = b"", "missing" if isinstance(error, FileNotFoundError) else str(error)
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            if read_file(bundle, MANIFEST) != contents[MANIFEST]:
                return read_bundle(bundle)  # it was replaced meanwhile
            msg = f"{bundle / manifest.place(name)} is {problem}. {again}"
            raise BundleError(msg)
    return manifest, contents


def dated(bundle: Path) -> Path:
    """The file whose date tells that a bundle was replaced: the packed file, or a folder's manifest."""
    return bundle if bundle.is_file() else bundle / MANIFEST


def banks_of(bundle: Path, banks: Path | str | None = None) -> Path:
    """Where the banks of a bundle's products lie: where one says, in the folder, or beside the packed file."""
    if banks is not None:
        return Path(banks)
    return bundle.with_name(f"{bundle.name}.banks") if bundle.is_file() else bundle / "banks"
