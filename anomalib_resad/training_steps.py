# SPDX-License-Identifier: Apache-2.0

"""How a ResAD is trained: one step per batch of source images, optimized by hand."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import ImageBatch
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_resad.distributed import average_batch_norms
from anomalib_resad.torch_model import ResADModel

# For the type checker only: anomalib lists the direct subclasses of AnomalibModule as models, and this is none.
if TYPE_CHECKING:
    from anomalib.models import AnomalibModule as _Module
else:
    _Module = object


def level_masks(mask: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
    """Masks at the levels' resolutions: a patch is abnormal if any of its pixels is, ``(B, H, W)`` to ``(B, h, w)``."""
    return [F.adaptive_max_pool2d(mask[:, None].float(), level.shape[-2:]).squeeze(1) for level in features]


class TrainingMixin(_Module):
    """Trains the head, or constraintor, codebook and flow, on features and references that callbacks prepare.

    Attributes:
        model (ResADModel): The torch model.
        is_trainable (bool): Whether there is something to train.
        batch_references (list[list[Tensor]] | None): Per image of the batch, rows ``(N_l, C_l)`` of each level.
        batch_features (list[Tensor] | None): Features of the batch, ``(B, C_l, H_l, W_l)`` per level.
    """

    model: ResADModel
    is_trainable: bool
    batch_references: list[list[Tensor]] | None
    batch_features: list[Tensor] | None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam over constraintor, flow and codebook; the learning rate falls after 70 % and 90 % of the epochs.

        One optimizer serves all, since their losses share no parameter.
        """
        if not self.is_trainable:
            return None
        codes = list(self.model.codebooks.parameters())
        trained = (self.model.constraintors, self.model.flows, self.model.fusion, self.model.head)
        networks = [each for part in trained if part is not None for each in part.parameters()]
        groups: list[dict[str, Any]] = [{"params": [each for each in networks if each.requires_grad]}]
        if codes:
            groups.append({"params": codes, "weight_decay": 0.0})  # decay would draw the codes away from the residuals
        optimizer = torch.optim.Adam(groups, lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"])
        epochs = self._epochs
        milestones = sorted({max(1, int(0.7 * epochs)), max(1, int(0.9 * epochs))})
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1),
        }

    @property
    def _epochs(self) -> int:
        """Epochs of the training; the paper's where the trainer knows no end."""
        epochs = self.trainer.max_epochs
        return epochs if epochs and epochs > 0 else 100

    def _is_warming_up(self) -> bool:
        """Whether the current batch belongs to the first part of the training, on normal patches alone."""
        done = self.trainer.fit_loop.batch_idx / self.trainer.num_training_batches
        return self.current_epoch + done < self.hparams["warmup"] * self._epochs

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:  # noqa: ANN401
        """One step of the head, or one of the constraintor and several of the flow over shuffled patches.

        Raises:
            ValueError: If a defective image has no mask.
        """
        del args, kwargs
        if not self.is_trainable:
            return torch.zeros((), device=self.device, requires_grad=True)
        train = self._train_flow if self.model.head is None else self._train_head
        losses = train(self._mask_of(batch))
        average_batch_norms(self.model.modules())
        size = len(self.batch_features[0]) if self.batch_features else 0
        self.log_dict(losses, prog_bar=True, on_step=False, on_epoch=True, batch_size=size)
        return None

    def _train_head(self, mask: Tensor) -> dict[str, Tensor]:
        """Train the head on a batch whose defects ``mask`` marks, shape ``(B, H, W)``."""
        assert self.batch_references is not None
        assert self.batch_features is not None
        height, width = self.batch_features[0].shape[-2:]
        shares = F.adaptive_avg_pool2d(mask[:, None].float(), (height, width)).squeeze(1)
        loss = self.model.head_loss(self.batch_features, self.batch_references, shares)
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr]
        return {"train_head": loss.detach()}

    def _train_flow(self, mask: Tensor) -> dict[str, Tensor]:
        """Train constraintor, codebook and flow on a batch whose defects ``mask`` marks, shape ``(B, H, W)``."""
        assert self.batch_references is not None
        assert self.batch_features is not None
        matched = self.model.match_each(self.batch_features, self.batch_references)
        features = self.batch_features[: len(matched)]
        masks = level_masks(mask, features)
        optimizer = self.optimizers()
        occ, constrained = self.model.constrain_loss(features, matched, masks)
        optimizer.zero_grad()  # type: ignore[union-attr]
        if occ.requires_grad:  # else there is neither a constraintor that learns nor a codebook
            self.manual_backward(occ)
        flow_losses = self.model.flow_losses(
            constrained,
            masks,
            self.hparams["flow_batch_size"],
            self.hparams["flow_steps"],
            self.hparams["push_pull_weight"],
            warming_up=self._is_warming_up(),
        )
        flow_loss = occ.new_zeros(())
        for flow_loss in flow_losses:
            self.manual_backward(flow_loss)
            optimizer.step()  # type: ignore[union-attr]
            optimizer.zero_grad()  # type: ignore[union-attr]
        return {"train_occ": occ.detach(), "train_flow": flow_loss.detach()}

    @staticmethod
    def _mask_of(batch: ImageBatch) -> Tensor:
        assert batch.image is not None
        if batch.gt_mask is not None:
            return batch.gt_mask
        if batch.gt_label is not None and bool(batch.gt_label.any()):
            msg = "A defective training image has no mask. Train with CrossCategory, which leaves such images out."
            raise ValueError(msg)
        return torch.zeros(len(batch.image), *batch.image.shape[-2:], device=batch.image.device)

    def on_train_epoch_end(self) -> None:
        """Step the learning rate, which Lightning leaves to models that optimize by hand."""
        scheduler = self.lr_schedulers()
        if self.is_trainable and scheduler is not None:
            scheduler.step()  # type: ignore[union-attr]
