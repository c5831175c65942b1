# SPDX-License-Identifier: Apache-2.0

"""What is exported gives the numbers of evaluation, photo in, score and map out, in photos of any size."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.deploy import CompressionType, OpenVINOInferencer
from openvino import opset13 as op
from PIL import Image

from anomalib_resad import ResAD
from anomalib_resad.deploy.float32 import save_in_float32
from anomalib_resad.enrollment.thresholds import Thresholds
from anomalib_resad.export.halves import trace
from anomalib_resad.reference_rows import leave_one_out, read_photo
from tests.conftest import TINY, product, quiet_engine

F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def evaluate(model: ResAD, photos: torch.Tensor) -> InferenceBatch:
    """The path of test and predict: the pre-processor's own transform, the model, the post-processor."""
    with torch.no_grad():
        return model.post_processor(model.model(model.pre_processor.transform(photos)))


@pytest.fixture(scope="session")
def exported(share: Callable[..., Path], trained: Path) -> dict[str, Path]:
    """One file of each kind; traced once, since that takes the time."""

    def make(folder: Path) -> None:
        model = ResAD.load_from_checkpoint(trained).eval()
        onnx = model.to_onnx(folder)
        model.to_torch(folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ResAD, "to_onnx", lambda *_, **__: onnx)
            model.to_openvino(folder)

    weights = share("exported", make) / "weights"
    files = {"openvino": "openvino/model.xml", "torch": "torch/model.pt", "onnx": "onnx/model.onnx"}
    return {kind: weights / file for kind, file in files.items()}


@pytest.fixture(scope="module")
def model(trained: Path) -> ResAD:
    return ResAD.load_from_checkpoint(trained).eval()


@pytest.mark.parametrize("config", [None, F32])
def test_openvino_inferencer_agrees_with_evaluation(
    exported: dict[str, Path],
    model: ResAD,
    products: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, str] | None,
) -> None:
    """Also in the precision that OpenVINO chooses by itself, which is bfloat16 on CPUs that have it."""
    monkeypatch.chdir(tmp_path)  # the inferencer makes a cache folder where it stands
    inferencer = OpenVINOInferencer(exported["openvino"], device="CPU", config=config)
    photos = sorted((products / "tiles" / "test").glob("*/*.png"))
    large = tmp_path / "large.png"  # larger than the input, and not square
    Image.open(photos[0]).resize((300, 170)).save(large)
    for photo in [*photos, large]:
        theirs, ours = inferencer.predict(photo), evaluate(model, read_photo(str(photo))[None])
        np.testing.assert_allclose(theirs.pred_score.squeeze(), ours.pred_score.squeeze(), atol=1e-4)
        np.testing.assert_allclose(theirs.anomaly_map.squeeze(), ours.anomaly_map.squeeze(), atol=1e-4)
        assert bool(theirs.pred_label.squeeze()) == bool(ours.pred_label)


def test_the_threshold_of_an_export_can_be_changed(exported: dict[str, Path], model: ResAD) -> None:
    """By the file beside the exported model, to where the same threshold in the checkpoint would have put it."""
    thresholds = Thresholds.read(exported["openvino"].with_suffix(".thresholds.json"))
    assert thresholds == Thresholds.read(exported["onnx"].with_suffix(".thresholds.json"))
    assert thresholds.at_source() == 0.5, "it was exported with this one"
    compiled = openvino.Core().compile_model(exported["openvino"], "CPU", F32)
    photos = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    theirs = compiled(photos.numpy())["pred_score"].reshape(-1)
    with torch.no_grad():
        raw = model.model(model.pre_processor.transform(photos)).pred_score
    between = raw.sort().values[2:4].mean().item()
    assert (theirs > thresholds.at_raw(between)).tolist() == (raw > between).tolist() != [False] * 6
    own = leave_one_out(model.model, model.pre_processor)
    assert thresholds.leave_one_out == pytest.approx(own.scores, abs=1e-6)
    changed = copy.deepcopy(model.post_processor)
    changed.calibrate(own, 0.4, model.model.bank.record.judges_neighborhoods)
    assert thresholds.at_rate(0.4) == pytest.approx(thresholds.at_raw(changed.image_threshold.item()), abs=1e-6)
    (exported["onnx"].parent / "bad.json").write_text('{"image_threshold": 1}')
    with pytest.raises(ValueError, match=r"bad\.json holds no thresholds"):
        Thresholds.read(exported["onnx"].parent / "bad.json")


