# SPDX-License-Identifier: Apache-2.0

"""Fixtures: tiny drawn products, a tiny trained model, and no network."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import seed_everything
from PIL import Image

from anomalib_resad import CrossCategory, ProductFolder, ResAD
from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.export.edge_bundle import export_bundle
from benchmarks.products import make_product

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


@pytest.fixture(scope="session")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "products"
    for product in ("grain", "pill", "tiles"):
        make_product(root, product, **COUNTS)
    return root


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


@pytest.fixture(scope="session")
def trained(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ResAD, trained for one epoch on grain and pill; its bank holds tiles."""
    seed_everything(0)
    engine = quiet_engine(tmp_path_factory.mktemp("trained"), max_epochs=1)
    engine.fit(ResAD(**TINY, visualizer=False), datamodule=cross_category(products))
    assert engine.best_model_path
    return Path(engine.best_model_path)


@pytest.fixture(scope="session")
def trained_default(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for the default model, `trained` being the conference paper's."""
    seed_everything(0)
    engine = quiet_engine(tmp_path_factory.mktemp("default"), max_epochs=2)
    model = ResAD(backbone="resnet18", pre_trained=False, image_size=(64, 64), k_shot=2, visualizer=False)
    engine.fit(model, datamodule=cross_category(products))
    assert engine.best_model_path
    return Path(engine.best_model_path)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def bundle(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny ResAD as a bundle, in float32."""
    return export_bundle(trained, tmp_path_factory.mktemp("bundles") / "fp32")


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
