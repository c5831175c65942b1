# SPDX-License-Identifier: Apache-2.0

"""The REST API, in this process, and once as the command that serves it without the page."""

import base64
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra [api] is not installed")
pytest.importorskip("prometheus_client", reason="the extra [api] is not installed")
from fastapi import testclient
from prometheus_client import generate_latest

from anomalib_resad.deploy import ResADInferencer, turns
from anomalib_resad.deploy.api import application
from anomalib_resad.deploy.metrics import Metrics
from anomalib_resad.deploy.prediction import Prediction
from tests.conftest import hold_inspections

HOME = "http://127.0.0.1:7860"
TOKEN = "0123456789abcdef"  # noqa: S105


@pytest.fixture
def client(inferencer: ResADInferencer) -> Iterator[Any]:
    with testclient.TestClient(application(inferencer, max_upload_mb=1), base_url=HOME) as opened:
        yield opened


def photos(*paths: Path) -> list[tuple[str, tuple[str, bytes]]]:
    return [("photos", (path.name, path.read_bytes())) for path in paths]


def test_scores_are_those_of_the_inferencer(
    client: Any, inferencer: ResADInferencer, good: list[Path], new: list[Path], tmp_path: Path
) -> None:
    """Of PNG and JPEG, of the model's threshold and the product's; the maps are those that are drawn elsewhere."""
    made = client.post("/v1/products/tiles", files=photos(*good[:2]), data={"rotations": "1"})
    assert made.status_code == 201, made.text
    assert [each["name"] for each in made.json()["photos"]] == [
        each.name for each in inferencer.bank("tiles").references
    ]
    with Image.open(new[0]) as image:
        image.convert("RGB").save(tmp_path / "photo.jpg")
    sent, alarms = [*new, tmp_path / "photo.jpg"], 1
    for threshold in (made.json()["threshold"], -1e6):
        told = client.put("/v1/products/tiles/threshold", json={"threshold": threshold}).json()
        assert (told["threshold"], told["own_threshold"]) == (pytest.approx(threshold), True)
        answer = client.post("/v1/products/tiles/inspect?map=gray", files=photos(*sent)).json()
        assert answer["threshold"] == told["threshold"]
        assert len(answer["results"]) == len(sent)
        for path, result in zip(sent, answer["results"], strict=True):
            found = inferencer.predict(path, "tiles")
            assert (result["photo"], result["score"], result["raw_score"]) == (path.name, found.score, found.raw_score)
            assert result["label"] == ("anomalous" if found.label else "good")
            alarms += bool(found.label)
            with Image.open(io.BytesIO(base64.b64decode(result["map"]))) as drawn:
                assert np.abs(np.asarray(drawn) / 255 - np.clip(found.map, 0, 1)).max() < 0.003
    assert {each["label"] for each in answer["results"]} == {"anomalous"}
    overlaid = client.post("/v1/products/tiles/inspect?map=overlay", files=photos(new[0])).json()["results"][0]["map"]
    with Image.open(io.BytesIO(base64.b64decode(overlaid))) as drawn, Image.open(new[0]) as photo:
        assert drawn.size == photo.size
    figures = client.get("/metrics").text
    assert f'resad_alarms_total{{product="tiles"}} {float(alarms)}' in figures
    assert f'resad_score_count{{product="tiles"}} {float(2 * len(sent) + 1)}' in figures
    assert 'resad_request_seconds_count{route="/v1/products/{name}/inspect"} 3.0' in figures
    assert "resad_queue 0.0" in figures
    region = client.post(
        "/v1/products/part", files=photos(*good[:2]), data={"rotations": "1", "region": "8,8 40,8 40,40 8,40"}
    )
    assert region.json()["region"] == 0.25
    refused = client.post("/v1/products/other", files=photos(good[0]), data={"region": str(good[0])})
    assert refused.status_code == 422
    assert "is no polygon" in refused.json()["detail"], "the web names no files"
    assert client.put("/v1/products/tiles/min_area", json={"min_area": 7}).json()["min_area"] == 7
    assert client.put("/v1/products/tiles/min_area", json={"min_area": -7}).status_code == 422
    told = client.put("/v1/products/tiles/threshold", json={"threshold": None}).json()
    assert not told["own_threshold"]


def test_products_come_and_go(client: Any, inferencer: ResADInferencer, good: list[Path]) -> None:
    assert client.get("/v1/products").json() == []
    awkward = [
        ("photos", ("../../a b<é>.png", good[0].read_bytes())),
        ("photos", ("../../a b<é>.png", good[1].read_bytes())),
    ]
    assert client.post("/v1/products/tiles", files=awkward, data={"rotations": "1"}).status_code == 201
    assert {each.name for each in inferencer.bank("tiles").references} == {"a b_é_.png"}
    assert client.post("/v1/products/tiles", files=photos(good[2])).status_code == 409
    assert len(client.post("/v1/products/tiles/photos", files=photos(good[2])).json()["photos"]) == 3
    replaced = client.post("/v1/products/tiles", files=photos(good[3]), data={"replace": "true", "rotations": "8"})
    assert (len(replaced.json()["photos"]), replaced.json()["rotations"]) == (1, 8)
    assert [each["product"] for each in client.get("/v1/products").json()] == ["tiles"]
    (inferencer.banks / "broken.safetensors").write_bytes(b"none")
    broken = client.get("/v1/products").json()[0]
    assert "truncated or no bank" in broken["error"]
    assert str(inferencer.banks) not in broken["error"]
    assert client.get("/v1/products/broken").status_code == 503
    assert client.delete("/v1/products/tiles").status_code == 204
    assert client.get("/v1/products/tiles").status_code == 404
    assert inferencer.products == ["broken"]


