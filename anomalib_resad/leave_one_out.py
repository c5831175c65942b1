# SPDX-License-Identifier: Apache-2.0

"""Score each reference photo against the bank of the others: what good photos of the product score, without others."""

from collections.abc import Sequence

import torch
from anomalib.pre_processing import PreProcessor
from torch import nn

from anomalib_resad.enrollment import rows_of
from anomalib_resad.torch_model import ResADModel

LARGE_ENOUGH = (512, 512)  # of a blank photo, to see which size the pre-processor makes of it


def reference_scores(model: ResADModel, pre_processor: nn.Module | None) -> list[float]:
    """Raw score of each enrolled photo against the others, kept in the bank's record as ``leave_one_out`` too.

    Raises:
        ValueError: If the bank was reduced, and so holds no whole photos.
    """
    blank = torch.zeros(1, 3, *LARGE_ENOUGH)
    if isinstance(pre_processor, PreProcessor) and pre_processor.transform is not None:
        blank = pre_processor.transform(blank)
    record = model.bank.record
    scores = leave_one_out(model, len(record["files"]), blank.shape[-2:], record.get("rotations", 1))
    model.bank.record["leave_one_out"] = scores
    return scores


@torch.no_grad()
def leave_one_out(model: ResADModel, photos: int, image_size: Sequence[int], rotations: int = 1) -> list[float]:
    """Raw score of each enrolled photo against the bank without it, from the bank's rows alone.

    Args:
        model (ResADModel): The model, with a filled bank. It is left in the mode that it was in.
        photos (int): How many photos the bank holds, each with the same number of rows, one after the other.
        image_size (Sequence[int]): Height and width that the photos had behind the pre-processor.
        rotations (int): Turns of each photo; its own patches are scored.

    Returns:
        list[float]: One score per photo; none of fewer than two photos.

    Raises:
        ValueError: If the bank was reduced, and so holds no whole photos.
    """
    was_training = model.training
    model.eval()
    try:
        levels = model.bank.levels
        blank = torch.zeros(1, 3, *image_size, dtype=levels[0].dtype, device=levels[0].device)
        grids = [tuple(level.shape[-2:]) for level in model.encode(blank)]
        patches = [height * width for height, width in grids]
        if any(len(rows) != photos * rows_of(count, rotations) for rows, count in zip(levels, patches, strict=True)):
            msg = (
                f"The bank's levels hold {[len(rows) for rows in levels]} rows, which are not {photos} whole photos of "
                f"{grids} patches, {rotations} ways round: it was reduced, or made of photos of another size. "
                "Enroll the photos again."
            )
            raise ValueError(msg)
        split = [rows.split(len(rows) // max(photos, 1)) for rows in levels]  # per level and photo
        scores = []
        for index in range(photos if photos > 1 else 0):
            own = [
                parts[index][:count].reshape(1, *grid, -1).permute(0, 3, 1, 2)
                for parts, count, grid in zip(split, patches, grids, strict=True)
            ]
            others = [torch.cat([*parts[:index], *parts[index + 1 :]]) for parts in split]
            matched = model.match_each(own, [others])
            score = model.score(own, matched, image_size).pred_score
            assert score is not None
            scores.append(score.item())
        return scores
    finally:
        model.train(was_training)
