# SPDX-License-Identifier: Apache-2.0

"""The reference bank: patch features of a category's good photos, and the search for the nearest one.

Paper: ResAD (arXiv 2410.20047), section 3.2: each patch feature x takes its nearest reference x* from the pool of its
level, and the residual x - x* replaces it.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_resad.enrollment.coreset import searched
from anomalib_resad.method.bank_record import BankRecord
from anomalib_resad.method.features import Features, Rows, as_list, rows_of, without_neighborhoods

Metric = Literal["l2", "cosine"]

# Most rows per block of the similarity matrix, so that memory does not grow with the bank, and columns per group when a
# block's best row is looked for (maxima of groups first: a plain argmax costs more than the matrix product itself).
BLOCK = 1600
GROUP = 32
# Positions of an image that an export searches at once: as many as keep their similarities in a CPU's cache.
STRIP = 400
# Share of each photo's rows that is searched where levels are joined: a half that covers the others finds as much as
# all of them (benchmarks/experiments.md), in half the time.
SEARCHED = 0.5


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
    # An export takes a bank of any size, so it cannot loop over the bank; `nearest` bounds its memory instead.
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


def nearest(features: Tensor, rows: Tensor, metric: Metric = "l2", row_keys: Tensor | None = None) -> Tensor:
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
    places = features.permute(0, 2, 3, 1)  # as rows lie: transposed once, however many strips there are
    axis, size = (1, -(-STRIP // features.shape[3])) if exporting else (0, 1)
    if isinstance(features.shape[2], int):
        split = list(places.split(size, dim=axis))
    elif row_keys is None:  # searched by themselves, as neighborhoods, of which there may be a single row
        split = [places]
    else:  # of an export for photos of any shape: the number of strips must be known
        middle = features.shape[2] // 2
        split = [places[:, :middle], places[:, middle:]]
    parts = [_nearest_of_part(part, rows, metric, row_keys) for part in split]
    matched = parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)
    return matched.permute(0, 3, 1, 2)


def _nearest_of_part(places: Tensor, rows: Tensor, metric: Metric, row_keys: Tensor | None) -> Tensor:
    """The nearest rows of some of the images, or of a strip of each, ``(B, H, W, K)`` to ``(B, H, W, C)``."""
    queries = places.reshape(-1, places.shape[3])
    matched = rows[nearest_rows(queries, rows if row_keys is None else row_keys, metric)]
    return matched.reshape(*places.shape[:3], rows.shape[1])


def nearest_of_each_level(features: Features, rows: Rows, metric: Metric) -> list[Tensor]:
    """Find the nearest reference of each patch, level by level, or once for all levels where there are keys.

    Args:
        features (Features): Features of photos.
        rows (Rows): Rows of the references.
        metric (Metric): ``"l2"`` or ``"cosine"``.

    Returns:
        list[Tensor]: One map ``(B, C_l, H_l, W_l)`` per level, of the features' shapes, and one of the neighborhoods,
            if there are any.
    """
    if features.keys is None:
        return [nearest(level, values, metric) for level, values in zip(features.values, rows.values, strict=True)]
    matched = [nearest(features.keys, values, metric, rows.keys) for values in rows.values]
    if features.neighborhoods is None or rows.neighborhoods is None:
        return matched
    return [*matched, nearest(features.neighborhoods, rows.neighborhoods, metric)]


class ReferenceBank(DynamicBufferMixin, nn.Module):
    """Patch features of the reference photos, one buffer of rows per level, and the record of what they are.

    The bank is the only part of the model that belongs to one category. It is saved and restored with the state dict,
    whatever its size.

    Args:
        channels (Sequence[int]): Channels of each level.
        key_channels (int): Channels of the keys by which all levels are searched; 0 for none.
        metric (Metric): ``"l2"`` or ``"cosine"``.

    Attributes:
        record (BankRecord): Where the rows come from.
        share (Tensor): Share of each photo's rows that is searched. It is saved: models of version 0.1.0 search all.
    """

    share: Tensor

    def __init__(self, channels: Sequence[int], key_channels: int = 0, metric: Metric = "l2") -> None:
        super().__init__()
        if metric not in ("l2", "cosine"):
            msg = f"match='{metric}' is not known; use 'l2' or 'cosine'."
            raise ValueError(msg)
        self.metric: Metric = metric
        self.keyed = key_channels > 0
        self.record = BankRecord()
        # Of the values of each level, of their keys, and of neighborhoods, which not every estimator judges.
        self._channels = (*channels, key_channels, key_channels) if self.keyed else tuple(channels)
        for level, count in enumerate(self._channels):
            self.register_buffer(f"rows_{level}", torch.zeros(0, count))
            self.register_buffer(f"searched_{level}", torch.zeros(0, count), persistent=False)
        self.register_buffer("share", torch.tensor(SEARCHED if self.keyed else 1.0))

    @property
    def rows(self) -> Rows:
        """All rows; of an empty bank, none."""
        return self._buffers_of("rows")

    @property
    def enrolled(self) -> Rows:
        """All rows of a bank that must hold some.

        Raises:
            RuntimeError: If the bank is empty.
        """
        if self.is_empty:
            msg = (
                "The reference bank is empty: no good photo of the product was shown to the model. Pass "
                "`references=<folder of good photos>`, test with a datamodule, or load an enrolled checkpoint."
            )
            raise RuntimeError(msg)
        return self.rows

    @property
    def searched(self) -> Rows:
        """The rows that are searched, of a bank that must hold some; errors as of :attr:`enrolled`."""
        _ = self.enrolled
        return self._buffers_of("searched")

    @property
    def is_empty(self) -> bool:
        """Whether no reference photo was enrolled yet."""
        return self.get_buffer("rows_0").shape[0] == 0

    def _buffers_of(self, name: str) -> Rows:
        levels = [self.get_buffer(f"{name}_{level}") for level in range(len(self._channels))]
        if not self.keyed:
            return Rows(levels)
        *values, keys, neighborhoods = levels
        return Rows(values, keys, neighborhoods if len(neighborhoods) else None)

    def _keep(self, name: str, rows: Rows) -> None:
        device = self.get_buffer("rows_0").device
        levels = [*rows.values, *(each for each in (rows.keys, rows.neighborhoods) if each is not None)]
        for level, channels in enumerate(self._channels):
            values = levels[level].detach().clone() if level < len(levels) else torch.zeros(0, channels)
            self.register_buffer(f"{name}_{level}", values.to(device), persistent=name == "rows")

    def fill(self, features: Features) -> None:
        """Replace the bank by the features of other reference photos, shape ``(K, C_l, H_l, W_l)`` per level.

        Raises:
            ValueError: See :meth:`store`.
        """
        self.store(rows_of(features), BankRecord(photos=features.values[0].shape[0]))

    def store(self, rows: Rows, record: BankRecord) -> None:
        """Replace the bank by other rows.

        Args:
            rows (Rows): Rows of each level, photo after photo.
            record (BankRecord): Where they come from.

        Raises:
            ValueError: If there is no photo, a level has other channels, or a feature is not finite.
        """
        levels = as_list(rows)
        shapes = [tuple(level.shape) for level in levels]
        expected = self._channels[:-1] if self.keyed and rows.neighborhoods is None else self._channels
        if tuple(shape[1] for shape in shapes) != expected or any(shape[0] == 0 for shape in shapes):
            msg = f"The bank takes levels of {expected} channels and at least one photo, got rows {shapes}."
            raise ValueError(msg)
        if not all(torch.isfinite(level).all() for level in levels):
            msg = "The reference features hold NaN or infinity; check the backbone's weights file and the photos."
            raise ValueError(msg)
        self._keep("rows", rows)
        self.record = record
        self._choose_searched()

    def thin_out(self, rows: Rows, photos: int, neighborhoods: bool) -> Rows:
        """The rows that a search looks through, of those of some photos.

        Args:
            rows (Rows): Their rows.
            photos (int): How many they are.
            neighborhoods (bool): Whether these are judged, all of them, since they are few; else see
                :func:`~anomalib_resad.method.features.without_neighborhoods`.
        """
        if not neighborhoods:
            rows = without_neighborhoods(rows)
        if rows.keys is None or float(self.share) >= 1:
            return rows
        chosen = torch.from_numpy(searched(rows.keys.float().cpu().numpy(), photos, float(self.share)))
        chosen = chosen.to(rows.keys.device)
        return rows._replace(values=[level[chosen] for level in rows.values], keys=rows.keys[chosen])

    def _choose_searched(self) -> None:
        record = self.record
        self._keep("searched", self.thin_out(self.rows, record.photos, record.judges_neighborhoods))

    def forward(self, features: Features) -> list[Tensor]:
        """Match each level of a batch against the bank, maps of the features' shapes; errors as of :attr:`enrolled`."""
        return nearest_of_each_level(features, self.searched, self.metric)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        state_dict.setdefault(f"{prefix}share", torch.tensor(1.0))
        last = len(self._channels) - 1
        if self.keyed:  # banks from before there were neighborhoods
            state_dict.setdefault(f"{prefix}rows_{last}", torch.zeros(0, self._channels[last]))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._choose_searched()

    def get_extra_state(self) -> dict[str, Any]:
        """The record travels in the state dict, as plain values."""
        return asdict(self.record)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the record."""
        self.record = BankRecord.from_plain(state)
