# SPDX-License-Identifier: Apache-2.0

"""Every family of backbones through the whole model: a training step, scores, saving, restoring, export.

Small untrained networks stand for their families; what differs between the members of a family is their size.
"""

import os
from pathlib import Path

import numpy as np
import openvino
import pytest
import timm
import torch
from torch import Tensor

from anomalib_resad import ResAD
from anomalib_resad.method.backbone import FeaturePyramid, choose_layers, describe
from tests.conftest import cross_category, quiet_engine

# Features are not kept: one step needs those of a few photos.
SMALL = {"pre_trained": False, "k_shot": 2, "visualizer": False, "cache_gb": 0.0}


class BackboneMatrix:
    """What every backbone must do; a family's class says which, how large the input is, and what comes out.

    Attributes:
        backbone: timm model name.
        image_size: Height and width, not square.
        layers: The levels that are chosen by default.
        grids: Rows and columns of each level's patches.
        constraintor: What is chosen by default.
        mean: Mean of the inputs that the pretrained weights expect, first channel.
        exports: Whether to export always; it takes up to a minute, so the others do where RESAD_TEST_ALL is set.
    """

    backbone: str
    image_size: tuple[int, int] = (48, 64)
    layers: tuple[str, ...]
    grids: tuple[tuple[int, int], ...] = ((12, 16), (6, 8), (3, 4))
    constraintor = "conv_bn_relu"
    mean = 0.485
    exports = False

    @pytest.fixture(scope="class")
    def checkpoint(self, products: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """One training step, one validation step, saved."""
        torch.manual_seed(0)
        model = ResAD(backbone=self.backbone, image_size=self.image_size, **SMALL)
        before = {name: value.clone() for name, value in model.model.named_parameters()}
        limits = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1}
        engine = quiet_engine(tmp_path_factory.mktemp("backbone"), **limits)
        engine.fit(model, datamodule=cross_category(products))
        changed = {name for name, value in model.model.named_parameters() if not torch.equal(value, before[name])}
        trainable = {name for name, value in model.model.named_parameters() if value.requires_grad}
        assert changed == trainable
        return Path(engine.best_model_path)

    @pytest.fixture
    def photos(self) -> Tensor:
        return torch.rand(2, 3, 70, 90, generator=torch.Generator().manual_seed(1))

    def test_levels(self, checkpoint: Path) -> None:
        model = ResAD.load_from_checkpoint(checkpoint)
        assert tuple(model.hparams["layers"]) == self.layers
        published = ResAD(backbone=self.backbone, image_size=self.image_size, variant="resad", pre_trained=False)
        assert published.hparams["constraintor"] == self.constraintor
        features = model.model.encoder.backbone(torch.zeros(1, 3, *self.image_size))
        assert tuple(tuple(level.shape[-2:]) for level in features) == self.grids
        assert model.model.encoder.backbone.channels == [level.shape[1] for level in features]
        assert model.pre_processor.transform.transforms[1].mean[0] == pytest.approx(self.mean, abs=1e-3)

    def test_restores_to_the_same_scores(self, checkpoint: Path, photos: Tensor) -> None:
        """As it was saved, and as the start of an enrollment whose own settings are others."""
        results = []
        for model in (ResAD.load_from_checkpoint(checkpoint), ResAD(checkpoint=checkpoint, visualizer=False)):
            assert tuple(model.hparams["image_size"]) == self.image_size
            with torch.no_grad():
                results.append(model.eval().model(model.pre_processor.transform(photos)))
        first, second = results
        assert first.anomaly_map.shape == (2, 1, *self.image_size)
        assert torch.isfinite(first.anomaly_map).all()
        assert first.pred_score[0] != first.pred_score[1]
        assert torch.equal(first.anomaly_map, second.anomaly_map)

    def test_export_gives_the_same_numbers(self, checkpoint: Path, photos: Tensor, tmp_path: Path) -> None:
        if not self.exports and not os.environ.get("RESAD_TEST_ALL"):
            pytest.skip("exported where RESAD_TEST_ALL is set; another member of the family always is")
        model = ResAD(checkpoint=checkpoint).eval()
        with torch.no_grad():
            ours = model.post_processor(model.model(model.pre_processor.transform(photos)))
        f32 = {"INFERENCE_PRECISION_HINT": "f32"}
        theirs = openvino.Core().compile_model(model.to_openvino(tmp_path), "CPU", f32)(photos.numpy())
        np.testing.assert_allclose(theirs["pred_score"].reshape(-1), ours.pred_score, atol=1e-3)
        # In single patches another reference may be as near, so a few pixels may differ.
        assert np.quantile(np.abs(theirs["anomaly_map"] - ours.anomaly_map.numpy()), 0.95) < 1e-3


