# SPDX-License-Identifier: Apache-2.0

"""What is exported gives the numbers of evaluation, photo in, score and map out, in photos of any size."""

import copy
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.deploy import OpenVINOInferencer
from PIL import Image

from anomalib_resad import ResAD
from anomalib_resad.calibration import Thresholds
from anomalib_resad.leave_one_out import leave_one_out
from anomalib_resad.photos import read_photo
from tests.conftest import TINY, quiet_engine

F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def evaluate(model: ResAD, photos: torch.Tensor) -> InferenceBatch:
    """The path of test and predict: the pre-processor's own transform, the model, the post-processor."""
    with torch.no_grad():
        return model.post_processor(model.model(model.pre_processor.transform(photos)))


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    model = ResAD.load_from_checkpoint(trained).eval()
    return {kind: getattr(model, f"to_{kind}")(folder) for kind in ("openvino", "torch", "onnx")}


@pytest.fixture(scope="module")
def model(trained: Path) -> ResAD:
    return ResAD.load_from_checkpoint(trained).eval()


def test_openvino_inferencer_agrees_with_evaluation(
    exported: dict[str, Path], model: ResAD, products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the inferencer makes a cache folder where it stands
    inferencer = OpenVINOInferencer(exported["openvino"], device="CPU", config=F32)
    photos = sorted((products / "tiles" / "test").glob("*/*.png"))
    large = tmp_path / "large.png"  # larger than the input, and not square
    Image.open(photos[0]).resize((300, 170)).save(large)
    for photo in [*photos, large]:
        theirs, ours = inferencer.predict(photo), evaluate(model, read_photo(photo)[None])
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
    scores = leave_one_out(model.model, 2, (64, 64))
    assert thresholds.leave_one_out == pytest.approx(scores, abs=1e-6)
    changed = copy.deepcopy(model.post_processor)
    changed.calibrate(scores, 0.4)
    assert thresholds.at_rate(0.4) == pytest.approx(thresholds.at_raw(changed.image_threshold.item()), abs=1e-6)
    (exported["onnx"].parent / "bad.json").write_text('{"image_threshold": 1}')
    with pytest.raises(ValueError, match=r"bad\.json holds no thresholds"):
        Thresholds.read(exported["onnx"].parent / "bad.json")


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
    """Twice, and through the engine: the same graph, and a model that scores as before."""
    model = ResAD.load_from_checkpoint(trained).eval()
    photos = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    before = evaluate(model, photos).anomaly_map
    again = quiet_engine(tmp_path).export(ResAD(**TINY), "openvino", export_root=tmp_path, ckpt_path=trained)
    model.to_openvino(tmp_path / "twice")
    assert torch.equal(evaluate(model, photos).anomaly_map, before)
    outputs = [
        openvino.Core().compile_model(path, "CPU", F32)(photos.numpy())["anomaly_map"]
        for path in (exported["openvino"], again)
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_an_empty_bank_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="reference bank is empty"):
        ResAD(**TINY).to_onnx(tmp_path)
