# SPDX-License-Identifier: Apache-2.0

"""The target's data as every method of a leaderboard sees it: the drawn references, the test images."""

import copy

from anomalib.data import AnomalibDataModule
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_resad.enrollment.draws import draw_references, seeded
from anomalib_resad.enrollment.photos import check_photos
from benchmarks.cells import CLEAN, Cell
from benchmarks.perturbations import BAD_REFERENCE, perturbation


def target_data(template: AnomalibDataModule, cell: Cell) -> AnomalibDataModule:
    """The target's datamodule with the drawn references as its whole train split.

    Every method fits on this split, so every method sees the same photos.

    Args:
        template (AnomalibDataModule): Datamodule of the category.
        cell (Cell): Shots, draw and condition.

    Raises:
        ValueError: If there are too few good photos, or unusable ones.
    """
    data = copy.deepcopy(template)
    if cell.condition not in (CLEAN, BAD_REFERENCE):
        data.test_augmentations = perturbation(cell.condition, float(cell.level or 0))
    data.prepare_data()
    data.setup(TrainerFn.FITTING)
    samples = data.train_data.samples
    good = samples[samples.label_index == 0].image_path.tolist()
    chosen = draw_references(good, cell.shots, cell.draw, f"the train split of {cell.category}")
    check_photos(chosen, "reference photos", decode=True)
    positions = {path: index for index, path in enumerate(samples.image_path)}
    data.train_data = data.train_data.subsample([positions[path] for path in chosen])
    if cell.condition == BAD_REFERENCE:
        _swap_in_defective(data, cell)
    data.train_batch_size = len(chosen)
    return data


def _swap_in_defective(data: AnomalibDataModule, cell: Cell) -> None:
    """Replace references by defective test images, as if someone had enrolled them by mistake; they leave the test."""
    count = min(int(cell.level or 0), cell.shots)
    test = data.test_data.samples
    defective = test.index[test.label_index == 1].tolist()
    bad = [defective[i] for i in seeded(cell.draw, BAD_REFERENCE).choice(len(defective), count, replace=False)]
    mistaken = data.test_data.subsample(bad).samples
    samples = data.train_data.samples.copy()
    samples.loc[: count - 1, "image_path"] = mistaken.image_path.to_numpy()
    attributes = dict(data.train_data.samples.attrs)
    data.train_data.samples = samples
    data.train_data.samples.attrs.update(attributes)
    data.test_data = data.test_data.subsample([index for index in range(len(test)) if index not in set(bad)])
