# SPDX-License-Identifier: Apache-2.0

"""Requests to the application that serves the page: what others may try."""

import base64
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from anomalib_resad.deploy import ResADInferencer

gradio = pytest.importorskip("gradio", reason="the extra [serve] is not installed")
testclient = pytest.importorskip("starlette.testclient")

from anomalib_resad.deploy import service as serving  # noqa: E402
from anomalib_resad.deploy.guard import MOST_FILES, checked_token, guards, is_loopback  # noqa: E402
from anomalib_resad.deploy.page import REFUSED  # noqa: E402
from anomalib_resad.deploy.serve import application  # noqa: E402
from anomalib_resad.deploy.service import launch  # noqa: E402

HOME = "http://127.0.0.1:7860"
TOKEN = "0123456789abcdef"  # noqa: S105
ALL = "0.0.0.0"  # noqa: S104  # nothing listens in these tests


@pytest.fixture
def serve(inferencer: ResADInferencer, uploads: Path) -> Iterator[Callable[..., Any]]:
    """Clients of the application, which runs in this process."""
    uploads.mkdir()
    opened = []

    def serve(**settings: Any) -> Any:
        client = testclient.TestClient(application(inferencer, **settings), base_url=HOME)
        opened.append(client.__enter__())
        return client

    yield serve
    for client in opened:
        client.__exit__(None, None, None)


def upload(client: Any, *photos: Path, **settings: Any) -> Any:
    files = [("files", (photo.name, photo.read_bytes())) for photo in photos]
    return client.post("/gradio_api/upload", files=files, **settings)


def uploaded(client: Any, *photos: Path) -> list[dict[str, Any]]:
    answer = upload(client, *photos)
    assert answer.status_code == 200, answer.text
    return [named(path) for path in answer.json()]


def named(path: str) -> dict[str, Any]:
    return {"path": path, "orig_name": Path(path).name, "meta": {"_type": "gradio.FileData"}}


def call(client: Any, action: str, *data: Any, session: str = "one", **settings: Any) -> Any:
    """What an action answers, or the error, as any client asks for it."""
    begun = client.post(f"/gradio_api/call/{action}", json={"data": data, "session_hash": session}, **settings)
    assert begun.status_code == 200, begun.text
    answer = client.get(f"/gradio_api/call/{action}/{begun.json()['event_id']}", **settings).text
    return json.loads(answer.partition("data: ")[2])


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_one_session_enrolls_another_can_use(
    serve: Callable[..., Any], good: list[Path], new: list[Path], uploads: Path
) -> None:
    """Also one that was there before; and nothing piles up."""
    client = serve()
    assert client.get("/").status_code == 200
    assert "not enrolled" in call(client, "inspect", *uploaded(client, new[0]), "tiles", 0.5, session="two")[2]
    assert call(client, "enroll", "tiles", uploaded(client, *good[:2]), 1, "auto", "")[0].startswith(
        "**tiles** is enrolled."
    )
    for number in range(12):
        photo = uploaded(client, good[number % len(good)])
        picture, _, verdict = call(client, "inspect", *photo, "tiles", 0.5, session="two")
        assert "score" in verdict
        shown = client.get(picture["url"])
        assert shown.headers["content-type"] == "image/png"
    assert len(files_in(uploads)) == 3, "the photo of the refused inspection, the last photo, and its map"
    answer = call(client, "keep_threshold", "tiles", 0.7, session="two")
    assert "was kept" in answer[2]
    assert len(files_in(uploads)) == 3


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("host", "evil.example"),
        ("host", "evil.example:7860"),
        ("host", "127.0.0.1.evil.example"),
        ("host", "[::1].evil.example"),
        ("host", "127.0.0.1@evil.example"),
        ("host", ""),
        ("origin", "http://evil.example"),
        ("origin", "null"),
        ("origin", "http://127.0.0.1:3000"),
        ("origin", "http://localhost:7860"),
        ("origin", "http://127.0.0.1:7860.evil.example"),
        ("origin", "http://127.0.0.1:7860@evil.example"),
        ("origin", "http://[::1"),
        ("origin", ""),
    ],
)
def test_a_page_of_another_site_can_do_nothing(
    serve: Callable[..., Any], inferencer: ResADInferencer, good: list[Path], uploads: Path, header: str, value: str
) -> None:
    inferencer.enroll("tiles", good[:1], rotations=1)
    client = serve()
    answers = [
        client.get("/", headers={header: value}),
        client.get("/config", headers={header: value}),
        upload(client, good[0], headers={header: value}),
        client.post("/gradio_api/call/remove", json={"data": ["tiles"]}, headers={header: value}),
        # As a form and as text, which browsers send without asking first.
        client.post(
            "/gradio_api/call/remove",
            content='{"data": ["tiles"]}',
            headers={header: value, "content-type": "text/plain"},
        ),
        client.options(
            "/gradio_api/call/remove", headers={"origin": "x", header: value, "access-control-request-method": "POST"}
        ),
    ]
    assert {answer.status_code for answer in answers} <= {400, 403}
    assert not any("access-control-allow-origin" in answer.headers for answer in answers)
    assert inferencer.products == ["tiles"]
    assert not files_in(uploads)


