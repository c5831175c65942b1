# SPDX-License-Identifier: Apache-2.0

"""Random seeds by epoch and batch, so that a resumed training ends with the weights of an uninterrupted one."""

import random
from typing import Any

import numpy as np
import torch
from anomalib.utils import config
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from anomalib_resad.enrollment.draws import seeded


def heed_seed_everything() -> None:
    """Let anomalib's command line do for a ResAD what its option ``--seed_everything`` promises.

    anomalib 2.7 takes the option and never looks at it again. All of its verbs but ``export`` and the pipelines hand
    their configuration to ``update_config`` right before they build the model, whose first weights are drawn then. The
    default, ``true``, stands for a random seed, which PyTorch has without being asked.
    """
    update = config.update_config

    def seeded_update(given: Any) -> Any:  # noqa: ANN401  # of update_config
        model, seed = given.get("model") or {}, given.get("seed_everything")
        if type(seed) is int and str(model.get("class_path")).rpartition(".")[2] == "ResAD":
            seed_everything(seed, workers=True)
        return update(given)

    config.update_config = seeded_update  # type: ignore[assignment]  # which names the type of its argument


class EpochSeeds(Callback):
    """Seed Python, NumPy and PyTorch anew in each epoch and for each batch, from the training's seed.

    The order of the images and of the patches is drawn from these generators. The training's seed is the one that
    PyTorch had when the training began (``--seed_everything``). It is saved in the checkpoint.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self._starts = False

    def state_dict(self) -> dict[str, Any]:
        """The training's seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.seed = state_dict["seed"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the training's seed, unless it was restored."""
        del pl_module
        self._starts = True
        if self.seed is None:
            self.seed = trainer.strategy.broadcast(torch.initial_seed())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed before the order of the images is drawn.

        Lightning has drawn that of the first epoch, or the first after a restart, before any hook: it is drawn anew.
        """
        if not getattr(pl_module, "is_trainable", True):
            return
        self._seed(trainer, trainer.current_epoch)
        if self._starts:
            iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
            self._starts = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Seed for what is drawn in a batch."""
        del batch
        if getattr(pl_module, "is_trainable", True):
            self._seed(trainer, trainer.current_epoch, batch_idx)

    def _seed(self, trainer: Trainer, *keys: int) -> None:
        assert self.seed is not None
        derived = int(seeded(self.seed, trainer.global_rank, *keys).integers(2**32))
        random.seed(derived)
        np.random.seed(derived)  # noqa: NPY002  # what libraries draw from
        torch.manual_seed(derived)
