# SPDX-License-Identifier: Apache-2.0

"""Heads that come with the package: what was trained, without the backbone, so that a fresh installation inspects.

A head is a file of a few hundred kilobytes, ``heads/<backbone>.safetensors``: the keys' directions, the estimator with
its statistics, the thresholds, and a card of how it was made (``python -m benchmarks.ready_heads``). It judges the
features of the weights that it was trained with and of no others. These weights come in several files, with batch norms
folded or not. So they are told by what the backbone makes of one picture, which lies in the file too.

A ResAD that was not trained takes its backbone's head for a test or a prediction, and gives it back before it is
trained. Where there is no head, the plain distance to the references stands in, which needs no training.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from anomalib_resad.checkpoint import BUILT_WITH
from anomalib_resad.enrollment.files import write_whole
from anomalib_resad.method.backbone import FeaturePyramid
from anomalib_resad.method.estimators import Distance, Estimator
from anomalib_resad.method.head import EvidenceHead
from anomalib_resad.method.presets import ARCHITECTURE
from anomalib_resad.method.safe_load import load_weights_only
from anomalib_resad.post_processor import RankKeepingPostProcessor

READY = "ready"  # what stands for a checkpoint where the head of the package is meant
HEADS = Path(__file__).with_name("heads")
CARD = "card"  # metadata of the file; a single entry, because safetensors keeps no order of several
PROBE = "probe"
TRAINED = ("model.encoder.join.", "model.estimator.", "post_processor.")  # what of a ResAD is in a head
OF_PRODUCT = ("post_processor.product_threshold", "post_processor.map_offset")
PROBE_SIDE = 64
SAME = 0.02  # most difference of two probes of the same weights, which float32 and folded batch norms leave far below
# Settings that a head is made for. Size and smoothing of the map are the user's.
MADE_FOR = ("variant", "layers", *ARCHITECTURE)
MADE_FOR_DISTANCE = ("variant", "layers", "match", "projection")  # which takes the keys of a head


def head_file(backbone: str, folder: Path | None = None) -> Path:
    """Where the head of a backbone is, whichever of its weights are meant (``resnet18.tv_in1k``: ``resnet18``).

    Args:
        backbone (str): timm model name.
        folder (Path | None): Folder of heads; by default the package's.
    """
    return (folder or HEADS) / f"{backbone.partition('.')[0]}.safetensors"


@torch.no_grad()
def probe(backbone: FeaturePyramid) -> Tensor:
    """What tells the weights of a backbone: the mean of each channel, on one picture of waves.

    Args:
        backbone (FeaturePyramid): A backbone of convolutions, which takes any size.

    Returns:
        Tensor: On the CPU, shape ``(C_1 + C_2 + ...,)``.
    """
    device = next(backbone.parameters()).device
    steps = torch.arange(PROBE_SIDE, dtype=torch.float64) / PROBE_SIDE
    waves = [torch.sin(20 * steps[:, None] * (1 + c) + 13 * steps[None] ** 2) for c in range(3)]
    levels = backbone(torch.stack(waves)[None].float().to(device))
    return torch.cat([level.mean(dim=(0, 2, 3)) for level in levels]).cpu()


def write_head(module: Any, path: Path, about: dict[str, Any]) -> None:  # noqa: ANN401  # a ResAD
    """Write the head of a trained ResAD; the same model gives the same bytes.

    Args:
        module (Any): The ResAD.
        path (Path): The file.
        about (dict[str, Any]): What the card tells beside settings and weights: plain values only.

    Raises:
        ValueError: If something that was trained is not finite, as the threshold is where none was learned.
    """
    state = module.state_dict()
    trained = [name for name in state if name.startswith(TRAINED) and name not in OF_PRODUCT]
    tensors = {name: state[name].cpu().contiguous() for name in trained}
    broken = [name for name, value in tensors.items() if not bool(torch.isfinite(value.float()).all())]
    if broken:
        msg = f"No head was written: {broken} are not finite. Train on products with good and defective photos."
        raise ValueError(msg)
    backbone = module.model.encoder.backbone
    card = {
        "settings": {name: module.hparams[name] for name in (*BUILT_WITH, "rotations")},
        "weights": backbone.origin,
    }
    write_whole(path, save(tensors | {PROBE: probe(backbone)}, {CARD: json.dumps(card | about, sort_keys=True)}))


def read_card(path: Path) -> dict[str, Any]:
    """How a head was made: its settings, weights, sources and licenses, training."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[CARD])


# -- into a Lightning model -------------------------------------------------------------------------------------------


def is_untrained(module: Any) -> bool:  # noqa: ANN401  # a ResAD
    """Whether a ResAD has a head that was neither trained nor restored."""
    estimator = module.model.estimator
    return isinstance(estimator, EvidenceHead) and not bool(estimator.batches)


