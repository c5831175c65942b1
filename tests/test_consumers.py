# SPDX-License-Identifier: Apache-2.0

"""All who read a product's model say the same of the same photos; and what the documents tell them is so."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import openvino as ov
import pytest
import yaml

from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.deploy.bake import bake
from anomalib_resad.enrollment.photos import read_pixels
from benchmarks.consumers import EVALUATION, compare, rows_of
from benchmarks.model_server import answer, outputs_of, request_of

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "serving.md").read_text()
TYPES = {"TYPE_UINT8": ov.Type.u8, "TYPE_FP32": ov.Type.f32}


def test_all_say_the_same(
    trained_default: Path, bundle_default: Path, good: list[Path], new: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The C++ example is built. The ONNX export is compared in test_export.py, since it takes long."""
    monkeypatch.chdir(trained_default.parent)  # anomalib's inferencer makes a cache folder where it stands
    said, cost = compare(trained_default, bundle_default, good[:3], new[:2] + new[-1:], onnx=False)
    rows = {row["who"]: row for row in rows_of(said)}
    assert rows.keys() >= {
        "edge runtime",
        "`resad watch`",
        "OpenVINO, Python",
        "OpenVINO, Python, BGR",
        "requests of model servers",
    }
    assert "anomalib's OpenVINOInferencer" in rows
    assert ("REST API" in rows) == bool(find_spec("fastapi") and find_spec("httpx"))
    assert ("OpenVINO, C++" in rows) == bool(shutil.which("cmake") and shutil.which("c++"))
    assert ("OpenVINO Model API" in rows) == bool(find_spec("model_api"))
    assert {who: row for who, row in rows.items() if max(row["from_evaluation"], row["from_edge"]) > 1e-4} == {}
    assert {row["same_labels"] for row in rows.values()} == {3}
    assert len({verdict.score for verdict in said[EVALUATION]}) == 3, "the photos differ"
    assert cost["baked_mb"] > 1


@pytest.fixture(scope="module")
def models(bundle_default: Path, good: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models: `cable` in two versions, the second with another threshold."""
    folder = tmp_path_factory.mktemp("models")
    inferencer = ResADInferencer(bundle_default, banks=folder / "banks")
    inferencer.enroll("cable", good[:2])
    bake(bundle_default, "cable", folder / "cable", inferencer.banks)
    inferencer.set_threshold("cable", 1e6)
    bake(bundle_default, "cable", folder / "cable", inferencer.banks)
    return folder


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def test_a_server_takes_the_latest_version(models: Path, new: list[Path]) -> None:
    body, length = request_of(read_pixels(new[0])[None])
    answered, head = answer(models / "cable", body, length)
    assert json.loads(answered[:head])["model_version"] == "2"
    found = outputs_of(answered, head)
    assert found["pred_score"].shape == found["pred_label"].shape == (1,)
    assert not found["pred_label"].item(), "its threshold is out of reach"
    with pytest.raises(ValueError, match="is not"):
        answer(models / "cable", *request_of(read_pixels(new[0])[None].transpose(0, 3, 1, 2)))


def test_documented_requests_fit(models: Path, new: list[Path]) -> None:
    """The JSON of the guide, with a photo in it."""
    (text,) = [block for block in blocks("json") if '"datatype"' in block]
    request = json.loads(text)
    pixels = read_pixels(new[0])[None]
    (given,) = request["inputs"]
    height, width = given["shape"][1:3]
    given["shape"][1:3] = pixels.shape[1:3]
    assert given["parameters"]["binary_data_size"] == height * width * 3
    head = json.dumps(request).encode()
    found = outputs_of(*answer(models / "cable", head + pixels.tobytes(), len(head)))
    assert found.keys() == {"pred_score", "pred_label"}


def test_documented_configurations_fit(models: Path) -> None:
    """Names, types and shapes of Triton's configuration; the others name folders and the kind of model."""
    model = ov.Core().read_model(models / "cable" / "1" / "model.xml")
    ports = {port.get_any_name(): port for port in (*model.inputs, *model.outputs)}
    (triton,) = blocks("text")
    told = re.findall(r'name: "(\w+)" data_type: (\w+) dims: \[([-\d, ]+)\]', triton)
    assert [name for name, *_ in told] == list(ports)
    for name, kind, sides in told:
        assert ports[name].get_element_type() == TYPES[kind]
        shape = [-1 if side.is_dynamic else side.get_length() for side in ports[name].get_partial_shape()]
        expected = [int(side) for side in sides.split(",")]
        assert len(shape) == len(expected)
        assert all(one in (-1, other) for one, other in zip(expected, shape, strict=True))
        assert f"`{name}`" in GUIDE
    (servers,) = [json.loads(block) for block in blocks("json") if "model_config_list" in block]
    for each in servers["model_config_list"]:
        assert set(each["config"]) <= {"name", "base_path", "plugin_config"}
        assert Path(each["config"]["base_path"]).name == each["config"]["name"]
    (service,) = [yaml.safe_load(block) for block in blocks("yaml")]
    assert service["spec"]["predictor"]["model"]["modelFormat"]["name"] == "openvino"
