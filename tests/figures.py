# SPDX-License-Identifier: Apache-2.0

"""How figures are read from a committed file, by kind of table: its path, a row's cells and a column to numbers."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd

from benchmarks.summary import interval


def records(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def the(rows: list[dict[str, str]], **wanted: str) -> dict[str, str]:
    """The only row with these values, which are regular expressions."""
    (row,) = [row for row in rows if all(re.fullmatch(value, row[key]) for key, value in wanted.items())]
    return row


def number_of(text: str) -> str:
    return re.sub(r"\D", "", text)


def points_above(path: Path, cells: list[str], column: str) -> list[float]:
    rows, metric = records(path), cells[1].replace(" ", "_")
    means = [
        the(rows, method=re.escape(name), shots=number_of(column), category="mean")[metric]
        for name in ("ResAD", cells[0])
    ]
    return [100 * (float(means[0]) - float(means[1]))]


def points_by_product(path: Path, cells: list[str], column: str) -> list[float]:
    """Mean over the products, its interval, and the worst product."""
    metric, shots = cells[1].replace(" ", "_"), number_of(column)
    rows = [row for row in records(path) if row["shots"] == shots and row["category"] != "mean" and row[metric]]
    ours, theirs = (
        {row["category"]: 100 * float(row[metric]) for row in rows if row["method"] == name}
        for name in ("ResAD", cells[0])
    )
    above = [ours[product] - theirs[product] for product in ours]
    return [mean(above), *interval(pd.Series(above)), min(above)]


def by_training(path: Path, cells: list[str], column: str) -> list[float]:
    """Image and pixel AUROC: means over the products of their means over the draws, or how far products lie apart."""
    table = pd.read_csv(path)
    metrics = ["image_AUROC", "pixel_AUROC"]
    means = 100 * table[table["backbone"] == cells[0].strip("`")].groupby(["seed", "category"])[metrics].mean()
    if "apart" in column:
        return [float(each) for each in (means.loc[1] - means.loc[0]).abs().max()]
    return [float(each) for each in means.loc[int(number_of(column))].mean()]


READY = {
    "ResNet-18": "ready_resnet18",
    "EfficientNet-Lite2": "ready_lite2",
    "EfficientNet-Lite0": "ready_lite0",
    "MobileNetV2": "ready_mobilenetv2",
}


def cells_below(path: Path, cells: list[str], column: str) -> list[float]:
    """In how many cells of a product ResAD is below its own distance, in image and in pixel AUROC."""
    table = pd.read_csv(path.parents[1] / READY[column] / path.name)
    table = table[(table["category"] == cells[0]) & (table["status"] == "ok")].set_index(["shots", "draw"])
    ours, theirs = (table[table["method"] == name] for name in ("ResAD", "its distance"))
    return [float((ours[metric] < theirs[metric]).sum()) for metric in ("image_AUROC", "pixel_AUROC")]


def with_four_references(path: Path, cells: list[str], column: str) -> list[float]:
    """Image and pixel AUROC of a ready head's leaderboard, mean over the products."""
    rows = records(path.parents[1] / READY[cells[0]] / path.name)
    row = the(rows, method=re.escape(column), shots="4", category="mean")
    return [100 * float(row[metric]) for metric in ("image_AUROC", "pixel_AUROC")]


def time_over_backbone(path: Path, cells: list[str], column: str) -> list[float]:
    row = the(records(path), method=re.escape(cells[0]), shots=number_of(column), category="mean")
    return [float(row["latency_ratio"])]


def rule_of_threshold(path: Path, cells: list[str], column: str) -> list[float]:
    rules = {"the product's own": "calibrated", "stored": "stored", "best": "best possible", "anomalib's": "anomalib.*"}
    (rule,) = [rule for label, rule in rules.items() if cells[0].startswith(label)]
    percent = re.search(r"(\d+) %", cells[0])
    rate = f"{int(percent[1]) / 100:.4f}" if percent else "0.0000"
    row = the(records(path), shots=number_of(column), rule=rule, rate=rate)
    return [100 * float(row[key]) for key in ("false_alarm_rate", "recall", "F1")]


RUNTIMES = {
    "PyTorch": "torch",
    "OpenVINO float32": "openvino f32",
    "OpenVINO bfloat16": "openvino bf16",
    "OpenVINO 8 bits": "openvino int8",
}
ITEMS = {
    "the default": "fused",
    "the same": "fused, (rotated|turned) product",
    "Patchcore, a tenth": "Patchcore 0.1",
    "Patchcore, all": "Patchcore 1",
    "`resad`": "resad",
    "`resad++`": r"resad\+\+",
}
BACKBONES = {"ResNet-18": "resnet18", "WideResNet50": "wide_resnet50_2"}


