# SPDX-License-Identifier: Apache-2.0

"""Fixtures: tiny drawn products, a tiny trained model, and no network."""

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from threading import Event, Semaphore
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from anomalib.engine import Engine
from filelock import FileLock
from lightning.pytorch import seed_everything
from PIL import Image

from anomalib_resad import CrossCategory, ProductFolder, ResAD
from anomalib_resad.checkpoint_io import CHECKSUM, checksum
from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.deploy.bundle import DETECTOR, ENCODER, Level, read_manifest
from anomalib_resad.enrollment.photos import read_pixels
from anomalib_resad.export.edge_bundle import export_bundle
from anomalib_resad.method.backbone_weights import PACKAGES
from benchmarks.products import make_product

torch.set_num_threads(1)  # as OMP_NUM_THREADS in tests/__init__.py, of PyTorch's own pool

SHARED = Path(__file__).resolve().parents[2] / "shared"
TINY: dict[str, Any] = {
    "variant": "resad",
    "backbone": "resnet18",
    "pre_trained": False,
    "coupling_layers": 2,
    "position_channels": 8,
    "image_size": (64, 64),
    "flow_batch_size": 256,
    "lr": 1e-3,
    "k_shot": 2,
}
DISTANCE: dict[str, Any] = {
    "variant": "resad",
    "estimator": "distance",
    "backbone": "resnet18",
    "pre_trained": False,
    "image_size": (64, 64),
    "k_shot": 2,
}
PLUS = TINY | {"variant": "resad++", "codebook_size": 64}
DEFAULT: dict[str, Any] = {"backbone": "resnet18", "pre_trained": False, "image_size": (64, 64), "k_shot": 2}
COUNTS = {"train": 6, "good": 3, "defective": 1, "size": 64}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection but those inside this machine."""

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            msg = f"tests must not connect to {address}"
            raise OSError(msg)
        return connect(self, address)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it read the variable when it was imported


def installed(backbone: str) -> bool:
    """Whether the package with the weights of a backbone is installed."""
    try:
        return distribution(PACKAGES[backbone].name).locate_file(PACKAGES[backbone].file).exists()  # type: ignore[attr-defined]
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="session", autouse=True)
def _no_telemetry() -> Iterator[None]:
    """OpenVINO's exporter tries to report each use, from a thread that waits for the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("openvino_telemetry.Telemetry.send_event", lambda *_, **__: None)
        yield


