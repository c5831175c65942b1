# SPDX-License-Identifier: Apache-2.0

"""Which good photos may be references of a training image."""

from anomalib.data import AnomalibDataset
from anomalib.data.utils import LabelName

from anomalib_resad.enrollment.draws import draw, seeded
from anomalib_resad.training.source_photos import category_of


class ReferencePools:
    """Good images of each category, and the category of each image.

    Args:
        *datasets (AnomalibDataset): Data sets; the first gives the good images.
    """

    def __init__(self, *datasets: AnomalibDataset) -> None:
        self.category_of: dict[str, str] = {}
        for dataset in datasets:
            self.category_of |= category_of(dataset)
        train = datasets[0].samples
        self.good: dict[str, list[str]] = {}
        for path in train.image_path[train.label_index == LabelName.NORMAL]:
            self.good.setdefault(self.category_of[path], []).append(path)

    def draw(self, path: str, k_shot: int, *keys: int | str) -> list[str]:
        """Draw references for an image from its own category: never itself, without replacement.

        Args:
            path (str): The image.
            k_shot (int): How many.
            *keys (int | str): What the draw depends on.

        Raises:
            ValueError: If the category has too few other good images.
        """
        category = self.category_of[path]
        others = [other for other in self.good.get(category, []) if other != path]
        if len(others) < k_shot:
            msg = (
                f"k_shot={k_shot}, but {category} has {len(others)} good training images beside {path}. "
                "Add good images, leave the category out, or pass a smaller k_shot."
            )
            raise ValueError(msg)
        return draw(others, k_shot, seeded(*keys))