def cost_over_backbone(path: Path, cells: list[str], column: str) -> list[float]:
    said = f"{cells[0]}, {column}"
    (runtime,) = [name for label, name in RUNTIMES.items() if label in said]
    item = [name for label, name in ITEMS.items() if cells[0].startswith(label)][-1]
    row = the(
        records(path),
        backbone=BACKBONES[column.partition(":")[0]],
        runtime=runtime,
        batch="8" if "batches of 8" in said else "1",
        item=f"{item}: whole" if runtime == "torch" else item,
    )
    return [float(row["ratio"])]


def training_by_epoch(path: Path, cells: list[str], column: str) -> list[float]:
    epoch = str(int(number_of(column)) - 1)
    kept, computed = (the(records(path), cache_gb=size, epoch=epoch) for size in ("4", "0"))
    if cells[0] == "loss of both":
        assert kept["loss"] == computed["loss"]
        return [float(kept["loss"])]
    return [float((kept if cells[0] == "features kept" else computed)["seconds"])]


ON_THE_EDGE = {
    "enroll, s": "enroll_s",
    "enroll for the first time, s": "enroll_first_s",
    "enroll with `rotations=1`, s": "enroll_plain_s",
    "enroll rotated photos, s": "enroll_(rotated|turned)_s",
    "one photo, ms": "photo_ms",
    "one photo over the encoder alone": "ratio",
    "one photo with Patchcore, same backbone and references, ms": "patchcore_ms",
    "bundle, MB": "bundle_mb",
    "bank, MB": "bank_mb",
}


def on_the_edge(path: Path, cells: list[str], column: str) -> list[float]:
    result: dict[str, Any] = json.loads(path.read_text())["results"][BACKBONES[column]]
    if cells[0] == "rows that are searched with `max_patches=1000`, MB":
        return [each["bank_mb"] for each in result["coreset"] if each["max_patches"] == 1000]
    return [value for key, value in result.items() if re.fullmatch(ON_THE_EDGE[cells[0]], key)]


def memory_by_sizes(path: Path, cells: list[str], column: str) -> list[float]:
    keeps = "5000" if "default" in cells[0] else "64"
    return [float(the(records(path), keeps=keeps, sizes=number_of(column))["megabytes"])]


def on_a_new_device(path: Path, cells: list[str], _: str) -> list[float]:
    result: dict[str, Any] = json.loads(path.read_text())
    sizes = {each["name"]: each["mb"] for each in result["packages"]}
    figures = {
        "the wheel, MB": result["wheel_mb"],
        "all that is installed, MB": result["packages_mb"],
        "OpenVINO in it, MB": sizes["openvino"],
        "OpenCV in it, MB": sizes["opencv-python-headless"],
        "install, s": result["seconds"]["install"],
        "enroll, s": result["seconds"]["enroll"],
        "inspect one photo, s": result["seconds"]["inspect"],
    }
    return [figures[cells[0]]]


def seconds_of_paths(path: Path, cells: list[str], _: str) -> list[float]:
    """Of a command of the README, by its beginning, or of all commands of a path."""
    result: dict[str, Any] = json.loads(path.read_text())
    began = cells[0].strip("`")
    of_commands = [each["seconds"] for each in result["steps"] if each["command"].startswith(began)]
    return [result["seconds"][cells[0]]] if cells[0] in result["seconds"] else of_commands[-1:]


def by_consumer(path: Path, cells: list[str], column: str) -> list[float]:
    row = the(records(path), who=re.escape(cells[0]))
    if column == "same labels":
        return [float(row["same_labels"])]
    return [1e7 * float(row["from_evaluation" if "evaluation" in column else "from_edge"])]


def share_that_moved(path: Path, cells: list[str], column: str) -> list[float]:
    what, shift = re.fullmatch(r"(\w+)(?: by (\d+) %)?", cells[0]).groups()  # type: ignore[union-attr]
    apart = "composite" in column
    rows = [
        row
        for row in records(path)
        if (row["what"], float(row["shift"])) == (what, int(shift or 0) / 100)
        and row["told"] == "True"
        and (row["product"] == "composite_layup") == apart
    ]
    photos, moved = (sum(int(row[name]) for row in rows) for name in ("photos", "moved"))
    return [photos if column == "how many" else 100 * moved / photos]


SHARES = {
    "false alarms": "false_alarm_rate",
    "defects found": "recall",
    "of these shown": "shown",
    "good photos shown": "good_shown",
    "pixel F1": "pixel_F1",
}


def thresholds_of_a_ready_head(path: Path, cells: list[str], column: str) -> list[float]:
    photos, _, target = cells[0].partition(",")
    row = the(records(path), shots=photos, rule="calibrated", rate=f"{int(number_of(target)) / 100:.4f}")
    share = row[SHARES[column]]
    return [100 * float(share)] if share else []  # of no photos