@pytest.fixture(scope="session")
def share(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[..., Path]:
    """Make a folder once for all workers: what is slow to make, and only read afterwards."""
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "shared"
    root.mkdir(exist_ok=True)

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder = root / name
        with FileLock(root / f"{name}.lock"):
            if not (folder / "complete").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                (folder / "complete").touch()
        return folder

    return once


@pytest.fixture(scope="session")
def products(share: Callable[..., Path]) -> Path:
    def make(folder: Path) -> None:
        for product in ("grain", "pill", "tiles"):
            make_product(folder / "products", product, **COUNTS)

    return share("data", make) / "products"


def product(root: Path, category: str, **arguments: Any) -> ProductFolder:
    return ProductFolder(root, category, train_batch_size=4, eval_batch_size=4, num_workers=0, **arguments)


def cross_category(root: Path, source: str = "grain, pill", target: str | None = "tiles") -> CrossCategory:
    return CrossCategory(
        product(root, source),
        product(root, target) if target else None,
        val_ratio=0.2,
        train_batch_size=4,
        eval_batch_size=4,
        num_workers=0,
    )


def quiet_engine(folder: Path, **arguments: Any) -> Engine:
    return Engine(default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, **arguments)


def train(folder: Path, products: Path, epochs: int, **settings: Any) -> None:
    """A tiny ResAD, trained on grain and pill, as `model.ckpt`; its bank holds tiles."""
    seed_everything(0)
    engine = quiet_engine(folder / "engine", max_epochs=epochs)
    engine.fit(ResAD(**settings, visualizer=False), datamodule=cross_category(products))
    assert engine.best_model_path
    shutil.copy(engine.best_model_path, folder / "model.ckpt")


def rewrite(content: dict[str, Any], path: Path, checked: bool = False) -> Path:
    """Save the changed content of a checkpoint, as one without a checksum, or with the one that it now has."""
    content.pop(CHECKSUM, None)
    torch.save(content | ({CHECKSUM: checksum(content)} if checked else {}), path)
    return path


@pytest.fixture(scope="session")
def trained(share: Callable[..., Path], products: Path) -> Path:
    """The conference paper's method, trained for one epoch."""
    return share("trained", lambda folder: train(folder, products, 1, **TINY)) / "model.ckpt"


@pytest.fixture(scope="session")
def trained_plus(share: Callable[..., Path], products: Path) -> Path:
    """The same for ResAD++."""
    return share("trained_plus", lambda folder: train(folder, products, 1, **PLUS)) / "model.ckpt"


@pytest.fixture(scope="session")
def trained_default(share: Callable[..., Path], products: Path) -> Path:
    """The same for the default model, for two epochs."""
    return share("trained_default", lambda folder: train(folder, products, 2, **DEFAULT)) / "model.ckpt"


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def bundle(share: Callable[..., Path], trained: Path) -> Path:
    """The tiny ResAD as a bundle, in float32."""
    return share("bundle", lambda folder: export_bundle(trained, folder / "fp32")) / "fp32"


@pytest.fixture(scope="session")
def bundle_default(share: Callable[..., Path], trained_default: Path) -> Path:
    """The tiny default model as a bundle, in float32, made by the command; what that printed lies beside it."""

    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "anomalib_resad.cli", "export", "--checkpoint", trained_default]
        done = subprocess.run(
            [*command, "--output", folder / "fp32"], capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        (folder / "printed.txt").write_text(done.stdout)
        (folder / "errors.txt").write_text(done.stderr)

    return share("bundle_default", make) / "fp32"


def converted(bundle: Path) -> tuple[openvino.Model, openvino.Model, tuple[Level, ...]]:
    """What a bundle was written of, so that it can be written again in another precision without tracing."""
    core = openvino.Core()
    encoder, detector = (core.read_model(bundle / file) for file in (ENCODER, DETECTOR))
    return encoder, detector, read_manifest(bundle).levels


@pytest.fixture
def inferencer(bundle: Path, tmp_path: Path) -> ResADInferencer:
    return ResADInferencer(bundle, banks=tmp_path / "banks")


@pytest.fixture(scope="session")
def good(products: Path) -> list[Path]:
    return sorted((products / "tiles" / "train" / "good").glob("*.png"))


@pytest.fixture(scope="session")
def new(products: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Photos of the product, one of them larger than the input, not square, and gray with an alpha channel."""
    photos = sorted((products / "tiles" / "test").glob("*/*.png"))
    large = tmp_path_factory.mktemp("new") / "large.png"
    Image.open(photos[0]).resize((300, 170)).convert("LA").save(large)
    return [*photos, large]


def hold_inspections(inferencer: ResADInferencer, monkeypatch: pytest.MonkeyPatch) -> tuple[Semaphore, Event]:
    """Let each inspection wait: the semaphore counts those that have begun, the event lets them go on."""
    entered, leave, inspect = Semaphore(0), Event(), inferencer.inspect

    def slow(*given: Any) -> Any:
        entered.release()
        assert leave.wait(60)
        return inspect(*given)

    monkeypatch.setattr(inferencer, "inspect", slow)
    return entered, leave


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the page keeps what is uploaded."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    return tmp_path / "uploads"


@pytest.fixture(scope="module", params=["drawn", "shared"])
def cases(request: pytest.FixtureRequest, share: Callable[..., Path]) -> Path:
    """Awkward photos: drawn, and those of the shared folder."""
    from tests import photo_cases  # noqa: PLC0415  # it imports this module

    if request.param == "shared" and not (SHARED / "cases/make_cases.py").is_file():
        pytest.skip("no shared folder")
    return share(f"cases_{request.param}", getattr(photo_cases, request.param))


@pytest.fixture(scope="session")
def missed(products: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Photos with noise, and with stripes, in the box; their masks lie beside them."""
    folder = tmp_path_factory.mktemp("missed")
    pixels = read_pixels(products / "tiles" / "test" / "good" / "000.png").copy()
    stripes = np.where(np.arange(24)[None, :, None] // 2 % 2, 255, 0) * np.ones((24, 24, 3), int)
    for name, defect in (("noise", np.random.default_rng(0).integers(0, 256, (24, 24, 3))), ("stripes", stripes)):
        pixels[16:40, 16:40] = defect
        Image.fromarray(pixels).save(folder / f"{name}.png")
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[16:40, 16:40] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return [folder / "noise.png", folder / "stripes.png"]