def precisions(path: Path) -> dict[str, str]:
    """Precision of each operation that this CPU runs, where OpenVINO may choose it."""
    compiled = openvino.Core().compile_model(path, "CPU")
    found = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) not in ("Const", "Reorder"):
            found[f"{info['layerType'].astype(str)} {node.get_friendly_name()}"] = info["runtimePrecision"].astype(str)
    return found


def chooses_bfloat16() -> bool:
    """Whether OpenVINO does so by itself on this CPU."""
    return openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT") == openvino.Type.bf16


@pytest.mark.parametrize("width", [3.0, 1e-25])
def test_scores_are_normalized_without_an_inverse_of_each_pixel(tmp_path: Path, width: float) -> None:
    """Unless the range is so narrow that its own inverse is too large for float32."""
    raw = op.parameter([-1, 8], np.float32)
    distance = op.multiply(op.subtract(raw, op.constant(np.float32(0.3))), op.constant(np.float32(2)))
    half = op.multiply(distance, op.constant(np.float32(0.5)))
    share = op.divide(half, op.add(op.constant(np.float32(width)), op.absolute(distance)))
    model = openvino.Model([share], [raw])
    values = np.linspace(-5, 5, 8, dtype=np.float32)[None]
    expected = openvino.Core().compile_model(model, "CPU", F32)(values)[0]
    save_in_float32(model, tmp_path / "model.xml")
    kinds = {node.get_type_name() for node in openvino.Core().read_model(tmp_path / "model.xml").get_ops()}
    assert ("SoftSign" in kinds, "Power" in kinds) == (width > 1, width < 1)
    found = openvino.Core().compile_model(tmp_path / "model.xml", "CPU")(values)[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_every_operation_stays_in_float32(exported: dict[str, Path]) -> None:
    """A plain export of the same model does not, on a CPU with bfloat16; there the check can fail."""
    reduced = {name: kind for name, kind in precisions(exported["openvino"]).items() if kind in ("bf16", "f16")}
    assert not reduced
    if chooses_bfloat16():
        plain = openvino.convert_model(exported["onnx"])
        path = exported["onnx"].with_name("plain.xml")
        openvino.save_model(plain, path)
        assert "bf16" in precisions(path).values()


def test_the_default_model_too(trained_default: Path, tmp_path: Path) -> None:
    """With a bank of rotated photos."""
    model = ResAD.load_from_checkpoint(trained_default).eval()
    assert model.model.bank.record.rotations == 8
    path = model.to_openvino(tmp_path, input_size=(64, 64))
    assert not {name for name, kind in precisions(path).items() if kind in ("bf16", "f16")}
    photos = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    theirs, ours = openvino.Core().compile_model(path, "CPU")(photos.numpy()), evaluate(model, photos)
    np.testing.assert_allclose(theirs["pred_score"].reshape(-1), ours.pred_score, atol=1e-4)
    np.testing.assert_allclose(theirs["anomaly_map"], ours.anomaly_map, atol=1e-3)
    kinds = [node.get_type_name() for node in openvino.Core().read_model(path).get_ops()]
    of_neighborhoods = 4  # which are a sixteenth as large
    assert kinds.count("Transpose") == len(model.hparams["layers"]) + of_neighborhoods, "each level is transposed once"


def test_compressed_exports_are_usable(
    exported: dict[str, Path], model: ResAD, products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ResAD, "to_onnx", lambda *_, **__: exported["onnx"])  # traced once: that takes the time
    photo = min((products / "tiles" / "test").glob("*/*.png"))
    ours = evaluate(model, read_photo(str(photo))[None])
    data = product(products, "tiles")
    for kind, correlation in ((CompressionType.FP16, 0.99), (CompressionType.INT8_PTQ, 0.7)):
        path = model.to_openvino(tmp_path / kind, compression_type=kind, datamodule=data)
        theirs = OpenVINOInferencer(path, device="CPU").predict(photo)
        pair = theirs.anomaly_map.ravel(), ours.anomaly_map.numpy().ravel()
        assert np.corrcoef(*pair)[0, 1] > correlation, kind
        bfloat16 = {name for name, each in precisions(path).items() if each == "bf16"}
        assert not any("MatMul" in name or "FullyConnected" in name for name in bfloat16), "resizing, matching, head"
        convolutions = {each for name, each in precisions(path).items() if name.startswith("Convolution")}
        if kind == CompressionType.FP16:  # other CPUs say f32 of them, or f16, by their weights
            assert ("bf16" in convolutions) == chooses_bfloat16(), "the backbone"
        if kind == CompressionType.INT8_PTQ:
            quantized = [name for name, precision in precisions(path).items() if precision in ("u8", "i8")]
            assert any(name.startswith("Convolution") for name in quantized)
            assert not any(name.startswith(("MatMul", "FullyConnected")) for name in quantized)
    for kind in (CompressionType.INT8, CompressionType.INT8_ACQ):
        with pytest.raises(ValueError, match="destroys the maps"):
            model.to_openvino(tmp_path, compression_type=kind)
    with pytest.raises(ValueError, match="pass `datamodule`"):
        model.to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ)