def test_what_is_wrong_is_said_and_changes_nothing(client: Any, inferencer: ResADInferencer, good: list[Path]) -> None:
    bad = [("photos", ("bad.png", b"none")), *photos(good[0])]
    for address in ("/v1/products/none/inspect", "/v1/products/none/photos"):
        assert client.post(address, files=photos(good[0])).status_code == 404
    refused = client.post("/v1/products/tiles", files=bad)
    assert refused.status_code == 422
    assert re.match(r"1 of the .* cannot be used. bad\.png: unreadable", refused.json()["detail"]), refused.text
    assert client.post("/v1/products/.tiles", files=photos(good[0])).status_code == 422
    assert client.post("/v1/products/tiles").status_code == 415
    large = [("photos", ("large.png", b"0" * 1_000_001))]
    assert client.post("/v1/products/tiles", files=large).status_code == 413
    assert inferencer.products == []
    inferencer.enroll("tiles", good[:1], rotations=1)
    results = client.post("/v1/products/tiles/inspect", files=bad).json()["results"]
    assert ["error" in each for each in results] == [True, False]
    for threshold in ("NaN", '"high"'):
        answer = client.put(
            "/v1/products/tiles/threshold",
            content=f'{{"threshold": {threshold}}}',
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code == 422
    assert inferencer.bank("tiles").threshold is None


def test_no_request_is_an_error_of_the_server(inferencer: ResADInferencer, good: list[Path]) -> None:
    """Headers of NumPy's files that Python cannot even read, a boundary without an end, truth values for numbers."""
    inferencer.enroll("tiles", good[:1], rotations=1)
    address = "/v1/products/tiles"
    with testclient.TestClient(application(inferencer), base_url=HOME, raise_server_exceptions=False) as client:
        for header in (b"{'descr': '|u1', 'shape': (3,", b"-" * 9000 + b"1", b"(" * 9000, b"{1: 2, 'descr': 3}"):
            content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
            answer = client.post(f"{address}/inspect", content=content, headers={"Content-Type": "image/x-npy"})
            assert "damaged file of NumPy" in answer.json()["results"][0]["error"], header
        many = {"photos": [{"content": "AA==", "shape": [1] * 70}]}
        assert "are no uint8 of shape" in client.post(f"{address}/inspect", json=many).json()["results"][0]["error"]
        form = {"Content-Type": "multipart/form-data; boundary=" + "a" * 5000}
        assert client.post(f"{address}/inspect", content=b"--a", headers=form).status_code == 400
        for where, given in (("threshold", "threshold"), ("threshold", "false_alarm_rate"), ("min_area", "min_area")):
            answer = client.put(f"{address}/{where}", json={given: True})
            assert answer.status_code == 422
            assert f"{given}=true is no number" in answer.json()["detail"]
        assert client.post("/v1/products/tiles?replace=true", files=photos(good[0])).status_code == 201


def test_figures_do_not_grow_with_what_clients_make_up(client: Any, good: list[Path]) -> None:
    for number in range(3):
        client.request(f"MADEUP{number}", "/v1/products")
        assert client.post(f"/v1/products/p{number}", files=photos(good[0])).status_code == 201
        client.post(f"/v1/products/p{number}/inspect", files=photos(good[0]))
        assert f'product="p{number}"' in client.get("/metrics").text
        assert client.delete(f"/v1/products/p{number}").status_code == 204
    figures = client.get("/metrics").text
    assert "MADEUP" not in figures
    assert 'product="p' not in figures
    assert 'method="other"' in figures


def test_the_guards_stand_before_it(inferencer: ResADInferencer) -> None:
    with testclient.TestClient(application(inferencer, token=TOKEN), base_url=HOME) as client:
        right = {"Authorization": f"Bearer {TOKEN}"}
        for address in ("/v1/products", "/v1/health", "/metrics", "/v1/openapi.json"):
            assert client.get(address).status_code == 401
            assert client.get(address, headers=right).status_code == 200
            assert client.get(address, headers=right | {"Origin": "http://evil.example"}).status_code == 403
            assert client.get(address, headers=right | {"Host": "evil.example"}).status_code == 400
        assert 'status="401"' in client.get("/metrics", headers=right).text


def test_state_and_description(client: Any, inferencer: ResADInferencer) -> None:
    assert client.get("/v1/health").json() == {"status": "ok"}
    assert client.get("/v1/ready").status_code == 200
    assert client.get("/v1/version").json()["model"] == inferencer.manifest.model
    described = client.get("/v1/openapi.json").json()["paths"]
    assert {(path, verb) for path, verbs in described.items() for verb in verbs} == {
        ("/v1/health", "get"),
        ("/v1/ready", "get"),
        ("/v1/version", "get"),
        ("/v1/products", "get"),
        *(("/v1/products/{name}", verb) for verb in ("get", "post", "delete")),
        ("/v1/products/{name}/photos", "post"),
        ("/v1/products/{name}/threshold", "put"),
        ("/v1/products/{name}/min_area", "put"),
        ("/v1/products/{name}/inspect", "post"),
        *(("/v1/products/{name}/taught", verb) for verb in ("post", "delete")),
        ("/v1/products/{name}/history", "get"),
        ("/v1/products/{name}/undo", "post"),
    }


def test_a_removed_product_leaves_no_figures() -> None:
    metrics = Metrics()
    found = Prediction(0.4, False, np.zeros((2, 2), dtype=np.float32), 1.0)
    for each in (found, replace(found, label=True), replace(found, label=None, moved=True)):
        metrics.count("cable", each)
    assert len([line for line in figures_of(metrics) if 'product="cable"' in line]) >= 4
    metrics.forget("cable")
    metrics.forget("never inspected")
    assert not [line for line in figures_of(metrics) if "product=" in line]


def figures_of(metrics: Metrics) -> list[str]:
    return generate_latest(metrics.registry).decode().splitlines()


def test_a_full_queue_says_so(inferencer: ResADInferencer, good: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One uses the model, one waits, the next is told to come again; health answers all the while."""
    monkeypatch.setattr(turns, "RUNNING", 1)
    monkeypatch.setattr(turns, "WAITING", 1)
    inferencer.enroll("tiles", good[:1], rotations=1)
    entered, leave = hold_inspections(inferencer, monkeypatch)
    statuses: list[int] = []
    with testclient.TestClient(application(inferencer), base_url=HOME) as client:

        def ask() -> None:
            statuses.append(client.post("/v1/products/tiles/inspect", files=photos(good[0])).status_code)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert entered.acquire(timeout=60)
        while "resad_queue 2.0" not in client.get("/metrics").text:
            pass
        refused = client.post("/v1/products/tiles/inspect", files=photos(good[0]))
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert client.get("/v1/health").status_code == 200
        leave.set()
        for thread in threads:
            thread.join()
    assert statuses == [200, 200]


def test_photos_of_a_request_are_judged_by_the_threshold_that_is_told(
    client: Any, inferencer: ResADInferencer, good: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where somebody changes it between two of them."""
    inferencer.enroll("tiles", good[:1], rotations=1, threshold=1e6)
    inspect = inferencer.inspect

    def changing(*given: Any) -> Any:
        found = inspect(*given)
        inferencer.set_threshold("tiles", -1e6)
        return found

    monkeypatch.setattr(inferencer, "inspect", changing)
    answers = [client.post("/v1/products/tiles/inspect", files=photos(*good[1:3])).json() for _ in range(2)]
    told = [(each["threshold"], *(result["label"] for result in each["results"])) for each in answers]
    assert told == [(1e6, "good", "good"), (-1e6, "anomalous", "anomalous")]


def test_what_another_one_did_meanwhile_has_the_same_status(
    client: Any, inferencer: ResADInferencer, good: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a product came, or went, after the request was checked."""
    inferencer.enroll("tiles", good[:1], rotations=1)
    monkeypatch.setattr(type(inferencer), "products", ["gone"])
    assert client.post("/v1/products/tiles", files=photos(good[1])).status_code == 409
    for answer in (
        client.post("/v1/products/gone/photos", files=photos(good[1])),
        client.post("/v1/products/gone/inspect", files=photos(good[1])),
        client.put("/v1/products/gone/threshold", json={"threshold": 1}),
        client.delete("/v1/products/gone"),
    ):
        assert answer.status_code == 404
        assert "'gone' is not enrolled" in answer.json()["detail"]


HEADLESS = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("gradio", "pandas", "torch", "anomalib"):
            raise ModuleNotFoundError("blocked", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv = ["resad", "serve", *sys.argv[1:]]
from anomalib_resad.cli import main
main()
"""


def test_the_command_serves_it_without_gradio(bundle: Path, tmp_path: Path) -> None:
    options = ("--bundle", bundle, "--banks", tmp_path / "banks")
    command = [sys.executable, "-u", "-c", HEADLESS, *(str(each) for each in options)]
    page = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert page.returncode == 2
    assert "needs gradio: install the extra [serve]" in " ".join(page.stderr.split())
    with subprocess.Popen([*command, "--page", "false"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = next(found[0] for line in process.stdout if (found := re.search(r"http://[\d.:]+", line)))
            asking = (
                f"from urllib.request import urlopen; print(urlopen('{address}/v1/ready', timeout=30).read().decode())"
            )
            asked = subprocess.run(
                [sys.executable, "-c", asking], capture_output=True, text=True, check=True, timeout=120
            )
        finally:
            process.terminate()
    assert json.loads(asked.stdout) == {"status": "ready"}
    assert process.returncode == 0
