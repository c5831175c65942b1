# SPDX-License-Identifier: Apache-2.0

"""anomalib's pictures, with photos as they were read; anomalib itself would open the files anew, by its own rule."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Trainer
from PIL import Image

from anomalib_resad.enrollment.photos import read_header, read_like


class PhotoVisualizer(ImageVisualizer):
    """Draws photos that anomalib would read differently from copies of 8 bits, which are removed again."""

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,  # noqa: ANN401  # a ResAD, which has a bank
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw a batch."""
        paths = getattr(batch, "image_path", None)
        shown = list(paths or ())
        with TemporaryDirectory() as folder:
            for index, path in enumerate(shown):
                if Path(path).is_file() and not read_header(path).is_shown_alike:
                    copy = Path(folder, *Path(path).absolute().parts[1:])  # its name is made of the folders
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(read_like(path, pl_module.model.bank.record.bit_depth)).save(copy, "PNG")
                    shown[index] = str(copy)
            if shown:
                batch.image_path = shown
            try:
                super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
            finally:
                if shown:
                    batch.image_path = paths