Untrained = tuple[Estimator, str, dict[str, nn.Module]]  # what a head took the place of


def take_ready_head(module: Any, for_good: bool = False) -> None:  # noqa: ANN401  # a ResAD
    """Give an untrained ResAD the head of its backbone, or the plain distance where there is none, and say which.

    Args:
        module (Any): The ResAD.
        for_good (bool): Whether :func:`give_back_ready_head` is to leave it.

    Raises:
        Exception: As of :meth:`FeaturePyramid.bring_weights`.
    """
    model, path = module.model, head_file(module.hparams["backbone"])
    if not for_good:
        kept = {name: copy.deepcopy(part) for name, part in _parts(module).items()}
        module.untrained = (model.estimator, module.hparams["estimator"], kept)
    why = _unfit(module, path)
    if why is None:
        state = load_weights_only(path, "ready head")
        model.estimator = copy.deepcopy(model.estimator)
        parts = {**_parts(module), "model.estimator.": model.estimator}
        if module.hparams["estimator"] == "distance":  # whose scores the head's threshold is not for
            parts = {name: part for name, part in parts.items() if name.startswith("model.encoder.")}
        for name, part in parts.items():
            own = {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}
            part.load_state_dict(part.state_dict() | own)
        sources = read_card(path)["sources"]
        rank_zero_info(
            f"Ready head of {path.stem}: trained on {len(sources['products'])} products ({sources['license']}), "
            "for products that were never seen."
        )
    else:
        model.estimator = Distance(module.hparams["match"])
        module.hparams["estimator"] = "distance"
        rank_zero_info(f"{why} The plain distance to the good photos is used, which finds fewer defects.")
    if isinstance(module.post_processor, RankKeepingPostProcessor):
        module.post_processor.keep_statistics = True
    model.has_ready_head = why is None


def _parts(module: Any) -> dict[str, nn.Module]:  # noqa: ANN401  # a ResAD
    """What of a ResAD a head changes beside its estimator, by the prefix of its tensors."""
    parts: dict[str, nn.Module] = {}
    if module.model.encoder.join is not None:
        parts["model.encoder.join."] = module.model.encoder.join
    if isinstance(module.post_processor, RankKeepingPostProcessor):
        parts["post_processor."] = module.post_processor
    return parts


def _unfit(module: Any, path: Path) -> str | None:  # noqa: ANN401  # a ResAD
    """Why a head cannot be used; ``None`` where it can."""
    name, train = module.hparams["backbone"], "Train one with `anomalib fit`."
    if not path.is_file():
        there = ", ".join(sorted(each.stem for each in path.parent.glob("*.safetensors"))) or "none yet"
        return f"There is no ready head for backbone '{name}' (there are: {there}). {train}"
    card = read_card(path)
    decisive = MADE_FOR_DISTANCE if module.hparams["estimator"] == "distance" else MADE_FOR
    other = [key for key in decisive if module.hparams[key] != card["settings"][key]]
    if other:
        made = ", ".join(f"{key}={card['settings'][key]}" for key in other)
        return f"The ready head of {path.stem} is for {made}. {train}"
    found, made_with = probe(module.model.encoder.backbone), load_weights_only(path, "ready head")[PROBE]
    if float((found - made_with).norm()) > SAME * float(made_with.norm()):
        origin = module.model.encoder.backbone.origin
        return (
            f"The ready head of {path.stem} is for its weights {card['weights']}, not for these ({origin}); see "
            f"docs/ready_heads.md. {train}"
        )
    return None


def give_back_ready_head(module: Any) -> None:  # noqa: ANN401  # a ResAD
    """Undo :func:`take_ready_head`: what is trained starts fresh."""
    if module.untrained is None:
        return
    module.model.estimator, module.hparams["estimator"], kept = module.untrained
    module.model.estimator.train(
        module.model.training
    )  # Lightning put it into evaluation mode and then lost sight of it
    for name, part in _parts(module).items():
        part.load_state_dict(kept[name].state_dict())
    if isinstance(module.post_processor, RankKeepingPostProcessor):
        module.post_processor.keep_statistics = False
    module.model.has_ready_head = False
    module.untrained = None


class ReadyHead(Callback):
    """Gives an untrained ResAD its ready head for everything but a training; comes before the enrollment."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin each run with what was trained or restored, not with what an earlier run took."""
        del trainer, stage
        give_back_ready_head(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the head, unless it is a training that validates."""
        if trainer.state.fn != TrainerFn.FITTING and is_untrained(pl_module):
            take_ready_head(pl_module)

    on_test_start = on_validation_start
    on_predict_start = on_validation_start
