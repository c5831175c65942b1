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
from torch import distributed

from anomalib_resad import CrossCategory, ProductFolder, ResAD
from anomalib_resad.method.codebook import Codebook
from anomalib_resad.method.distributed import average_batch_norms, mean_of_known
from anomalib_resad.method.residual_flow import ResidualFlow

# Every patch in one step, so that a step sees the same patches in one process as in two.
SETTINGS = {"backbone": "resnet18", "pre_trained": False, "k_shot": 2, "image_size": (64, 64), "visualizer": False}
OF_VARIANT: dict[str, dict] = {
    "fused": {},
    "resad++": {"coupling_layers": 2, "position_channels": 8, "flow_batch_size": 100_000, "codebook_size": 32},
}


class KeepState(Callback):
    """Write the state of this process when training ends."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tensors = {name: value for name, value in pl_module.state_dict().items() if isinstance(value, torch.Tensor)}
        torch.save(tensors, self.output / f"rank{trainer.global_rank}.pt")


def main(root: Path, output: Path, processes: int, batch: int, variant: str = "resad++", order: int = 0) -> None:
    seed_everything(0, verbose=False)
    settings = SETTINGS | OF_VARIANT[variant]
    model = ResAD(**settings, variant=variant, lr=1e-3, false_alarm_rate=0.3)
    seed_everything(order, verbose=False)  # the same first weights, whatever comes after
    sources, target = (ProductFolder(root, names, num_workers=0) for names in ("grain, pill", "tiles"))
    data = CrossCategory(sources, target, 0.4, batch, batch, 0)
    devices = {"strategy": "ddp", "devices": processes} if processes > 1 else {"devices": 1}
    engine = Engine(
        default_root_dir=output / f"engine{os.environ.get('LOCAL_RANK', '0')}",
        accelerator="cpu",
        max_epochs=2,
        callbacks=[KeepState(output)],
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **devices,
    )
    engine.fit(model, datamodule=data)
    if processes > 1:
        assert isinstance(engine.trainer.strategy, DDPStrategy)


# Log-likelihoods, or residuals of one channel, of the two processes.
PARTS = torch.tensor([[-3.0, -1.0, -2.0, -4.0], [-0.5, -5.0, -6.0, -7.0]])


def share(rank: int, folder: Path) -> None:
    """What a process learns of its part of PARTS together with the other one."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mine, nan = PARTS[rank], torch.tensor(float("nan"))
    flow = ResidualFlow([4], coupling_layers=1, position_channels=0)
    flow.update_ceiling(0, mine, torch.zeros(4))
    flow.update_ceiling(0, mine, torch.ones(4))  # no normal position anywhere: nothing to learn
    norm = torch.nn.BatchNorm1d(1, momentum=None)
    norm(mine[:, None])
    average_batch_norms([norm])
    codebook = Codebook(1, 16)
    codebook.start_from(mine[:, None], torch.zeros(4))
    assert norm.running_mean is not None
    found = {"ceilings": flow.ceilings, "batch norm": norm.running_mean, "codes": codebook.codes.detach()}
    found |= {"known": mean_of_known(mine.mean() if rank else nan), "unknown": mean_of_known(nan)}
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
