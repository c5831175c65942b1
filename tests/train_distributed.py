# SPDX-License-Identifier: Apache-2.0

"""Train a tiny model in as many processes as asked for; each writes what it ended with. A script: see test_distributed.

Usage: train_distributed.py <products> <output> <processes> <images per batch> <variant>
"""

import os
import sys
from pathlib import Path

import torch
from anomalib.engine import Engine
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy

from anomalib_resad import CrossCategory, ProductFolder, ResAD

# Every patch in one step, so that a step sees the same patches in one process as in two.
SETTINGS = {"backbone": "resnet18", "pre_trained": False, "coupling_layers": 2, "position_channels": 8, "k_shot": 2}
SETTINGS |= {"image_size": (64, 64), "flow_batch_size": 100_000, "lr": 1e-3, "visualizer": False}


class KeepState(Callback):
    """Write the state of this process when training ends."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tensors = {name: value for name, value in pl_module.state_dict().items() if isinstance(value, torch.Tensor)}
        torch.save(tensors, self.output / f"rank{trainer.global_rank}.pt")


def main(root: Path, output: Path, processes: int, batch: int, variant: str) -> None:
    seed_everything(0, verbose=False)
    plus = {"codebook_size": 32} if variant == "resad++" else {}
    model = ResAD(**SETTINGS, variant=variant, **plus, false_alarm_rate=0.3)
    sources, target = (ProductFolder(root, names, num_workers=0) for names in ("grain, pill", "tiles"))
    data = CrossCategory(sources, target, 0.4, batch, batch, 0)
    distributed = {"strategy": "ddp", "devices": processes} if processes > 1 else {"devices": 1}
    engine = Engine(
        default_root_dir=output / f"engine{os.environ.get('LOCAL_RANK', '0')}",
        accelerator="cpu",
        max_epochs=2,
        callbacks=[KeepState(output)],
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **distributed,
    )
    engine.fit(model, datamodule=data)
    if processes > 1:
        assert isinstance(engine.trainer.strategy, DDPStrategy)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
