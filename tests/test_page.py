# SPDX-License-Identifier: Apache-2.0

"""The page's actions, and requests to the application that serves it: what others may try."""

import base64
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.deploy.messages import as_markdown, printable, without_folders

gradio = pytest.importorskip("gradio", reason="the extra [serve] is not installed")
testclient = pytest.importorskip("starlette.testclient")

from anomalib_resad.deploy import service as serving  # noqa: E402
from anomalib_resad.deploy.guard import MOST_FILES, checked_token, guards, is_loopback  # noqa: E402
from anomalib_resad.deploy.page import CHANGED, EMPTY, LONGEST_SHOWN, REFUSED, Page  # noqa: E402
from anomalib_resad.deploy.serve import application  # noqa: E402
from anomalib_resad.deploy.service import launch  # noqa: E402
from anomalib_resad.deploy.uploads import KEPT_SECONDS, MOST_KEPT, Uploads  # noqa: E402

HOME = "http://127.0.0.1:7860"
TOKEN = "0123456789abcdef"  # noqa: S105
ALL = "0.0.0.0"  # noqa: S104  # nothing listens in these tests


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    return tmp_path / "uploads"


@pytest.fixture
def page(inferencer: ResADInferencer, uploads: Path) -> Page:
    return Page(inferencer, Uploads(uploads, 1_000_000))


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


# -- what belongs together --------------------------------------------------------------------------------------------


def test_after_keeping_a_threshold_the_verdict_is_the_models(page: Page, good: list[Path], new: list[Path]) -> None:
    page.enroll("tiles", [str(path) for path in good[:2]])
    before = page.inspect(str(new[0]), "tiles", 0.5)[1]
    kept_at = min(0.95, before.score + 0.1)
    assert "## good" in page.verdict(before, "tiles", kept_at)
    threshold, _, verdict, picture, now = page.keep_threshold("tiles", kept_at, before)
    model = page.inferencer.predict(new[0], "tiles")
    assert model.label is False
    assert threshold == 0.5
    assert now.score == model.score < 0.5
    assert f"## good\ntiles: score **{model.score:.3f}**, threshold 0.500" in verdict
    assert Path(picture).exists()
    assert page.verdict(before, "tiles", 0.5) == CHANGED, "the old score is of another scale"


def test_a_threshold_from_the_photos(page: Page, good: list[Path], new: list[Path]) -> None:
    """For a rate in per cent; the photo is judged anew, and nothing gives the model's back."""
    assert "the model's threshold" in page.enroll("tiles", [str(path) for path in good[:3]])[0], "as of 0.1.0"
    before = page.inspect(str(new[0]), "tiles", 0.5)[1]
    for percent, said in ((10, "for a false-alarm rate of 10 %"), (None, "the model's threshold")):
        _, _, verdict, _, now = page.calibrate("tiles", percent, before)
        assert said in verdict
        assert now.score == page.inferencer.predict(new[0], "tiles").score
        assert (page.inferencer.bank("tiles").false_alarm_rate or 0) == (percent or 0) / 100
    for wrong in (0, 100, "high", float("nan")):
        with pytest.raises(gradio.Error):
            page.calibrate("tiles", wrong)
    with pytest.raises(gradio.Error, match="Choose a product"):
        page.calibrate(None, 5)


