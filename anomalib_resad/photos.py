# SPDX-License-Identifier: Apache-2.0

"""Photos on disk: checked before they are used, drawn with a seed, named by their content."""

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from anomalib.data.utils import read_image
from anomalib.data.utils.image import get_image_filenames
from torch import Tensor

from anomalib_resad.photo_files import content_hash, photo_problem


def check_photos(paths: Iterable[Path | str], purpose: str, decode: bool = False) -> None:
    """Check photos before anything is computed from them.

    Args:
        paths (Iterable[Path | str]): The files.
        purpose (str): What they are for, for the message ("reference photos").
        decode (bool): Also decode the pixels.

    Raises:
        ValueError: If a photo is unusable; the message names up to five of them.
    """
    problems = [(path, problem) for path in paths if (problem := photo_problem(path, decode)) is not None]
    if problems:
        named = "; ".join(f"{path}: {problem}" for path, problem in problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        msg = f"{len(problems)} of the {purpose} cannot be used. {named}{more}. Repair or remove these files."
        raise ValueError(msg)


def seeded(*keys: int | str) -> np.random.Generator:
    """A generator that depends on its keys alone (not on order, process or Python's hash seed)."""
    return np.random.default_rng([zlib.crc32(str(key).encode()) for key in keys])


def draw(paths: Sequence[str], count: int, generator: np.random.Generator) -> list[str]:
    """Draw ``count`` different paths; which ones does not depend on the order of ``paths``."""
    ordered = sorted(paths)
    return [ordered[index] for index in generator.choice(len(ordered), size=count, replace=False)]


def draw_references(paths: Sequence[str], k_shot: int, seed: int, where: str) -> list[str]:
    """Draw the reference photos of a category, in an order of their own.

    The draw starts from the sorted names, without replacement. The result is ordered by content, so that a bank
    depends on the photos and not on how they are called or listed, and of identical photos one is kept.

    Args:
        paths (Sequence[str]): All good photos.
        k_shot (int): How many to take.
        seed (int): Seed of the draw.
        where (str): Where the photos come from, for the message.

    Raises:
        ValueError: If there are fewer photos than shots, or a drawn photo is unusable.
    """
    if k_shot < 1 or len(paths) < k_shot:
        msg = (
            f"k_shot={k_shot}, but {where} has {len(paths)} good photo(s). "
            f"Add photos, or pass a k_shot from 1 to {max(len(paths), 1)}."
        )
        raise ValueError(msg)
    chosen = draw(paths, k_shot, seeded(seed))
    check_photos(chosen, "reference photos", decode=True)
    by_content = {content_hash(path): path for path in sorted(chosen, reverse=True)}
    return [by_content[key] for key in sorted(by_content)]


def list_photos(folder: Path | str) -> list[str]:
    """All images of a folder, sorted.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        msg = f"references={folder} is not a folder. Pass a folder that holds the good photos of one product."
        raise FileNotFoundError(msg)
    try:
        return sorted(str(path) for path in get_image_filenames(folder))
    except ValueError as error:
        msg = f"{folder} holds no image. Put the good photos of one product there (png, jpg, bmp, tif, webp)."
        raise ValueError(msg) from error


def read_photo(path: Path | str) -> Tensor:
    """Read a photo as anomalib's datasets do: RGB, float in 0..1, shape ``(3, H, W)``."""
    photo = read_image(path, as_tensor=True)
    return torch.as_tensor(photo)