def test_its_own_page_and_allowed_hosts_are_served(serve: Callable[..., Any]) -> None:
    client = serve(allowed_hosts=["inspect.example"])
    for headers in (
        {"origin": HOME},
        {"host": "localhost:7860", "origin": "http://localhost:7860"},
        {"host": "[::1]:7860", "origin": "http://[::1]:7860"},
        {"host": "inspect.example", "origin": "https://inspect.example"},
        {"origin": "https://inspect.example"},  # a proxy that changes the host
    ):
        answer = client.post("/gradio_api/call/remove", json={"data": ["nothing"]}, headers=headers)
        assert answer.status_code == 200, headers
    assert client.get("/").headers["content-security-policy"] == "frame-ancestors 'none'"
    with pytest.raises(ValueError, match="no patterns"):
        guards("127.0.0.1", ["*.example"], None, 1, lambda: None)


def test_a_token_is_asked_for(serve: Callable[..., Any], good: list[Path]) -> None:
    client = serve(host=ALL, allowed_hosts=["10.0.0.5"], token=TOKEN)

    def basic(text: str) -> str:
        return f"Basic {base64.b64encode(text.encode()).decode()}"

    for wrong in (
        {},
        {"authorization": "Bearer 0"},
        {"authorization": basic(f"{TOKEN}:x")},
        {"authorization": "Basic ="},
    ):
        for path in ("/", "/config", "/gradio_api/info", "/theme.css", "/gradio_api/heartbeat/x"):
            answer = client.get(path, headers=wrong)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"].startswith("Basic")
        assert upload(client, good[0], headers=wrong).status_code == 401
    for right in (f"Bearer {TOKEN}", basic(f"anybody:{TOKEN}")):
        assert client.get("/", headers={"authorization": right, "host": "10.0.0.5:7860"}).status_code == 200
    foreign = {"authorization": basic(f"x:{TOKEN}"), "origin": "http://evil.example"}  # as a browser would send it
    assert upload(client, good[0], headers=foreign).status_code == 403


def test_where_a_token_is_needed() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8"):
        assert is_loopback(host)
        assert checked_token(host, None) is None
    for host in (ALL, "::", "192.168.1.5", "device.local"):
        assert not is_loopback(host)
        made = checked_token(host, None)
        assert made is not None
        assert len(made) >= 32
        assert made != checked_token(host, None)
    assert checked_token("127.0.0.1", TOKEN) == TOKEN
    with pytest.raises(ValueError, match="4 characters"):
        checked_token(ALL, "1234")


