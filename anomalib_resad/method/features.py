# SPDX-License-Identifier: Apache-2.0

"""What the encoder gives and what a bank holds: maps or rows of each level, their keys, and neighborhoods."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Features(NamedTuple):
    """Features of photos.

    Attributes:
        values (list[Tensor]): One map per level, shape ``(B, C_l, H_l, W_l)``.
        keys (Tensor | None): Short vectors by which all levels are searched, shape ``(B, K, H, W)``; ``None`` where
            each level is searched by its own values.
        neighborhoods (Tensor | None): Mean keys of neighborhoods of patches, which are searched by themselves, shape
            ``(B, K, H', W')``; ``None`` where nothing judges them.
    """

    values: list[Tensor]
    keys: Tensor | None = None
    neighborhoods: Tensor | None = None

    @property
    def photos(self) -> list["Features"]:
        """The features of each photo, a batch of one."""
        return [self.photo(index) for index in range(len(self.values[0]))]

    def photo(self, index: int) -> "Features":
        """The features of one photo, a batch of one."""
        return from_list([level[index : index + 1] for level in as_list(self)], self.keys is not None)


class Rows(NamedTuple):
    """Features of the patches of reference photos, as a bank holds them.

    Attributes:
        values (list[Tensor]): One row per patch and level, shape ``(N_l, C_l)``.
        keys (Tensor | None): Keys of the rows, shape ``(N, K)``, as of :class:`Features`.
        neighborhoods (Tensor | None): Shape ``(N', K)``, as of :class:`Features`.
    """

    values: list[Tensor]
    keys: Tensor | None = None
    neighborhoods: Tensor | None = None


def as_list(features: Features | Rows) -> list[Tensor]:
    """The levels one after the other, then neighborhoods, if there are any, and keys as the last."""
    rest = [features.neighborhoods, features.keys]
    return [*features.values, *(each for each in rest if each is not None)]


def from_list(levels: Sequence[Tensor], keyed: bool) -> Features:
    """The features that :func:`as_list` made a list of."""
    if not keyed:
        return Features(list(levels))
    values, *neighborhoods, keys = levels
    return Features([values], keys, *neighborhoods)


def rows_from_list(levels: Sequence[Tensor], keyed: bool) -> Rows:
    """The rows that :func:`as_list` made a list of."""
    return Rows(*from_list(levels, keyed))


def to_rows(features: Tensor) -> Tensor:
    """Flatten a feature map ``(B, C, H, W)`` to patch vectors ``(B * H * W, C)``."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def rows_of(features: Features) -> Rows:
    """The patches of photos as rows, photo after photo."""
    return rows_from_list([to_rows(level) for level in as_list(features)], features.keys is not None)


def without_neighborhoods(rows: Rows) -> Rows:
    """Rows whose neighborhoods, if there are any, are not judged: the estimator passes over a single one of zeros."""
    around = rows.neighborhoods
    return rows if around is None else rows._replace(neighborhoods=torch.zeros_like(around[:1]))
