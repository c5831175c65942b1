# SPDX-License-Identifier: Apache-2.0

"""Defects are taught, and changes undone, through the REST API."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra [api] is not installed")
pytest.importorskip("prometheus_client", reason="the extra [api] is not installed")
from fastapi import testclient

from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.deploy.api import application
from anomalib_resad.deploy.bank import TAUGHT
from tests.test_api import HOME, TOKEN, photos
from tests.test_edge_thresholds import knowing
from tests.test_history import content

ADDRESS = "/v1/products/tiles"
BOX = "16,16,24,24"


@pytest.fixture
def inferencer(bundle_default: Path, good: list[Path], tmp_path: Path) -> ResADInferencer:
    """Of a bundle that can be taught, with a product."""
    made = ResADInferencer(knowing(bundle_default, tmp_path / "bundle"), threads=1)
    made.enroll("tiles", good[:3], rotations=1)
    return made


@pytest.fixture
def client(inferencer: ResADInferencer) -> Iterator[Any]:
    with testclient.TestClient(application(inferencer, max_upload_mb=1), base_url=HOME) as opened:
        yield opened


def marked(photo: Path, mask: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [*photos(photo), ("mask", ("mask.png", mask))]


def test_a_defect_is_taught_and_forgotten(client: Any, inferencer: ResADInferencer, missed: list[Path]) -> None:
    """By mask or box, in a form, in JSON, or as the body: the same patches as in Python; and back."""
    start, (noise, _) = content(inferencer), missed
    mask = (noise.parent / "mask.png").read_bytes()
    before = inferencer.predict(noise, "tiles")
    taught = inferencer.teach("tiles", noise, box=(16, 16, 24, 24)).arrays[TAUGHT]
    inferencer.undo("tiles")
    encoded = {"name": noise.name, "content": base64.b64encode(noise.read_bytes()).decode()}
    white = np.zeros((64, 64), dtype=np.uint8)
    white[16:40, 16:40] = 255
    pixels = {"content": base64.b64encode(white.tobytes()).decode(), "shape": [64, 64]}
    for request in (
        {"files": marked(noise, mask)},
        {"files": photos(noise), "data": {"box": BOX}},
        {"json": {"photos": [encoded], "box": BOX}},
        {"json": {"photos": [encoded], "mask": pixels}},
        {"content": noise.read_bytes(), "params": {"box": BOX}, "headers": {"Content-Type": "image/png"}},
    ):
        answer = client.post(f"{ADDRESS}/taught", **request)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        np.testing.assert_array_equal(inferencer.bank("tiles").arrays[TAUGHT], taught)
        assert len(told["taught"]["photos"]) == 1
        assert 0 < told["taught"]["counting"] <= told["taught"]["patches"] == len(taught)
        after = inferencer.predict(noise, "tiles")
        assert (told["before"]["raw_score"], told["after"]["raw_score"]) == (before.raw_score, after.raw_score)
        assert after.raw_score > before.raw_score
        assert client.get(ADDRESS).json()["taught"] == told["taught"]
        assert client.delete(f"{ADDRESS}/taught").json()["taught"] == {"photos": [], "patches": 0, "counting": 0}
        assert content(inferencer) == start
    steps = client.get(f"{ADDRESS}/history").json()
    refused = client.delete(f"{ADDRESS}/taught")
    assert (refused.status_code, "'tiles' was taught nothing" in refused.json()["detail"]) == (409, True)
    assert client.get(f"{ADDRESS}/history").json() == steps
    assert "409" in client.get("/v1/openapi.json").json()["paths"]["/v1/products/{name}/taught"]["delete"]["responses"]


def test_what_cannot_be_taught_is_refused_and_nothing_is_lost(
    client: Any, inferencer: ResADInferencer, good: list[Path], missed: list[Path]
) -> None:
    noise, other = missed
    whole = (noise.parent / "mask.png").read_bytes()
    small = np.zeros((32, 64), dtype=np.uint8)
    file = b"\x93NUMPY\x01\x00" + b"v\x00" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (32, 64)}".ljust(118)
    inferencer.teach("tiles", other, box=(16, 16, 24, 24))
    kept, steps = content(inferencer), client.get(f"{ADDRESS}/history").json()
    for status, said, sent in (
        (422, "Nothing says where the defect is", {"files": photos(noise)}),
        (422, "The mask has 64 x 32 pixels, the photo 64 x 64", {"files": marked(noise, file + small.tobytes())}),
        (422, "unreadable", {"files": marked(noise, b"none")}),
        (422, "both say where the defect is", {"files": marked(noise, whole), "data": {"box": BOX}}),
        (422, "box='1,2,3' is no box", {"files": photos(noise), "data": {"box": "1,2,3"}}),
        (422, "does not lie in the photo", {"files": photos(noise), "data": {"box": "60,0,9,9"}}),
        (422, "mask: ", {"files": photos(noise), "data": {"mask": "mask.png"}}),
        (422, "one of the good photos of 'tiles'", {"files": photos(good[0]), "data": {"box": BOX}}),
        (422, "2 photos were sent", {"files": photos(noise, other), "data": {"box": BOX}}),
        (413, "'mask.png' is larger than 1 MB", {"files": marked(noise, b"0" * 1_000_001)}),
        (415, "Content-Type", {"content": b"none"}),
    ):
        answer = client.post(f"{ADDRESS}/taught", **sent)
        assert (answer.status_code, said in answer.json()["detail"]) == (status, True), answer.text
        assert "resad-" not in answer.json()["detail"], "the server's folders"
    for verb, what in (("post", "taught"), ("delete", "taught"), ("get", "history"), ("post", "undo")):
        sent = {"files": photos(noise), "data": {"box": BOX}} if (verb, what) == ("post", "taught") else {}
        answer = client.request(verb, f"/v1/products/pill/{what}", **sent)
        assert (answer.status_code, "'pill' is not enrolled" in answer.json()["detail"]) == (404, True)
    refused = client.post(f"{ADDRESS}/inspect", files=marked(noise, whole))
    assert (refused.status_code, "mask: " in refused.json()["detail"]) == (422, True), "where no mask belongs"
    assert content(inferencer) == kept
    assert client.get(f"{ADDRESS}/history").json() == steps
    assert inferencer.products == ["tiles"]


def test_changes_are_listed_and_undone(
    client: Any, inferencer: ResADInferencer, good: list[Path], missed: list[Path]
) -> None:
    states = [content(inferencer)]
    client.put(f"{ADDRESS}/min_area", json={"min_area": 7})
    states.append(content(inferencer))
    client.post(f"{ADDRESS}/taught", files=photos(missed[0]), data={"box": BOX})
    steps = client.get(f"{ADDRESS}/history").json()
    assert [(each["step"], each["what"]) for each in steps] == [
        (1, "enroll"),
        (2, "minimum area"),
        (3, "teach noise.png"),
    ]
    assert set(steps[0]) == {"step", "time", "what", "photos", "threshold"}
    told = client.post(f"{ADDRESS}/undo").json()
    assert told["undone"] == steps[2]
    assert told["product"]["taught"]["photos"] == []
    assert content(inferencer) == states[1]
    assert client.post(f"{ADDRESS}/undo", json={"step": 2}).json()["product"]["min_area"] == 0
    assert content(inferencer) == states[0]
    for wanted, status, said in (
        ({"step": 2}, 409, "'tiles' is what it was before step 2. Nothing was changed."),
        ({"step": 99}, 409, "'tiles' has no step 99 that could be undone; kept are 1 to 5"),
        ({"step": "last"}, 422, "step: "),
        ({"number": 1}, 422, "number: "),
    ):
        answer = client.post(f"{ADDRESS}/undo", json=wanted)
        assert (answer.status_code, said in answer.json()["detail"]) == (status, True), answer.text
    (inferencer.banks / "old.safetensors").write_bytes(states[0] or b"")  # copied there, so nothing was kept
    nothing = client.post("/v1/products/old/undo")
    assert (nothing.status_code, "no step that could be undone" in nothing.json()["detail"]) == (409, True)
    client.post(f"{ADDRESS}/inspect", files=photos(good[0]))
    assert client.post(f"{ADDRESS}/undo", json={"step": 1}).json()["product"] is None, "it is not enrolled any more"
    assert 'product="tiles"' not in client.get("/metrics").text
    assert client.post(f"{ADDRESS}/undo").json()["product"]["product"] == "tiles"
    assert content(inferencer) == states[0]


def test_the_guards_stand_before_it(inferencer: ResADInferencer, missed: list[Path]) -> None:
    kept = content(inferencer)
    with testclient.TestClient(application(inferencer, token=TOKEN), base_url=HOME) as client:
        assert client.post(f"{ADDRESS}/taught", files=photos(missed[0]), data={"box": BOX}).status_code == 401
        assert client.post(f"{ADDRESS}/undo").status_code == 401
        assert client.get(f"{ADDRESS}/history").status_code == 401
    assert content(inferencer) == kept


def test_the_description_has_masks_as_files(client: Any) -> None:
    told = client.get("/v1/openapi.json").json()["paths"]["/v1/products/{name}/taught"]["post"]
    form = told["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert form["mask"]["format"] == "binary"
    assert form["photos"]["maxItems"] == 1
    assert "box" in {each["name"] for each in told["parameters"]}
    assert "mask" not in {each["name"] for each in told["parameters"]}
