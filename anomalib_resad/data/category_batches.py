# SPDX-License-Identifier: Apache-2.0

"""Batches of one category each: photos of different products may be resized to different sizes."""

from collections.abc import Iterator, Sequence

from torch.utils.data import BatchSampler, Sampler


class CategoryBatches(BatchSampler):
    """Batches in the order of a sampler, each ended where the category changes.

    Args:
        sampler (Sampler[int]): Gives the order; in a distributed run Lightning replaces it.
        batch_size (int): Most photos of a batch.
        drop_last (bool): As of all batch samplers; nothing is dropped.
        categories (Sequence[str]): Category of each photo.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool, categories: Sequence[str]) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.categories = categories

    def __iter__(self) -> Iterator[list[int]]:
        """The batches."""
        batch: list[int] = []
        for index in self.sampler:
            if batch and (len(batch) == self.batch_size or self.categories[index] != self.categories[batch[-1]]):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def __len__(self) -> int:
        """How many batches there are."""
        return sum(1 for _ in self)
