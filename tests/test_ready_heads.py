# SPDX-License-Identifier: Apache-2.0

"""Heads that come with the package: built again the same, and used only where they belong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anomalib_resad import ready_heads
from anomalib_resad.ready_heads import head_file, read_card
from benchmarks.ready_heads import main
from benchmarks.sources.__main__ import main as draw_sources

SMALL: dict[str, Any] = {"backbone": "resnet18", "pre_trained": False, "epochs": 1, "batch_size": 8}
SMALL |= {"image_size": (64, 64)}


@pytest.fixture(scope="session")
def sources(share: Callable[..., Path]) -> Path:
    def draw(folder: Path) -> None:
        draw_sources(folder / "products", products=2, train=18, good=2, defective=3, size=64)

    return share("head_sources", draw) / "products"


@pytest.fixture(scope="session")
def heads(share: Callable[..., Path], sources: Path) -> Path:
    """A folder with the head of an untrained ResNet-18."""
    return share("heads", lambda folder: main(output=folder, sources=sources, **SMALL))


def test_the_command_makes_the_same_file_again(heads: Path, sources: Path, tmp_path: Path) -> None:
    main(output=tmp_path, sources=sources, **SMALL)
    first, second = head_file("resnet18", heads), head_file("resnet18.tv_in1k", tmp_path)
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["resnet18.safetensors"], "nothing else is left"
    assert first.stat().st_size < 500_000
    main(output=tmp_path, sources=sources, **SMALL | {"seed": 1})
    assert first.read_bytes() != second.read_bytes()
    card = read_card(first)
    assert (card["settings"]["layers"], card["weights"]) == (["layer1", "layer2", "layer3"], "random")
    assert (card["training"]["epochs"], card["training"]["seed"], card["training"]["products"]) == (1, 0, 2)
    assert card["sources"]["products"] == ["grain_0000", "weave_0001"]
    assert "Apache-2.0" in card["sources"]["license"]
    assert card["sources"]["photos"] == 46


@pytest.mark.parametrize("path", sorted(ready_heads.HEADS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_heads_of_the_package_are_small_and_say_what_they_are(path: Path) -> None:
    card = read_card(path)
    assert path.stat().st_size < 1_000_000
    assert card["settings"]["backbone"].partition(".")[0] == path.stem
    assert {"settings", "weights", "training", "command", "sources", "versions"} == card.keys()
