# SPDX-License-Identifier: Apache-2.0

"""Bodies of requests to the API: forms, JSON, files and pixels say the same, and what is wrong with one is told."""

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra [api] is not installed")
pytest.importorskip("prometheus_client", reason="the extra [api] is not installed")
from fastapi import testclient

from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.deploy.api import application
from anomalib_resad.enrollment import decoding
from anomalib_resad.enrollment.photos import read_pixels
from tests.conftest import hold_inspections

HOME = "http://127.0.0.1:7860"
INSPECT = "/v1/products/tiles/inspect"
RAW = {"Content-Type": "application/octet-stream"}
AS_JSON = {"Content-Type": "application/json"}


@pytest.fixture
def client(inferencer: ResADInferencer) -> Iterator[Any]:
    with testclient.TestClient(application(inferencer, max_upload_mb=1, max_total_mb=2), base_url=HOME) as opened:
        yield opened


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_all_bodies_give_the_same_score(
    client: Any, inferencer: ResADInferencer, good: list[Path], new: list[Path]
) -> None:
    inferencer.enroll("tiles", good[:2], rotations=1)
    path = new[-1]  # not square
    content, pixels = path.read_bytes(), read_pixels(path)
    shape = ",".join(map(str, pixels.shape))
    in_json = [
        {"name": "a.png", "content": text(content)},
        {"content": text(pixels.tobytes()), "shape": pixels.shape},
        {"content": text(npy(pixels))},
    ]
    answers = [
        client.post(INSPECT, files={"photos": ("a.png", content)}),
        client.post(INSPECT, files={"photos": ("a.npy", npy(np.asfortranarray(pixels)))}),
        client.post(INSPECT, content=content, headers={"Content-Type": "image/png", "X-Photo": "%C3%A9.png"}),
        client.post(INSPECT, content=content, headers=RAW),
        client.post(INSPECT, content=npy(pixels), headers=RAW),
        client.post(INSPECT, content=pixels.tobytes(), headers=RAW | {"X-Shape": shape}),
        client.post(INSPECT, json={"photos": in_json, "map": "gray"}),
    ]
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    results = [result for answer in answers for result in answer.json()["results"]]
    assert len(results) == len(answers) + len(in_json) - 1
    found = inferencer.predict(path, "tiles")
    assert {(each["score"], each["raw_score"]) for each in results} == {(found.score, found.raw_score)}
    assert {tuple(each["size"].values()) for each in results} == {(300, 170)}
    assert [each["photo"] for each in results] == ["a.png", "a.npy", "é.png", *["photo"] * 3, "a.png", *["photo"] * 2]
    assert ["map" in each for each in results] == [False] * 6 + [True] * 3
    gray = client.post(INSPECT, content=pixels[..., 0].tobytes(), headers=RAW | {"X-Shape": "170,300"}).json()
    assert gray["results"][0]["score"] == found.score, "the photo is gray"


def test_deep_pixels_are_of_the_depth_of_their_product(client: Any, inferencer: ResADInferencer) -> None:
    deep = np.random.default_rng(0).integers(0, 4096, (40, 50), np.uint16)
    headers = RAW | {"X-Shape": "40,50", "X-Dtype": "uint16"}
    refused = client.post("/v1/products/tiles", content=deep.tobytes(), headers=headers)
    assert refused.status_code == 422
    assert "bit_depth" in refused.json()["detail"]
    made = client.post("/v1/products/tiles?bit_depth=12&rotations=1", content=deep.tobytes(), headers=headers)
    assert (made.status_code, made.json()["bit_depth"]) == (201, 12)
    found = inferencer.predict(deep, "tiles")
    for content, given in ((deep.tobytes(), headers), (npy(deep.astype(">u2")), RAW)):
        (result,) = client.post(INSPECT, content=content, headers=given).json()["results"]
        assert result["score"] == found.score
    (other,) = client.post(INSPECT, content=bytes(2000), headers=RAW | {"X-Shape": "40,50"}).json()["results"]
    assert "8 bits" in other["error"]


