# SPDX-License-Identifier: Apache-2.0

"""The reference bank: patch features of a category's good photos, and the search for the nearest one.

Paper: ResAD (arXiv 2410.20047), section 3.2: each patch feature x takes its nearest reference x* from the pool of its
level, and the residual x - x* replaces it.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Metric = Literal["l2", "cosine"]

# Most rows per block of the similarity matrix, so that memory does not grow with the bank, and columns per group when a
# block's best row is looked for (maxima of groups first: a plain argmax costs more than the matrix product itself).
BLOCK = 1600
GROUP = 32
# Positions of an image that an export searches at once: as many as keep their similarities in a CPU's cache.
STRIP = 400


def _argmax_rows(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and first index of the maximum per row, both shape ``(Q,)``, of ``(Q, N)``."""
    queries, rows = similarity.shape
    if rows % GROUP:
        index = similarity.argmax(dim=1, keepdim=True)
        return similarity.gather(1, index).squeeze(1), index.squeeze(1)
    groups = similarity.reshape(queries, rows // GROUP, GROUP)
    group = groups.amax(dim=2).argmax(dim=1)  # (Q,)
    members = groups.gather(1, group.view(-1, 1, 1).expand(-1, 1, GROUP)).squeeze(1)  # (Q, GROUP)
    member = members.argmax(dim=1, keepdim=True)
    return members.gather(1, member).squeeze(1), group * GROUP + member.squeeze(1)


def _block_size(rows: int) -> int:
    """Rows of each block: equal ones, since a small rest costs nearly as much as a whole block, in whole groups."""
    blocks = -(-rows // BLOCK)
    return GROUP * -(-rows // (blocks * GROUP))


def nearest_rows(queries: Tensor, rows: Tensor, metric: Metric = "l2") -> Tensor:
    """Find the nearest bank row of each query.

    Both metrics are one matrix product: the smallest ``||q - r||`` is the largest ``q.r - ||r||^2 / 2``, and the
    largest cosine is the largest ``q.r / ||r||``. Memory is ``Q x BLOCK``, whatever the size of the bank.

    Args:
        queries (Tensor): Query vectors, shape ``(Q, C)``.
        rows (Tensor): Bank rows, shape ``(N, C)``, ``N > 0``.
        metric (Metric): ``"l2"`` (paper) or ``"cosine"`` (published code).

    Returns:
        Tensor: Indices into ``rows``, shape ``(Q,)``; of equal rows, one of them.
    """
    keys = rows if metric == "l2" else F.normalize(rows, dim=1)
    bias = -0.5 * rows.square().sum(dim=1) if metric == "l2" else None
    best: Tensor | None = None
    index = torch.zeros(0, dtype=torch.long)
    # An export takes a bank of any size, so it cannot loop over the bank; `match` bounds its memory instead.
    exporting = torch.compiler.is_compiling()
    size = 0 if exporting else _block_size(rows.shape[0])
    for start in [0] if exporting else range(0, rows.shape[0], size):
        block = slice(None) if exporting else slice(start, start + size)
        similarity = queries @ keys[block].T
        if bias is not None:
            similarity = similarity + bias[block]
        block_best, block_index = _argmax_rows(similarity)
        if best is None:
            best, index = block_best, block_index
        else:
            nearer = block_best > best
            best = torch.where(nearer, block_best, best)
            index = torch.where(nearer, block_index + start, index)
    return index


def to_rows(features: Tensor) -> Tensor:
    """Flatten a feature map ``(B, C, H, W)`` to patch vectors ``(B * H * W, C)``."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def match(features: Tensor, rows: Tensor, metric: Metric = "l2", row_keys: Tensor | None = None) -> Tensor:
    """Replace each patch feature by its nearest bank row.

    Images are searched one by one, which is faster on a CPU (the similarities stay in its cache), bounds the memory,
    and makes the result independent of the batch. An export, whose batch has any size, goes through them in strips.

    Args:
        features (Tensor): Feature map, or map of keys, shape ``(B, K, H, W)``.
        rows (Tensor): Bank rows, shape ``(N, C)``.
        metric (Metric): ``"l2"`` or ``"cosine"``.
        row_keys (Tensor | None): What the rows are searched by, shape ``(N, K)``; by default themselves, ``K = C``.

    Returns:
        Tensor: Matched references, shape ``(B, C, H, W)``.
    """
    exporting = torch.compiler.is_compiling()
    places = features.permute(0, 2, 3, 1)  # as rows lie: turned once, however many strips there are
    axis, size = (1, -(-STRIP // features.shape[3])) if exporting else (0, 1)
    parts = [_match_part(part, rows, metric, row_keys) for part in places.split(size, dim=axis)]
    matched = parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)
    return matched.permute(0, 3, 1, 2)


def _match_part(places: Tensor, rows: Tensor, metric: Metric, row_keys: Tensor | None) -> Tensor:
    """Match some of the images, or a strip of each, ``(B, H, W, K)`` to ``(B, H, W, C)``."""
    queries = places.reshape(-1, places.shape[3])
    matched = rows[nearest_rows(queries, rows if row_keys is None else row_keys, metric)]
    return matched.reshape(*places.shape[:3], rows.shape[1])


class ReferenceBank(DynamicBufferMixin, nn.Module):
    """Patch features of the reference photos, one buffer of rows per level, and the record of what they are.

    The bank is the only part of the model that belongs to one category. It is saved and restored with the state dict,
    whatever its size.

    Args:
        channels (Sequence[int]): Channels of each level.
        metric (Metric): ``"l2"`` or ``"cosine"``.
        keyed (bool): Whether the last level holds the keys by which the first ones are searched.

    Attributes:
        record (dict[str, Any]): Where the rows come from: ``category``, ``origin``, ``k_shot``, ``seed``, ``files``
            (names and content hashes) and ``rotations`` (turns of each photo).
    """

    def __init__(self, channels: Sequence[int], metric: Metric = "l2", keyed: bool = False) -> None:
        super().__init__()
        if metric not in ("l2", "cosine"):
            msg = f"match='{metric}' is not known; use 'l2' or 'cosine'."
            raise ValueError(msg)
        self.metric: Metric = metric
        self.keyed = keyed
        self.record: dict[str, Any] = {}
        self._channels = tuple(channels)
        for level, count in enumerate(channels):
            self.register_buffer(f"rows_{level}", torch.zeros(0, count))

    @property
    def levels(self) -> list[Tensor]:
        """Rows of each level, shape ``(N_l, C_l)``."""
        return [self.get_buffer(f"rows_{level}") for level in range(len(self._channels))]

    @property
    def enrolled(self) -> list[Tensor]:
        """Rows of each level, of a bank that must hold some.

        Raises:
            RuntimeError: If the bank is empty.
        """
        if self.is_empty:
            msg = (
                "The reference bank is empty: no good photo of the product was shown to the model. Pass "
                "`references=<folder of good photos>`, test with a datamodule, or load an enrolled checkpoint."
            )
            raise RuntimeError(msg)
        return self.levels

    @property
    def is_empty(self) -> bool:
        """Whether no reference photo was enrolled yet."""
        return self.levels[0].shape[0] == 0

    def fill(self, features: Sequence[Tensor], record: dict[str, Any] | None = None) -> None:
        """Replace the bank by the features of other reference photos.

        Args:
            features (Sequence[Tensor]): One feature map per level, shape ``(K, C_l, H_l, W_l)``.
            record (dict[str, Any] | None): As of :meth:`store`, which has the errors too.
        """
        self.store([to_rows(level) for level in features], record)

    def store(self, rows: Sequence[Tensor], record: dict[str, Any] | None = None) -> None:
        """Replace the bank by other rows.

        Args:
            rows (Sequence[Tensor]): Rows of each level, shape ``(N_l, C_l)``, photo after photo.
            record (dict[str, Any] | None): Plain data about the photos, kept and saved beside the rows.

        Raises:
            ValueError: If there is no photo, a level has other channels, or a feature is not finite.
        """
        shapes = [tuple(level.shape) for level in rows]
        if tuple(shape[1] for shape in shapes) != self._channels or any(shape[0] == 0 for shape in shapes):
            msg = f"The bank takes levels of {self._channels} channels and at least one photo, got rows {shapes}."
            raise ValueError(msg)
        if not all(torch.isfinite(level).all() for level in rows):
            msg = "The reference features hold NaN or infinity; check the backbone's weights file and the photos."
            raise ValueError(msg)
        for level, values in enumerate(rows):
            self.register_buffer(f"rows_{level}", values.detach().clone().to(self.levels[level].device))
        self.record = dict(record or {})

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Match every level of a batch against the bank.

        Args:
            features (Sequence[Tensor]): One feature map per level, shape ``(B, C_l, H_l, W_l)``.

        Returns:
            list[Tensor]: Matched references, of the same shapes; none for keys.

        Raises:
            RuntimeError: If the bank is empty.
        """
        return self.match(features, self.enrolled)

    def match(self, features: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
        """Match every level against rows ``(N_l, C_l)`` that need not be the bank's own, in the bank's way."""
        if not self.keyed:
            return [match(level, values, self.metric) for level, values in zip(features, rows, strict=True)]
        *values, row_keys = rows
        return [match(features[-1], level, self.metric, row_keys) for level in values]

    def get_extra_state(self) -> dict[str, Any]:
        """The record travels in the state dict."""
        return self.record

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the record."""
        self.record = dict(state)