def test_openvino_batches_of_any_size(exported: dict[str, Path], model: ResAD) -> None:
    compiled = openvino.Core().compile_model(exported["openvino"], "CPU", F32)
    photos = torch.rand(5, 3, 90, 70, generator=torch.Generator().manual_seed(1))
    ours = evaluate(model, photos)
    for count in (1, 2, 5):
        theirs = compiled(photos[:count].numpy())
        np.testing.assert_allclose(theirs["pred_score"].reshape(-1), ours.pred_score[:count], atol=1e-4)
        np.testing.assert_allclose(theirs["anomaly_map"], ours.anomaly_map[:count], atol=1e-4)


def test_torch_export_agrees_with_evaluation(exported: dict[str, Path], model: ResAD) -> None:
    loaded = torch.load(exported["torch"], weights_only=False)["model"].eval()
    photos = torch.rand(2, 3, 90, 70, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = loaded(photos)
    ours = evaluate(model, photos)
    torch.testing.assert_close(theirs.pred_score, ours.pred_score, rtol=0, atol=1e-4)
    torch.testing.assert_close(theirs.anomaly_map, ours.anomaly_map, rtol=0, atol=1e-4)


def test_exporting_changes_nothing(exported: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    """Through the engine, from the checkpoint: the same numbers."""
    model = ResAD.load_from_checkpoint(trained).eval()
    photos = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    before = evaluate(model, photos).anomaly_map
    again = quiet_engine(tmp_path).export(ResAD(**TINY), "openvino", export_root=tmp_path, ckpt_path=trained)
    assert torch.equal(evaluate(model, photos).anomaly_map, before)
    outputs = [
        openvino.Core().compile_model(path, "CPU", F32)(photos.numpy())["anomaly_map"]
        for path in (exported["openvino"], again)
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_an_empty_bank_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="reference bank is empty"):
        ResAD(**TINY).to_onnx(tmp_path)


def test_tracing_is_out_of_place_and_leaves_the_model_as_it_was(model: ResAD) -> None:
    places = [module for module in model.model.modules() if getattr(module, "inplace", False)]
    assert places
    encoder, _, _ = trace(model)
    assert not [
        node.name for node in encoder.graph.nodes if "relu_" in str(node.target) or "hardtanh_" in str(node.target)
    ]
    assert all(module.inplace for module in places)
