# SPDX-License-Identifier: Apache-2.0

"""Training, enrolling and scoring through anomalib's engine."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from anomalib_resad import ResAD
from anomalib_resad.data.product_folder import SamplesDataset
from anomalib_resad.method.features import Features
from anomalib_resad.method.residual_flow import ResidualFlow
from anomalib_resad.reference_rows import read_photo
from anomalib_resad.torch_model import ResADModel, resad
from anomalib_resad.training.feature_cache import FeatureCache, Picture
from anomalib_resad.training.source_photos import SourceBatch
from tests.conftest import DISTANCE, TINY, cross_category, product, quiet_engine, rewrite
from tests.test_backbone import Exploit

SMALL = {"backbone": "resnet18", "pre_trained": False}


def scores(model: ResAD, data: object, folder: Path) -> torch.Tensor:
    batches = quiet_engine(folder).predict(model, datamodule=data, return_predictions=True)
    return torch.cat([batch.pred_score for batch in batches])


def test_every_level_is_trained_and_the_backbone_is_not(products: Path, tmp_path: Path) -> None:
    model = ResAD(**TINY | {"flow_batch_size": 8192}, visualizer=False)
    before = {
        name: value.clone() for name, value in model.model.state_dict().items() if isinstance(value, torch.Tensor)
    }
    quiet_engine(tmp_path, max_epochs=1).fit(model, datamodule=cross_category(products))
    trainable = {name for name, value in model.model.named_parameters() if value.requires_grad}
    unchanged = {name for name in trainable if torch.equal(before[name], model.model.state_dict()[name])}
    assert not unchanged
    backbone = model.model.encoder.backbone
    frozen = {f"encoder.backbone.net.{name}": value for name, value in backbone.net.state_dict().items()}
    assert all(torch.equal(before[name], value) for name, value in frozen.items())
    assert torch.isfinite(model.model.estimator.ceilings).all()


def test_flow_loss_does_not_reach_the_constraintor(images: torch.Tensor) -> None:
    model = resad(**SMALL, coupling_layers=1, position_channels=8, flow_batch_size=64, flow_steps=2)
    features, flow = model.encode(images), model.estimator
    assert isinstance(flow, ResidualFlow)
    matched = [torch.zeros_like(level) for level in features.values]
    masks = [torch.zeros(3, *level.shape[-2:]) for level in features.values]
    _, constrained = flow.constrain_loss(features, matched, masks)
    for loss in flow.flow_losses(constrained, masks):
        loss.backward()
    assert all(parameter.grad is None for parameter in flow.constraintors.parameters())
    assert all(each.blocks.module_list[0].subnet[0].weight.grad is not None for each in flow.flows)


def test_flow_steps_see_every_patch_once(images: torch.Tensor) -> None:
    model = resad(**SMALL, coupling_layers=1, position_channels=0, flow_batch_size=300)
    features, estimator = model.encode(images).values, model.estimator
    assert isinstance(estimator, ResidualFlow)
    masks = [torch.zeros(3, *level.shape[-2:]) for level in features]
    counts = [0, 0, 0]
    for level, flow in enumerate(estimator.flows):
        original = flow.log_likelihoods

        def counted(vectors, positions, level=level, original=original):
            counts[level] += len(vectors)
            return original(vectors, positions)

        flow.log_likelihoods = counted
    assert len(list(estimator.flow_losses(features, masks))) == 3
    assert counts == [3 * 256, 3 * 64, 3 * 16]


def test_feature_cache_is_bounded_and_keeps_what_it_has() -> None:
    cache = FeatureCache(max_bytes=100)
    for name in ("a", "b", "c"):
        # 41 bytes each: there is no room for the third
        picture = Picture(Features([torch.full((10,), float(ord(name)))]), torch.zeros(1, dtype=torch.bool))
        assert cache.put(name, picture) == (name != "c")
    assert cache.put("a", Picture(Features([torch.zeros(10)]), picture.mask))
    assert not cache.put("a", picture, painted=True)
    assert (len(cache), cache.bytes) == (2, 82)
    kept = cache.get("a")
    assert kept is not None
    assert kept.features.values[0][0] == ord("a")
    assert cache.get("c") is None
    assert cache.get("a", painted=True) is None
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)


def test_checkpoint_holds_everything(trained: Path, images: torch.Tensor) -> None:
    content = torch.load(trained, weights_only=False)
    plain = (str, int, float, bool, list, tuple, type(None))
    assert all(isinstance(value, plain) for value in content["hyper_parameters"].values())
    restored = ResAD.load_from_checkpoint(trained).eval()
    bank = restored.model.bank
    assert bank.record.category == "products/tiles"
    assert len(bank.record.files) == bank.record.photos == 2
    assert all(len(digest) == 64 for _, digest in bank.record.files)
    with torch.no_grad():
        first = restored.model(images)
        second = ResAD(checkpoint=trained).eval().model(images)
    assert torch.equal(first.pred_score, second.pred_score)
    assert torch.equal(first.anomaly_map, second.anomaly_map)


def test_restores_into_a_model_of_other_settings(trained: Path, products: Path, tmp_path: Path) -> None:
    """`anomalib test --model ResAD --ckpt_path x` works without repeating the backbone."""
    model = ResAD(pre_trained=False, visualizer=False)
    assert model.hparams["backbone"] == "wide_resnet50_2"
    data = product(products, "tiles")
    quiet_engine(tmp_path).test(model, datamodule=data, ckpt_path=trained, verbose=False)
    assert model.hparams["backbone"] == "resnet18"
    assert model.hparams["coupling_layers"] == 2


def test_two_phases(trained: Path, products: Path, tmp_path: Path) -> None:
    """With a checkpoint there is nothing to train: fit enrolls, keeps every weight, and saves."""
    model = ResAD(checkpoint=trained, k_shot=3, reference_seed=7, visualizer=False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    threshold = model.post_processor.image_threshold.clone()
    engine = quiet_engine(tmp_path)
    engine.fit(model, datamodule=product(products, "tiles", val_split_mode="same_as_test"))
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    assert torch.equal(model.post_processor.image_threshold, threshold), "the trained threshold travels"
    assert model.model.bank.record.k_shot == 3
    saved = ResAD.load_from_checkpoint(engine.best_model_path)
    assert saved.model.bank.record == model.model.bank.record


def test_score_depends_on_image_bank_and_weights_alone(trained: Path, products: Path, tmp_path: Path) -> None:
    values = []
    for batch_size, keep in ((1, None), (4, None), (6, None), (4, [3, 1])):
        data = product(products, "tiles")
        data.eval_batch_size = batch_size
        data.setup()
        if keep is not None:
            data.test_data = data.test_data.subsample(keep)
            data._is_setup = True
        values.append(scores(ResAD(checkpoint=trained, visualizer=False), data, tmp_path))
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(values[2], values[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(values[3], values[0][[1, 3]], rtol=0, atol=1e-5)


def test_names_order_and_copies_of_references_change_nothing(trained: Path, products: Path, tmp_path: Path) -> None:
    photos = sorted((products / "tiles" / "train" / "good").glob("*.png"))[:3]
    for index, photo in enumerate(photos):
        for folder, name in (("a", f"{index}.png"), ("b", f"{9 - index}.png"), ("c", f"{index}.png")):
            (tmp_path / folder).mkdir(exist_ok=True)
            shutil.copy(photo, tmp_path / folder / name)
    shutil.copy(photos[1], tmp_path / "c" / "copy.png")
    values = []
    for folder, k_shot in (("a", 3), ("b", 3), ("c", 4)):
        model = ResAD(checkpoint=trained, references=tmp_path / folder, k_shot=k_shot, visualizer=False)
        values.append(scores(model, product(products, "tiles"), tmp_path / "results"))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


def test_a_restored_bank_survives_a_test(trained: Path, products: Path, tmp_path: Path) -> None:
    """It is not replaced by a draw, with the default number of shots, say; a bank of another category is."""
    folder = products / "tiles" / "train" / "good"
    engine = quiet_engine(tmp_path)
    engine.fit(
        ResAD(checkpoint=trained, references=folder, k_shot=2, visualizer=False), datamodule=product(products, "tiles")
    )
    restored = ResAD.load_from_checkpoint(engine.best_model_path)
    assert restored.hparams["references"] is None, "the folder may be gone by then"
    for category, origin in (("tiles", "folder"), ("pill", "train split")):
        model = ResAD(pre_trained=False, backbone="resnet18", visualizer=False, k_shot=4)
        quiet_engine(tmp_path).test(
            model, datamodule=product(products, category), ckpt_path=engine.best_model_path, verbose=False
        )
        assert model.model.bank.record.origin == origin
        assert model.model.bank.record.category == f"products/{category}"


def test_one_category_trains_on_synthetic_defects(products: Path, tmp_path: Path) -> None:
    model = ResAD(**TINY, visualizer=False)
    masks: list[bool] = []
    original = model.source.prepare

    def prepare(batch: SourceBatch, epoch: int) -> tuple:
        found = original(batch, epoch)
        masks.append(any(bool(mask.any()) for mask in found[2]))
        return found

    model.source.prepare = prepare
    data = product(products, "tiles", val_split_mode="synthetic")
    results = quiet_engine(tmp_path, max_epochs=3).train(model, datamodule=data)
    assert any(masks)
    assert 0 <= results[0]["image_AUROC"] <= 1
    assert model.post_processor.has_statistics


def test_distance_needs_no_training(products: Path, tmp_path: Path) -> None:
    model = ResAD(**DISTANCE | {"k_shot": 1}, match="cosine", visualizer=False)  # one photo gives no threshold
    data = product(products, "tiles")
    values = scores(model, data, tmp_path)
    model.eval()
    with torch.no_grad():
        photo = read_photo(min(data.test_data.samples.image_path))[None]
        features = model.model.encode(model.pre_processor.transform(photo))
        expected = sum(
            torch.nn.functional.interpolate(
                (1 - torch.cosine_similarity(x, m))[:, None], size=(64, 64), mode="bilinear", align_corners=False
            )
            for x, m in zip(features.values, model.model.bank(features), strict=True)
        )
        expected = model.model.anomaly_map.blur(expected).max()
    torch.testing.assert_close(values[0], 0.5 + expected / (2 * (1 + expected)))


def test_checkpoint_that_was_never_trained(products: Path, tmp_path: Path) -> None:
    engine = quiet_engine(tmp_path)
    engine.fit(ResAD(**DISTANCE, visualizer=False), datamodule=product(products, "tiles"))
    assert not ResAD(checkpoint=engine.best_model_path, estimator="distance").model.bank.is_empty
    with pytest.raises(ValueError, match="never trained"):
        ResAD(checkpoint=engine.best_model_path)


def test_bad_checkpoints(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.ckpt").write_bytes(trained.read_bytes()[:50_000])
    with pytest.raises(ValueError, match="damaged"):
        ResAD(checkpoint=tmp_path / "cut.ckpt")
    torch.save({"state_dict": Exploit(tmp_path / "pwned")}, tmp_path / "unsafe.ckpt")
    with pytest.raises(ValueError, match="run code"):
        ResAD(checkpoint=tmp_path / "unsafe.ckpt")
    assert not (tmp_path / "pwned").exists()
    torch.save({"state_dict": {}, "hyper_parameters": {"backbone": "resnet18"}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no ResAD checkpoint"):
        ResAD(checkpoint=tmp_path / "other.ckpt")
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        ResAD(checkpoint=tmp_path / "none.ckpt")
    content = torch.load(trained, weights_only=True)
    content["state_dict"]["model.estimator.constraintors.0.conv.weight"][0] = float("nan")
    rewrite(content, tmp_path / "nan.ckpt", checked=True)
    with pytest.raises(ValueError, match="training diverged"):
        ResAD(checkpoint=tmp_path / "nan.ckpt")
    for argument in ("residual", "estimator", "match"):
        with pytest.raises(ValueError, match=f"{argument}='x'"):
            ResAD(**TINY | {argument: "x"})


def test_defective_images_without_masks_are_no_training_data(products: Path, tmp_path: Path) -> None:
    """With ProductFolder alone, whose test images somebody made training images."""
    data = product(products, "tiles")
    data.setup()
    data.train_data = SamplesDataset(data.test_data.samples.assign(mask_path=""), "classification")
    data._is_setup = True
    with pytest.raises(ValueError, match="is defective and has no mask"):
        quiet_engine(tmp_path, max_epochs=1).fit(ResAD(**TINY | {"k_shot": 1}, visualizer=False), datamodule=data)


def test_too_few_photos_are_told_before_anything_is_computed(
    products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a source and of the target, with a way out that there is."""
    monkeypatch.setattr(ResADModel, "encode", lambda *_: pytest.fail("features were computed"))

    def refused(message: str, root: Path = products, **settings: Any) -> None:
        with pytest.raises(ValueError, match=message):
            quiet_engine(tmp_path, max_epochs=1).fit(
                ResAD(**TINY | settings, visualizer=False), datamodule=cross_category(root)
            )

    refused("k_shot=7, but the train split of products/tiles has 6 good photo.*pass a k_shot from 1 to 6", k_shot=7)
    shutil.copytree(products, tmp_path / "few")
    shutil.rmtree(tmp_path / "few/grain/test/good")
    for count, shots, way_out in ((2, 2, ", or pass a k_shot of at most 1."), (1, 1, ".")):
        for path in sorted((tmp_path / "few/grain/train/good").iterdir())[count:]:
            path.unlink()
        few = f"k_shot={shots}, but few/grain has {count} good training images, .*leave the category out{way_out}$"
        refused(few, tmp_path / "few", k_shot=shots)