def test_a_token_is_made_and_printed(
    inferencer: ResADInferencer, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where others can reach the page; here nothing does."""
    apps = []
    monkeypatch.setattr(serving, "_listening", lambda _host, port: socket.create_server(("127.0.0.1", port or 0)))
    monkeypatch.setattr(serving.uvicorn.Server, "run", lambda self, _sockets: apps.append(self.config.app))
    for host, count in ((ALL, 3), ("192.168.1.5", 2), ("127.0.0.1", 1)):
        said: list[str] = []
        monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
        launch(inferencer, said.append, host, None, [], None, 30, 200)
        assert len(said) == count
        assert ("token" in said[-1]) == (count > 1)
        assert ("--allowed_hosts" in said[min(1, count - 1)]) == (host == ALL)
    assert not files_in(uploads)
    monkeypatch.undo()
    with pytest.raises(OSError, match="Pass another"):
        launch(inferencer, print, "192.0.2.1", 7860, [], None, 30, 200)


def test_requests_are_limited(serve: Callable[..., Any], good: list[Path], uploads: Path, tmp_path: Path) -> None:
    client = serve(max_upload_mb=1, max_total_mb=2)
    (large, many) = (tmp_path / "large.png", tmp_path / "many.png")
    large.write_bytes(bytes(1_200_000))
    many.write_bytes(bytes(900_000))
    assert upload(client, large).status_code == 413
    assert upload(client, many, many, many).status_code == 413
    assert upload(client, many, many).status_code == 200
    for path in files_in(uploads):
        path.unlink()
    assert upload(client, *[good[0]] * MOST_FILES).status_code == 200
    left = len(files_in(uploads))
    too_many = upload(client, *[good[1]] * (MOST_FILES + 1))
    assert too_many.status_code == 400
    assert str(MOST_FILES) in too_many.text
    request = client.build_request("POST", "/gradio_api/upload", files=[("files", ("a.png", bytes(900_000)))] * 3)
    body = request.read()

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 100_000):
            yield body[start : start + 100_000]

    kind = {"content-type": request.headers["content-type"]}
    assert client.post("/gradio_api/upload", content=pieces(), headers=kind).status_code == 413, "its length is unsaid"
    assert len(files_in(uploads)) == left, "nothing stays of what was refused"
    assert client.post("/gradio_api/call/remove", json={"data": ["x" * 2_000_000]}).status_code == 413
    with pytest.raises(ValueError, match="at least 1"):
        serve(max_total_mb=0)


def test_only_uploads_are_read(
    serve: Callable[..., Any],
    inferencer: ResADInferencer,
    good: list[Path],
    uploads: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    inferencer.enroll("tiles", good[:1], rotations=1)
    client = serve()
    mine = uploaded(client, good[0])
    call(client, "inspect", *mine, "tiles", 0.5)  # Gradio makes its components anew for a session that did something
    outside = str(good[1])
    for photo in (
        named(outside),
        {"path": outside},
        {"path": outside, "meta": {"_type": "other"}},
        {"path": f"{uploads}/../../{outside}"},
        named("http://127.0.0.1:1/x.png"),
        {"path": "http://127.0.0.1:1/x.png"},
        {"path": None, "url": "data:image/png;base64,aaaa"},
        [named(outside)],
        outside,
        7,
    ):
        for answer in (
            call(client, "inspect", photo, "tiles", 0.5),
            call(client, "enroll", "stolen", photo if isinstance(photo, list) else [photo], 1, "auto", ""),
            call(client, "remove", photo),
        ):
            assert "score" not in str(answer)
            assert "uploads" not in str(answer).replace("not uploaded", "")
    assert inferencer.products == ["tiles"]
    assert len(files_in(uploads)) == 2, "nothing was copied or loaded"
    for path in ("process_recording", "proxy=http://127.0.0.1", "file=http://127.0.0.1/x", "file=HTTPS://127.0.0.1/x"):
        assert client.get(f"/gradio_api/{path}").status_code == 404
    assert client.post("/gradio_api/process_recording", files=[("video", ("a.mp4", b"x"))]).status_code == 404
    assert client.post("/gradio_api/run/remove", json={"data": ["tiles"]}).status_code == 404, "past the queue"
    capfd.readouterr()


def test_a_huge_picture_is_refused_by_its_header(
    serve: Callable[..., Any], inferencer: ResADInferencer, good: list[Path]
) -> None:
    inferencer.enroll("tiles", good[:1], rotations=1)
    client = serve()
    huge = bytearray(good[0].read_bytes())
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    photo = good[0].parent / "unused.png"
    answer = client.post("/gradio_api/upload", files=[("files", (photo.name, bytes(huge)))])
    _, _, verdict = call(client, "inspect", named(answer.json()[0]), "tiles", 0.5)
    assert verdict.startswith(REFUSED)
    assert "unused.png: " in verdict