def test_large_pixels_are_reduced_as_files_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MOST_KEPT", 1000)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    assert read_pixels(pixels).shape == (30, 25, 3)
    assert np.array_equal(read_pixels(pixels), read_pixels(file.getvalue()))
    monkeypatch.setattr(decoding, "MOST_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"the most is 1,000"):
        read_pixels(pixels)


def test_thresholds_for_a_rate(client: Any, inferencer: ResADInferencer, good: list[Path]) -> None:
    """Those that the inferencer computes, when a product is enrolled in either form, and later."""
    files = [("photos", (path.name, path.read_bytes())) for path in good[:3]]
    in_json = [{"name": path.name, "content": text(path.read_bytes())} for path in good[:3]]
    address, options = "/v1/products/tiles", {"rotations": 1, "false_alarm_rate": 0.2, "replace": True}
    told = []
    for answer in (
        client.post(address, files=files, data=options),
        client.post(address, json={"photos": in_json, **options}),
    ):
        assert answer.status_code == 201, answer.text
        told.append(answer.json())
        assert told[-1] == told[0], "names of photos too"
    expected = inferencer.enroll("expected", good[:3], rotations=1, false_alarm_rate=0.2)
    assert told[0]["threshold"] == pytest.approx(expected.threshold)
    assert (told[0]["own_threshold"], told[0]["false_alarm_rate"]) == (True, 0.2)
    later = client.put(f"{address}/threshold", json={"false_alarm_rate": 0.01}).json()
    assert later["threshold"] == pytest.approx(inferencer.calibrate("expected", 0.01).threshold)
    assert later["false_alarm_rate"] == 0.01
    models = client.post(address, files=files, data=options | {"false_alarm_rate": "none"}).json()
    assert (models["own_threshold"], models["false_alarm_rate"]) == (False, None)


ONE = b"\x00" * 300
BAD: list[tuple[str, dict[str, str], bytes, int, str]] = [
    (INSPECT, {"Content-Type": "text/plain"}, ONE, 415, "Content-Type text/plain: send photos as multipart/form-data"),
    (INSPECT, {}, ONE, 415, "(none)"),
    (INSPECT, RAW, b"", 422, "'photo' is empty"),
    (INSPECT, RAW | {"X-Shape": "10,x,3"}, ONE, 422, "X-Shape: 480,640,3"),
    (INSPECT, RAW | {"X-Shape": "10,10,3", "X-Dtype": "float32"}, ONE, 422, "uint8 or uint16"),
    (INSPECT, RAW, b"0" * 1_000_001, 413, "larger than 1 MB (--max_upload_mb)"),
    (INSPECT, AS_JSON, b"none", 422, "Invalid JSON"),
    (INSPECT, AS_JSON, b"{}", 422, "photos: Field required."),
    (INSPECT, AS_JSON, b'{"photos": []}', 422, "at least 1 item"),
    (INSPECT, AS_JSON, b'{"photos": [{"content": "?"}]}', 422, "photos.0.content: "),
    (INSPECT, AS_JSON, b'{"photos": [{"content": "AAAA", "kind": 1}]}', 422, "photos.0.kind: Extra inputs"),
    (INSPECT, AS_JSON, b'{"photos": [{"content": "AAAA"}], "map": "red"}', 422, "map: Input should be 'none'"),
    (f"{INSPECT}?maps=gray", RAW, ONE, 422, "maps: Extra inputs are not permitted (given: 'gray')."),
    ("/v1/products/tiles/photos?threshold=1", RAW, ONE, 422, "threshold: Extra inputs"),
    ("/v1/products/new?threshold=high", RAW, ONE, 422, "threshold: Input should be a valid number"),
    ("/v1/products/new?rotations=3", RAW, ONE, 422, "rotations: Input should be '1', '8' or 'auto'"),
    ("/v1/products/new?bit_depth=3", RAW, ONE, 422, "bit_depth=3"),
    ("/v1/products/new?false_alarm_rate=2", RAW, ONE, 422, "false_alarm_rate=2.0 must be a share"),
    ("/v1/products/new?false_alarm_rate=0.1&threshold=1", RAW, ONE, 422, "are two thresholds"),
    ("/v1/products/new", RAW | {"X-Shape": "10,10,3", "X-Dtype": "uint16"}, ONE, 422, "which has 600"),
]
BAD_VALUES: list[tuple[bytes, dict[str, str], str]] = [
    (ONE, {"X-Shape": "10,11,3"}, "300 bytes are no uint8 of shape (10, 11, 3), which has 330"),
    (ONE, {"X-Shape": "10,10,3,1"}, "is no photo"),
    (ONE, {"X-Shape": "99999999999,99999999999"}, "which has 9999999999800000000001"),
    (ONE, {"X-Shape": "100,3"}, "of at least 8 x 8"),
    (npy(np.zeros((10, 10, 3))), {}, "values of float64 are no pixels"),
    (npy(np.zeros((10, 10, 3), np.uint8))[:-1], {}, "299 bytes are no uint8"),
    (npy(np.array([{}], dtype=object)), {}, "values of object are no pixels"),
    (b"\x93NUMPYxx", {}, "damaged file of NumPy"),
    (b"none", {}, "unreadable"),
]


def test_what_is_wrong_is_told(client: Any, inferencer: ResADInferencer, good: list[Path]) -> None:
    inferencer.enroll("tiles", good[:1], rotations=1)
    for address, headers, body, status, message in BAD:
        answer = client.post(address, content=body, headers=headers)
        assert (answer.status_code, message in answer.json()["detail"]) == (status, True), (message, answer.text)
    for body, headers, message in BAD_VALUES:
        answer = client.post(INSPECT, content=body, headers=RAW | headers)
        assert message in answer.json()["results"][0]["error"], answer.text
    no_file = client.post(INSPECT, files={"other": ("a.png", b"0")}, data={"photos": "a.png"})
    assert (no_file.status_code, "-F photos=@" in no_file.json()["detail"]) == (422, True)
    for wrong in ({}, {"threshold": 1, "false_alarm_rate": 0.1}, {"false_alarm_rate": None}, {"treshold": 1}):
        answer = client.put("/v1/products/tiles/threshold", json=wrong)
        assert (answer.status_code, type(answer.json()["detail"])) == (422, str), answer.text
    assert inferencer.products == ["tiles"]
    assert inferencer.bank("tiles").false_alarm_rate is None


def test_bodies_have_a_limit(client: Any, inferencer: ResADInferencer, good: list[Path]) -> None:
    """Also where they say no length, or something else."""
    inferencer.enroll("tiles", good[:1], rotations=1)
    large = bytes(2_000_001)
    assert client.post(INSPECT, content=large, headers=RAW).status_code == 413
    assert client.post(INSPECT, content=iter([large]), headers=RAW).status_code == 413
    photos = [{"content": text(good[0].read_bytes())}] * 21
    assert client.post(INSPECT, content=json.dumps({"photos": photos}), headers=AS_JSON).status_code == 422
    assert client.put("/v1/products/tiles/threshold", content=large[:1_000_001], headers=AS_JSON).status_code == 413


def test_bodies_have_a_limit_together(
    client: Any, inferencer: ResADInferencer, good: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in memory while their requests wait for the model; what needs no body is answered meanwhile."""
    inferencer.enroll("tiles", good[:1], rotations=1)
    entered, leave = hold_inspections(inferencer, monkeypatch)
    files = [("photos", ("a.png", good[0].read_bytes().ljust(900_000)))] * 2  # 1.8 MB, of 2 times 2 MB

    def ask(**body: Any) -> Any:
        return client.post(INSPECT, **body)

    with ThreadPoolExecutor() as threads:
        asked = [threads.submit(ask, files=files) for _ in range(2)]
        try:
            assert all(entered.acquire(timeout=60) for _ in asked)
            for body in ({"files": files}, {"content": iter([b"0"]), "headers": RAW}):
                refused = ask(**body)
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
                assert "have 4 MB together" in refused.text
            assert client.get("/v1/products/tiles").status_code == 200
        finally:
            leave.set()
        assert [each.result().status_code for each in asked] == [200, 200]
    assert ask(files=files).status_code == 200


def test_openapi_tells_bodies_and_options(client: Any) -> None:
    paths = client.get("/v1/openapi.json").json()["paths"]
    for address, options in (
        (
            "/v1/products/{name}",
            {"rotations", "bit_depth", "threshold", "false_alarm_rate", "min_area", "region", "replace"},
        ),
        ("/v1/products/{name}/photos", set()),
        ("/v1/products/{name}/inspect", {"map"}),
    ):
        told = paths[address]["post"]
        kinds = told["requestBody"]["content"]
        assert kinds.keys() == {"multipart/form-data", "application/json", "image/*", "application/octet-stream"}
        for kind in ("multipart/form-data", "application/json"):
            assert kinds[kind]["schema"]["properties"].keys() == {"photos", *options}
        names = {each["name"] for each in told["parameters"]}
        assert names >= options | {"name", "X-Shape", "X-Dtype", "X-Photo"}
        assert told["responses"].keys() >= {"413", "415", "422", "429", "503"}
