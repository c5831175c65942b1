# SPDX-License-Identifier: Apache-2.0

"""What a reference bank says of itself."""

from dataclasses import dataclass, fields
from typing import Any

from anomalib_resad.enrollment.neighborhoods import judges_neighborhoods


@dataclass(frozen=True)
class BankRecord:
    """Where the rows of a bank come from: plain values, saved beside the rows.

    Attributes:
        category (str | None): Name of the category.
        origin (str | None): ``"folder"`` or ``"train split"``.
        k_shot (int | None): Photos that were asked for; ``None`` for all of a folder.
        seed (int | None): Seed of the draw.
        files (tuple[tuple[str, str], ...]): Name and SHA-256 of each photo, in the order of the rows.
        photos (int): How many photos the bank holds, each with the same number of rows, one after the other.
        rotations_asked (int | str | None): Rotations that were asked for, ``"auto"`` or a number.
        rotations (int): Orientations of each photo; 1 for photos as they are.
        bit_depth (int): Bits of a channel of the photos.
        image_size (tuple[int, int] | None): Height and width that the product's photos are resized to, chosen from
            these; ``None`` for the model's own.
    """

    category: str | None = None
    origin: str | None = None
    k_shot: int | None = None
    seed: int | None = None
    files: tuple[tuple[str, str], ...] = ()
    photos: int = 0
    rotations_asked: int | str | None = None
    rotations: int = 1
    bit_depth: int = 8
    image_size: tuple[int, int] | None = None

    @property
    def names(self) -> str:
        """Names of the photos, for messages."""
        return ", ".join(name for name, _ in self.files)

    @property
    def judges_neighborhoods(self) -> bool:
        """Whether neighborhoods of these photos are judged beside patches."""
        return judges_neighborhoods(self.photos, self.rotations)

    @classmethod
    def from_plain(cls, state: dict[str, Any]) -> "BankRecord":
        """Restore what was saved, also by version 0.1.0, which kept files as dictionaries and counted no photos."""
        known = {field.name: state[field.name] for field in fields(cls) if field.name in state}
        files = [(each["name"], each["sha256"]) if isinstance(each, dict) else each for each in state.get("files", ())]
        if known.get("image_size") is not None:
            known["image_size"] = tuple(known["image_size"])
        known["files"] = tuple((str(name), str(digest)) for name, digest in files)
        return cls(**{"photos": len(files)} | known)
