# SPDX-License-Identifier: Apache-2.0

"""A picture of predictions: photo, ground truth, and each method's map with its score."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from anomalib.data import ImageItem
from matplotlib.figure import Figure
from PIL import Image

from anomalib_resad.enrollment.files import write_whole

INCHES = 2.15  # width of a panel
OPACITY = 0.75  # of a map over its photo


@dataclass(frozen=True)
class Overlay:
    """A method's map of one photo.

    Args:
        anomaly_map (np.ndarray): Raw map, shape ``(H, W)``.
        score (float): Raw score.
        low (float): Value of the color scale's dark end.
        high (float): Value of its bright end.
    """

    anomaly_map: np.ndarray
    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One photo of a gallery.

    Args:
        title (str): Name of the photo.
        photo (np.ndarray | None): RGB in 0..1, shape ``(H, W, 3)``; ``None`` if it is not to be had.
        mask (np.ndarray | None): Ground truth, shape ``(H, W)``.
        defective (bool): Whether something is wrong with it.
        overlays (dict[str, Overlay]): Maps by method.
    """

    title: str
    photo: np.ndarray | None
    mask: np.ndarray | None
    defective: bool
    overlays: dict[str, Overlay] = field(default_factory=dict)


def plain(text: str) -> str:
    """Text that matplotlib shows as it is, instead of reading formulas between dollar signs."""
    return text.replace("$", r"\$")


def _blend(overlay: Overlay, photo: np.ndarray | None) -> np.ndarray:
    """The map in colors, over the gray photo; RGB in 0..1, of the map's shape."""
    span = max(overlay.high - overlay.low, 1e-12)
    colors = mpl.colormaps["inferno"]((overlay.anomaly_map.astype(np.float64) - overlay.low) / span)[..., :3]
    if photo is None:
        return colors
    gray = Image.fromarray((255 * photo.mean(axis=2)).astype(np.uint8)).resize(overlay.anomaly_map.shape[::-1])
    return (1 - OPACITY) * np.asarray(gray)[..., None] / 255 + OPACITY * colors


def _panels(row: Row, methods: list[str]) -> Iterator[tuple[str, np.ndarray | None, str]]:
    """Title and picture of each column, and what to say where there is no picture."""
    yield row.title, row.photo, "photo not found"
    yield "ground truth", row.mask, "no mask"
    for method in methods:
        overlay = row.overlays.get(method)
        if overlay is None:
            yield method, None, "not measured"
        else:
            yield f"{method}\n{overlay.score:.3g}", _blend(overlay, row.photo), ""


def draw(rows: list[Row], methods: list[str]) -> Figure:
    """Draw photos, ground truth and the maps of several methods side by side, a line for each photo.

    Args:
        rows (list[Row]): The photos.
        methods (list[str]): The columns.

    Returns:
        Figure: The picture, to be saved.
    """
    columns = 2 + len(methods)
    shapes = [row.photo.shape for row in rows if row.photo is not None] or [(1, 1)]
    height = shapes[0][0] / shapes[0][1]  # of a panel, in its widths
    line = height + 0.22  # with two lines of title
    figure = Figure(figsize=(INCHES * columns, INCHES * line * len(rows)))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    for index, row in enumerate(rows):
        bottom = line * (index + 1) - 0.02
        for column, (title, image, missing) in enumerate(_panels(row, methods)):
            axis.text(column + 0.5, bottom - height - 0.01, plain(title), ha="center", va="bottom", fontsize=10)
            if image is None:
                middle = bottom - height / 2
                axis.text(column + 0.5, middle, missing, ha="center", va="center", fontsize=10, color="0.4")
            else:
                extent = (column + 0.02, column + 0.98, bottom, bottom - height)
                axis.imshow(image, cmap="gray", vmin=0, vmax=1, extent=extent, aspect="auto")
    axis.set(xlim=(0, columns), ylim=(line * len(rows), 0))
    return figure


def choose(items: list[ImageItem], per_folder: int) -> list[int]:
    """The first images of each test folder (good and each defect type), evenly spaced."""
    folders: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        folders.setdefault(Path(str(item.image_path)).parent.name, []).append(index)
    chosen = [indices[len(indices) * part // per_folder] for indices in folders.values() for part in range(per_folder)]
    return list(dict.fromkeys(chosen))


def _title(path: Path) -> str:
    """Folder and name, which say what is wrong with the photo, and nothing of the machine."""
    return f"{path.parent.name}\n{path.stem}"


def _load_photo(path: Path, size: tuple[int, int]) -> np.ndarray | None:
    """A photo file, resized as the methods see it; none if the file is not there."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize(size[::-1]), dtype=np.float32) / 255


def _photos(file: Mapping[str, np.ndarray], most: int) -> dict[str, Row]:
    """Photos and ground truth of a file of maps by path, no more than ``most``, evenly chosen."""
    paths, size = file["paths"], file["maps"].shape[1:]
    count = min(most, len(paths))
    chosen = [(2 * part + 1) * len(paths) // (2 * count) for part in range(count)]
    masks = file["masks"] if "masks" in file else [None] * len(paths)
    return {
        paths[i]: Row(_title(Path(paths[i])), _load_photo(Path(paths[i]), size), masks[i], bool(file["labels"][i]))
        for i in chosen
    }


def load_rows(folder: Path, methods: list[str], most: int) -> dict[str, list[Row]]:
    """Rows of each category from the maps that a leaderboard has kept.

    Args:
        folder (Path): Holds an ``.npz`` for each method and category (:func:`benchmarks.maps.save_maps`).
        methods (list[str]): Those to read; the first one that has maps of a category gives its photos.
        most (int): Photos of each category, evenly chosen.

    Returns:
        dict[str, list[Row]]: By category; empty if there are no maps.
    """
    found: dict[str, list[Path]] = {method: [] for method in methods}
    for path in sorted(set(folder.glob("*.npz")) - set(folder.glob("*.part.npz"))):
        with np.load(path) as file:
            if str(file["method"]) in found:
                found[str(file["method"])].append(path)
    rows: dict[str, dict[str, Row]] = {}
    for method, files in found.items():
        for path in files:
            with np.load(path) as file:
                own = rows.setdefault(str(file["category"]), {}) or _photos(file, most)
                rows[str(file["category"])] = own
                scale = float(file["low"]), float(file["high"])
                for name, anomaly_map, score in zip(file["paths"], file["maps"], file["scores"], strict=True):
                    if name in own:
                        own[name].overlays[method] = Overlay(anomaly_map, float(score), *scale)
    return {category: list(own.values()) for category, own in rows.items()}


def save_small(figure: Figure, path: Path, most_bytes: int) -> Path:
    """Save a picture as a PNG of 256 colors, as sharp as the size allows.

    Args:
        figure (Figure): The picture.
        path (Path): PNG to write.
        most_bytes (int): Largest size of the file.
    """
    for dpi in (100, 85, 70, 58, 48, 40, 32):
        whole, small = io.BytesIO(), io.BytesIO()
        figure.savefig(whole, format="png", dpi=dpi)
        Image.open(whole).convert("RGB").quantize(256).save(small, format="png", optimize=True)
        if small.tell() <= most_bytes:
            break
    write_whole(path, small.getvalue())
    return path
