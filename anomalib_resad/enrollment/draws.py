# SPDX-License-Identifier: Apache-2.0

"""Seeded draws: of references from many good photos, of what chance decides about a photo."""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def seeded(*keys: int | str) -> np.random.Generator:
    """A generator that depends on its keys alone (not on order, process or Python's hash seed)."""
    return np.random.default_rng([zlib.crc32(str(key).encode()) for key in keys])


def key_of(path: str) -> str:
    """What a draw about a photo depends on: its file and the three folders above it, ``pill/train/good/000.png``.

    Not on the folder that holds the products: a training is the same wherever they lie.
    """
    return "/".join(Path(path).parts[-4:])


def draw(paths: Sequence[str], count: int, generator: np.random.Generator) -> list[str]:
    """Draw ``count`` different paths; which ones does not depend on the order of ``paths``."""
    ordered = sorted(paths)
    return [ordered[index] for index in generator.choice(len(ordered), size=count, replace=False)]


def draw_references(paths: Sequence[str], k_shot: int, seed: int, where: str) -> list[str]:
    """Draw the reference photos of a category without replacement, from the sorted names.

    Args:
        paths (Sequence[str]): All good photos.
        k_shot (int): How many to take.
        seed (int): Seed of the draw.
        where (str): Where the photos come from, for the message.

    Raises:
        ValueError: If there are fewer photos than shots.
    """
    if k_shot < 1 or len(paths) < k_shot:
        fewer = f", or pass a k_shot from 1 to {len(paths)}" if paths else ""
        msg = f"k_shot={k_shot}, but {where} has {len(paths)} good photo(s). Add photos{fewer}."
        raise ValueError(msg)
    return draw(paths, k_shot, seeded(seed))