def test_what_has_moved_is_told(page: Page, good: list[Path], new: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The region is a polygon; a file of the server is none."""
    files = [str(path) for path in good[:2]]
    with pytest.raises(gradio.Error, match="is no polygon"):
        page.enroll("tiles", files, 1, "auto", str(good[0]))
    page.enroll("tiles", files, 1, "auto", "8,8 40,8 40,40 8,40")
    assert page.inferencer.bank("tiles").region is not None
    found, pixels = page.inferencer.inspect(str(new[0]), "tiles")
    monkeypatch.setattr(page.inferencer, "inspect", lambda *_: (replace(found, moved=True, label=None), pixels))
    assert page.inspect(str(new[0]), "tiles", 0.5)[2].startswith("## moved\ntiles: ")


def test_small_places_are_left_out(page: Page, good: list[Path], new: list[Path]) -> None:
    page.enroll("tiles", [str(path) for path in good[:2]])
    page.inferencer.set_threshold("tiles", -1e6)
    before = page.inspect(str(new[0]), "tiles", 0.5)[1]
    assert before.places
    _, _, verdict, _, now = page.leave_out("tiles", 64 * 64 + 1, before)
    assert "under 4,097 pixels are left out" in verdict
    assert now.places == ""
    assert page.verdict(before, "tiles", 0.5) == CHANGED
    with pytest.raises(gradio.Error, match="min_area=-1"):
        page.leave_out("tiles", -1)


def test_a_verdict_is_of_one_product_as_it_was(page: Page, good: list[Path], new: list[Path]) -> None:
    for name in ("tiles", "others"):
        page.enroll(name, [str(path) for path in good[:2]])
    found = page.inspect(str(new[0]), "tiles", 0.5)[1]
    assert page.verdict(found, "tiles", 0.01).startswith("## anomalous")
    assert page.verdict(found, "others", 0.01) == EMPTY
    assert page.verdict(None, "tiles", 0.01) == EMPTY
    assert page.fitting(found, "tiles", found.photo)[1] != None, "it still fits"  # noqa: E711  # Gradio's skip
    for product, photo in (("others", found.photo), ("tiles", "another.png"), ("tiles", None)):
        assert page.fitting(found, product, photo) == (None, None, 0.5, EMPTY)
    page.enroll("tiles", [str(good[2])])  # a photo more
    assert page.verdict(found, "tiles", 0.01) == CHANGED
    page.remove("tiles")
    assert page.verdict(found, "tiles", 0.01) == CHANGED
    assert page.enroll("tu\u0308r", [str(good[0])])[2].value == "t\u00fcr", "as macOS takes it apart"
    assert "2 photos" in page.enroll("tu\u0308r", [str(good[1])])[0]


def test_the_depth_of_photos_can_be_given(page: Page, tmp_path: Path) -> None:
    """That of files which do not say it; kept for the photos that are added."""
    photos = [tmp_path / f"{number}.png" for number in range(2)]
    for photo in photos:
        Image.fromarray(np.random.default_rng(0).integers(0, 4096, (64, 64), dtype=np.uint16)).save(photo)
    with pytest.raises(gradio.Error, match="more than 8 bits a channel"):
        page.enroll("deep", [str(photos[0])])
    with pytest.raises(gradio.Error, match="bit_depth='many' must be"):
        page.enroll("deep", [str(photos[0])], 1, "many")  # type: ignore[arg-type]  # whatever a client sends
    page.enroll("deep", [str(photos[0])], 1, 12)
    page.enroll("deep", [str(photos[1])])
    assert page.inferencer.bank("deep").bit_depth == 12


def test_what_is_refused_is_said_in_its_place(page: Page, good: list[Path], tmp_path: Path) -> None:
    """No overlay over the list of products, and nothing left of an earlier inspection."""
    (tmp_path / "uploads").mkdir()
    broken = tmp_path / "uploads" / "broken[31m_x_.png"
    broken.write_bytes(good[0].read_bytes()[:100])
    skip = gradio.skip()
    enroll = page.in_place(page.enroll, [REFUSED, skip, skip, skip])
    message, *others = enroll("tiles", [{"path": str(broken)}], 1)
    assert message.startswith(REFUSED)
    assert others == [skip, skip, skip]
    assert r"broken\[31m\_x\_.png: unreadable" in message
    assert str(tmp_path) not in message
    picture, found, verdict = page.in_place(page.inspect, [None, None, REFUSED])({"path": str(broken)}, "tiles", 0.5)
    assert (picture, found) == (None, None)
    assert "not enrolled" in verdict
    page.enroll("tiles", [str(good[0])])
    broken.unlink()
    _, _, verdict = page.in_place(page.inspect, [None, None, REFUSED])({"path": str(broken)}, "tiles", 0.5)
    assert verdict == f"{REFUSED} This file is no longer here. Drop it again."
    _, _, verdict = page.in_place(page.inspect, [None, None, REFUSED])(str(good[0]), "tiles", "much")
    assert verdict.startswith(REFUSED)


def test_the_actions_refuse_what_is_not_a_photo(page: Page, tmp_path: Path) -> None:
    fake = tmp_path / "photo.png"
    fake.write_text("<script>")
    for action in (
        lambda: page.enroll("tiles", [str(fake)]),
        lambda: page.enroll("tiles", None),
        lambda: page.enroll("tiles", [str(fake)] * (MOST_FILES + 1)),
        lambda: page.enroll("..", [str(fake)]),
        lambda: page.inspect(str(fake), "tiles", 0.5),
        lambda: page.remove("tiles"),
        lambda: page.keep_threshold("tiles", 0.5),
    ):
        with pytest.raises(gradio.Error):
            action()
    assert page.products() == []
    assert fake.exists()


def test_messages_tell_no_folders(page: Page, bundle: Path, good: list[Path], tmp_path: Path) -> None:
    page.enroll("tiles", [str(good[0])])
    page.inferencer.banks.joinpath("\x1b[31mred.safetensors").write_bytes(b"nothing")
    page.inferencer.banks.joinpath("cut.safetensors").write_bytes(b"nothing")
    shown = str(page.products())
    assert "cut.safetensors is truncated" in shown
    assert str(tmp_path) not in shown
    assert r"\x1b[31mred" in page.products()[0][0]
    (tmp_path / "a file").touch()
    page.inferencer = ResADInferencer(bundle, banks=tmp_path / "a file" / "banks")
    with pytest.raises(gradio.Error, match="cannot be written") as refused:
        page.enroll("pill", [str(good[0])])
    assert "/" not in refused.value.message
    assert without_folders("/srv/my photos/a/x.png: no such file", [Path("/srv/my photos")]) == "x.png: no such file"
    assert without_folders("'../x' of 8 / 9, 1/2", [Path()]) == "'../x' of 8 / 9, 1/2"


def test_nothing_shown_does_more_than_be_read() -> None:
    assert printable("a\x1b[2J\n\u202eb\udce9\u009b ä 部品.png") == r"a\x1b[2J\n\u202eb\udce9\x9b ä 部品.png"
    assert as_markdown("![x](http://a)<b>_i_") == r"\!\[x\](http://a)&lt;b&gt;\_i\_"


def test_the_command_prints_no_control_characters(
    bundle: Path, good: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from anomalib_resad.cli import main  # noqa: PLC0415

    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "\x1b[31m\x07\nred.png").write_bytes(good[0].read_bytes())
    (folder / "\x1b[2Jcut.png").write_bytes(good[1].read_bytes()[:99])
    common = ["--bundle", str(bundle), "--banks", str(tmp_path / "banks"), "--product", "tiles"]
    one = next(folder.glob("*red.png"))
    for arguments in (
        ["enroll", *common, "--photos", str(one)],
        ["enroll", *common, "--photos", str(folder), "--mode", "replace"],
        ["predict", *common, "--photos", str(folder), "--output", str(tmp_path / "found")],
    ):
        monkeypatch.setattr("sys.argv", ["resad", *arguments])
        with pytest.raises(SystemExit) if "replace" in arguments or "predict" in arguments else nullcontext():
            main()
        printed = "".join(capfd.readouterr())
        assert "\x1b[31m\x07" not in printed
        assert "\x1b[2J" not in printed
        assert "x1b" in printed


# -- files ------------------------------------------------------------------------------------------------------------


def test_files_go_when_they_are_old_or_too_many(tmp_path: Path) -> None:
    def fill(count: int, size: int) -> None:
        for number in range(count):
            path = tmp_path / f"{number}" / "x.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(bytes(size))
            os.utime(path, (time.time() - number,) * 2)

    def left() -> list[int]:
        return sorted(int(path.parent.name) for path in files_in(tmp_path))

    folder = Uploads(tmp_path, 1000)
    fill(9, 200)
    folder.tidy()
    assert left() == [0, 1, 2, 3, 4]
    fill(MOST_KEPT + 5, 1)
    folder.tidy()
    assert left() == list(range(MOST_KEPT))
    for number in (0, 1):
        os.utime(tmp_path / str(number) / "x.png", (time.time() - KEPT_SECONDS - 9,) * 2)
    folder.tidy()
    assert left() == list(range(2, MOST_KEPT))
    for old in tmp_path.iterdir():
        os.utime(old, (time.time() - KEPT_SECONDS - 9,) * 2)
    folder.tidy()
    assert not (tmp_path / "0").exists()
    assert (tmp_path / "2").exists()


def test_files_of_others_are_never_removed(page: Page, good: list[Path], tmp_path: Path) -> None:
    mine = [tmp_path / photo.name for photo in good[:3]]
    for path, photo in zip(mine, good, strict=False):
        path.write_bytes(photo.read_bytes())
    page.enroll("tiles", [str(path) for path in mine[:2]])
    found = page.inspect(str(mine[0]), "tiles", 0.5)[1]
    page.inspect(str(mine[2]), "tiles", 0.5, found)
    assert all(path.exists() for path in mine)


def test_the_picture_is_as_small_as_it_is_shown(page: Page, good: list[Path], tmp_path: Path) -> None:
    page.enroll("tiles", [str(good[0])])
    Image.fromarray(np.zeros((300, 2 * LONGEST_SHOWN, 3), np.uint8)).save(tmp_path / "wide.png")
    with Image.open(page.inspect(str(tmp_path / "wide.png"), "tiles", 0.5)[0]) as picture:
        assert picture.size == (LONGEST_SHOWN, 150)
    with Image.open(page.inspect(str(good[0]), "tiles", 0.5)[0]) as picture, Image.open(good[0]) as photo:
        assert picture.size == photo.size


# -- requests ---------------------------------------------------------------------------------------------------------


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
    serve: Callable[..., Any], page: Page, good: list[Path], uploads: Path, header: str, value: str
) -> None:
    page.enroll("tiles", [str(good[0])])
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
    assert page.inferencer.products == ["tiles"]
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
    serve: Callable[..., Any], page: Page, good: list[Path], uploads: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page.enroll("tiles", [str(good[0])])
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
    assert page.inferencer.products == ["tiles"]
    assert len(files_in(uploads)) == 2, "nothing was copied or loaded"
    for path in ("process_recording", "proxy=http://127.0.0.1", "file=http://127.0.0.1/x", "file=HTTPS://127.0.0.1/x"):
        assert client.get(f"/gradio_api/{path}").status_code == 404
    assert client.post("/gradio_api/process_recording", files=[("video", ("a.mp4", b"x"))]).status_code == 404
    assert client.post("/gradio_api/run/remove", json={"data": ["tiles"]}).status_code == 404, "past the queue"
    capfd.readouterr()


def test_a_huge_picture_is_refused_by_its_header(serve: Callable[..., Any], page: Page, good: list[Path]) -> None:
    page.enroll("tiles", [str(good[0])])
    client = serve()
    huge = bytearray(good[0].read_bytes())
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    photo = good[0].parent / "unused.png"
    answer = client.post("/gradio_api/upload", files=[("files", (photo.name, bytes(huge)))])
    _, _, verdict = call(client, "inspect", named(answer.json()[0]), "tiles", 0.5)
    assert verdict.startswith(REFUSED)
    assert "unused.png: " in verdict
