# SPDX-License-Identifier: Apache-2.0

"""Which good photos may be references of a training image."""

from typing import Any

from anomalib.data import AnomalibDataset
from anomalib.data.utils import LabelName
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from anomalib_resad.enrollment.draws import draw, seeded
from anomalib_resad.enrollment.image_size import Size
from anomalib_resad.enrollment.photos import read_header
from anomalib_resad.reference_rows import product_size
from anomalib_resad.torch_model import ResADModel
from anomalib_resad.training.source_photos import category_of


def validates_on_source(datamodule: Any) -> bool:  # noqa: ANN401
    """Whether the validation images of a datamodule are source images, which need references of their category."""
    held_out = getattr(datamodule, "val_data", None)
    return held_out is not None and "category" in held_out.samples


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

    def sizes(self, model: ResADModel) -> dict[str, Size]:
        """Input size of each category by the shapes of its good images; none where all have the model's."""
        sizes = {
            category: product_size(model, (read_header(path).stored for path in paths))
            for category, paths in self.good.items()
        }
        chosen = {category: size for category, size in sizes.items() if size is not None}
        if chosen:
            listed = ", ".join(f"{name} {height} x {width}" for name, (height, width) in chosen.items())
            rank_zero_info(f"Source photos are resized to their usual shape (height x width): {listed}.")
        return chosen

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
            self.check(k_shot)
        return draw(others, k_shot, seeded(*keys))

    def check(self, k_shot: int) -> None:
        """Refuse categories that have too few good images for any of their images.

        Raises:
            ValueError: If there are some.
        """
        for category in sorted(set(self.category_of.values())):
            good = len(self.good.get(category, []))
            if good <= k_shot:
                smaller = f", or pass a k_shot of at most {good - 1}" if good > 1 else ""
                msg = (
                    f"k_shot={k_shot}, but {category} has {good} good training images, and each needs {k_shot} others "
                    f"as references. Add good images, leave the category out{smaller}."
                )
                raise ValueError(msg)