class TestResNet(BackboneMatrix):
    backbone = "resnet10t"
    layers = ("layer1", "layer2", "layer3")


class TestMobileNet(BackboneMatrix):
    backbone = "mobilenetv2_035"
    layers = ("blocks.1", "blocks.2", "blocks.4")


class TestMobileNetV3(BackboneMatrix):
    backbone = "mobilenetv3_small_050"
    layers = ("blocks.0", "blocks.1", "blocks.3")


class TestEfficientNet(BackboneMatrix):
    """As TensorFlow pads it, which is another convolution in the export."""

    backbone = "tf_efficientnet_lite0"
    layers = ("blocks.1", "blocks.2", "blocks.4")
    mean = 0.5
    exports = True


class TestConvNeXt(BackboneMatrix):
    backbone = "convnext_atto"
    layers = ("stages.0", "stages.1", "stages.2")
    exports = True


class TestViT(BackboneMatrix):
    backbone = "vit_tiny_patch16_224"
    layers = ("blocks.2", "blocks.5", "blocks.8", "blocks.11")
    grids = ((3, 4),) * 4
    constraintor = "mlp"
    mean = 0.5


class TestDINOv2(TestViT):
    backbone = "vit_small_patch14_dinov2.lvd142m"
    image_size = (42, 56)
    mean = 0.485
    exports = True


class TestDINOv3(TestViT):
    backbone = "vit_small_patch16_dinov3"
    mean = 0.485


class TestCLIP(TestViT):
    backbone = "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"
    layers = ("blocks.1", "blocks.4", "blocks.7", "blocks.9")
    mean = 0.481


def test_wide_resnet_is_a_resnet() -> None:
    """The default backbone's levels are those of the paper; it is too large to be trained here."""
    assert choose_layers("wide_resnet50_2", None) == ["layer1", "layer2", "layer3"]
    assert ResAD(pre_trained=False).hparams["layers"] == ["layer1", "layer2", "layer3"]


def test_paper_levels_of_a_deep_transformer() -> None:
    """Blocks 8, 16, 24 and 32 of 32, counted from one."""
    assert choose_layers("vit_huge_patch14_224", None) == ["blocks.7", "blocks.15", "blocks.23", "blocks.31"]


@pytest.mark.parametrize(
    ("size", "fitting"),
    [
        ((224, 230), r"\(224, 224\) or \(224, 238\)"),
        ((225, 230), r"\(224, 224\) or \(224, 238\) or \(238, 224\) or \(238, 238\)"),
        ((8, 224), r"use \(14, 224\)\."),
    ],
)
def test_broken_patches_are_refused_with_sizes_that_fit(size: tuple[int, int], fitting: str) -> None:
    with pytest.raises(ValueError, match=rf"patches are 14 px.*{fitting}"):
        ResAD(backbone="vit_small_patch14_dinov2", image_size=size, pre_trained=False)


def test_a_set_constraintor_is_kept() -> None:
    model = ResAD(
        backbone="vit_tiny_patch16_224", image_size=(32, 32), variant="resad", constraintor="none", pre_trained=False
    )
    assert model.hparams["constraintor"] == "none"


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_local_weights_of_a_transformer_are_resampled_as_timm_does(name: str, tmp_path: Path) -> None:
    """The file holds a position embedding for the size of the pretraining."""
    size = (3 * describe(name).strides[0], 5 * describe(name).strides[0])
    torch.manual_seed(3)
    source = timm.create_model(name)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    overlay = {"file": str(tmp_path / "vit.pth")}
    expected = timm.create_model(name, pretrained=True, img_size=size, pretrained_cfg_overlay=overlay, num_classes=1000)
    expected.eval()
    pyramid = FeaturePyramid(name, ["blocks.1"], weights=tmp_path / "vit.pth", image_size=size)
    images = torch.rand(1, 3, *size)
    with torch.no_grad():
        ours = pyramid(images)[0]
        theirs = expected.forward_intermediates(images, indices=[1], norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(ours, theirs)


def test_backbones_without_feature_maps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        msg = "not implemented"
        raise RuntimeError(msg)

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ValueError, match=r"gives no feature maps \(not implemented\)"):
        describe.__wrapped__("mixer_s16_224")