def by_tile_scale(path: Path, cells: list[str], column: str) -> list[float]:
    scale = "0.0" if cells[1] == "whole" else f"{float(cells[1]):.1f}"
    row = the(records(path), product=re.escape(cells[0].strip("`")), scale=scale)
    factor = 100 if "AUROC" in column else 1
    return [factor * float(row[name]) for name in OF_TILES[column].split()]


def by_what_grows(path: Path, cells: list[str], column: str) -> list[float]:
    grows, _, times = cells[0].rpartition(" ")
    row = the(records(path), grows=grows, times=times)
    return [float(row["ratio" if "backbone" in column else "memory_mb"])]


def before_and_after_teaching(path: Path, cells: list[str], column: str) -> list[float]:
    product, taught, marked = re.fullmatch(r"`?(\w+)`?, (\d) (marked|not marked)", cells[0]).groups()  # type: ignore[union-attr]
    given = {"product": product, "taught": taught, "marked": str(marked == "marked")}
    return [100 * float(the(records(path), when=when, **given)[TAUGHT[column]]) for when in ("before", "after")]


TAUGHT = {
    "AUROC": "auroc",
    "found": "found",
    "AUROC, other kinds": "auroc_others",
    "found, other kinds": "found_others",
    "false alarms": "false_alarms",
}


def photos_a_second(path: Path, cells: list[str], column: str) -> list[float]:
    return [float(the(records(path), who=re.escape(cells[0]), clients=number_of(column))["per_s"])]


def waits_by_clients(path: Path, cells: list[str], column: str) -> list[float]:
    row = the(records(path), who=re.escape(cells[0]), clients=number_of(column))
    return [float(row["p50_ms"]), float(row["p99_ms"])]


def by_requests(path: Path, cells: list[str], column: str) -> list[float]:
    keys = {"MB": ["memory_mb"], "p50 / p99, ms": ["p50_ms", "p99_ms"]}[column]
    row = the(records(path), who=cells[0], requests=number_of(cells[1]))
    return [float(row[key]) for key in keys]


def seconds_of_enrolling(path: Path, cells: list[str], column: str) -> list[float]:
    orientations = "8" if "rotated" in cells[0] else "1"
    return [float(the(records(path), backbone=BACKBONES[column], orientations=orientations)["seconds"])]


def seconds_of_reading(path: Path, cells: list[str], column: str) -> list[float]:
    features, _, photos = cells[0].rpartition(", ")
    kept = {"in memory": "memory", "in a folder": "folder, first training", "from the folder": "folder, next training"}
    method = "default" if cells[1] == "default" else "without synthetic defects"
    row = the(records(path), photos=number_of(photos), method=method, features=kept[features])
    names = {"pictures": ("in_memory", "files"), "before, s": ("before_s",), "epoch, s": ("epoch_s",)}
    factor = 1e-3 if column.endswith("GB") else 1
    values = [float(row[name]) for name in names.get(column, ("peak_mb",))]
    return [factor * max(values)]


def by_precision(path: Path, cells: list[str], column: str) -> list[float]:
    rows = [row for row in records(path) if row["precision"] == cells[0].strip("`")]
    if column == "image AUROC":
        return [100 * sum(float(row["image_auroc"]) for row in rows) / len(rows)]
    if column == "largest change of a score":
        return [max(float(row["score_max"]) for row in rows)]
    return [100 * sum(int(row["labels_changed"]) for row in rows) / sum(int(row["photos"]) for row in rows)]


OF_TILES = {
    "tiles": "tiles",
    "image / pixel AUROC": "image_AUROC pixel_AUROC",
    "inspect, s": "inspect_s",
    "enroll, s": "enroll_s",
    "largest change of the score": "largest_shift",
}
EXPECTED: dict[str, Callable[[Path, list[str], str], list[float]]] = {
    "points of ResAD above": points_above,
    "points of ResAD above, by product": points_by_product,
    "by training": by_training,
    "cells below its distance": cells_below,
    "with four references": with_four_references,
    "time over the backbone": time_over_backbone,
    "false alarms / found / F1": rule_of_threshold,
    "thresholds of a ready head": thresholds_of_a_ready_head,
    "one photo over the backbone": cost_over_backbone,
    "other precisions and batches": cost_over_backbone,
    "seconds by epoch": training_by_epoch,
    "by backbone": on_the_edge,
    "on a new device": on_a_new_device,
    "seconds of paths": seconds_of_paths,
    "megabytes by sizes": memory_by_sizes,
    "by consumer": by_consumer,
    "share that moved": share_that_moved,
    "by tile scale": by_tile_scale,
    "by what grows": by_what_grows,
    "before and after teaching": before_and_after_teaching,
    "photos a second by clients": photos_a_second,
    "waits by clients": waits_by_clients,
    "memory by requests": by_requests,
    "seconds of enrolling": seconds_of_enrolling,
    "seconds of reading": seconds_of_reading,
    "by precision": by_precision,
}
