# SPDX-License-Identifier: Apache-2.0

"""`resad watch`: every photo gets one row, whatever is killed, and every row reaches who asked for it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomalib_resad.commands.watch import watch
from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.deploy.journal import Journal
from anomalib_resad.deploy.prediction import Prediction
from anomalib_resad.deploy.results import Results
from anomalib_resad.deploy.sinks import Sender, mqtt_sink, webhook_sink
from anomalib_resad.deploy.watching import FolderWatch
from anomalib_resad.enrollment.files import LINES, TABLE
from anomalib_resad.enrollment.photos import PhotoError


def rows_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / LINES
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line] if path.exists() else []


def wait_for(done: Callable[[], object], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@contextmanager
def watching(*options: object) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process of its own, which is killed at the end if it still runs."""
    command = [sys.executable, "-m", "anomalib_resad.cli", "watch", *(str(each) for each in options)]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def test_each_photo_once_though_it_is_killed(bundle: Path, good: list[Path], new: list[Path], tmp_path: Path) -> None:
    inferencer = ResADInferencer(bundle, banks=tmp_path / "banks")
    inferencer.enroll("tiles", good[:2], rotations=1)
    folder, output = tmp_path / "in", tmp_path / "found"
    (folder / "line 1").mkdir(parents=True)
    common = ("--bundle", bundle, "--banks", tmp_path / "banks", "--product", "tiles", "--folder", folder)
    options = (*common, "--output", output, "--settle", "0.1", "--patience", "0.5", "--maps", "all")
    names: list[str] = []
    for run in range(3):
        for index in range(12):
            names.append(f"line 1/{run}_{index}.png")
            shutil.copy(new[index % len(new)], folder / names[-1])
        with watching(*options) as process:
            wait_for(lambda least=12 * run + 4: len(rows_of_whole(output)) >= least, "rows")
            process.kill()
        with (output / LINES).open("ab") as file:
            file.write(b'{"photo": "line 1/half')
    (folder / "broken.png").write_bytes(new[0].read_bytes()[:200])
    with watching(*options) as process:
        wait_for(lambda: len(rows_of_whole(output)) == len(names) + 1, "all rows")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    rows = rows_of(output)
    assert sorted(row["photo"] for row in rows) == sorted([*names, "broken.png"])
    for row in rows:
        if row["photo"] == "broken.png":
            assert (row["score"], row["label"]) == (None, None)
            assert "unreadable" in row["error"]
        else:
            found = inferencer.predict(folder / row["photo"], "tiles")
            assert (row["score"], row["raw_score"]) == (found.score, found.raw_score), "exactly"
            assert row["label"] == ("anomalous" if found.label else "good")
            assert (output / "maps" / f"{row['photo']}.png").exists()


def rows_of_whole(folder: Path) -> list[bytes]:
    path = folder / LINES
    return (
        [each for each in path.read_bytes().splitlines(keepends=True) if each.endswith(b"}\n")] if path.exists() else []
    )


# -- files ------------------------------------------------------------------------------------------------------------


def watcher(folder: Path, journal: Journal, seen: list[bytes]) -> FolderWatch:
    def inspect(content: bytes) -> tuple[Prediction, Any]:
        seen.append(content)
        if not content.startswith(b"photo"):
            msg = "unreadable"
            raise PhotoError(msg)
        return Prediction(0.25, False, np.zeros((4, 4), np.float32), 1.5), None

    return FolderWatch(folder, journal, inspect, lambda *_: None, settle=0.1, patience=0.4)


def test_only_complete_files_are_taken(tmp_path: Path) -> None:
    """One that is still written to, one that is hidden, one that pauses in the middle, one that is written anew."""
    folder, seen = tmp_path / "in", []
    folder.mkdir()
    (folder / ".hidden.png").write_bytes(b"photo")
    (folder / "notes.txt").write_bytes(b"photo")
    with Journal(tmp_path / "out") as journal:
        watch_it = watcher(folder, journal, seen)
        for length in range(6):
            (folder / "slow.png").write_bytes(b"photo" + b"x" * length)
            watch_it.look()
            time.sleep(0.06)
        assert seen == []
        wait_for(lambda: (watch_it.look(), len(rows_of(tmp_path / "out")))[1], "a row", 5)
        assert seen == [b"photoxxxxx"]
        (folder / "paused.png").write_bytes(b"pho")
        watch_it.look()
        time.sleep(0.15)
        watch_it.look()
        assert seen[1:] == [b"pho"], "it was looked at, and may be written further"
        (folder / "paused.png").write_bytes(b"photo 2")
        wait_for(lambda: (watch_it.look(), len(rows_of(tmp_path / "out")) == 2)[1], "a row", 5)
        (folder / "bad.png").write_bytes(b"none")
        wait_for(lambda: (watch_it.look(), len(rows_of(tmp_path / "out")) == 3)[1], "a row", 5)
        (folder / "slow.png").write_bytes(b"photo 3")
        wait_for(lambda: (watch_it.look(), len(rows_of(tmp_path / "out")) == 4)[1], "a row", 5)
        os.utime(folder / "slow.png", (0, 0))
        for _ in range(4):
            watch_it.look()
            time.sleep(0.06)
    rows = [(row["photo"], row["error"]) for row in rows_of(tmp_path / "out")]
    assert rows == [("slow.png", None), ("paused.png", None), ("bad.png", "unreadable"), ("slow.png", None)]


def test_a_journal_is_written_by_one_process_and_is_never_guessed_at(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.add({"photo": "a.png", "sha256": "0"})
        with pytest.raises(ValueError, match="Another process writes to"):
            Journal(tmp_path)
        with pytest.raises(ValueError, match="Out of range"):
            journal.add({"photo": "b.png", "sha256": "1", "score": float("nan")})
    (tmp_path / LINES).write_bytes((tmp_path / LINES).read_bytes() + b"none\n{}")
    with pytest.raises(ValueError, match=r"after 34 bytes is no row .*Nothing was changed"):
        Journal(tmp_path)
    assert (tmp_path / LINES).read_bytes().endswith(b"none\n{}")


def test_watch_and_predict_do_not_write_over_each_other(tmp_path: Path) -> None:
    with Journal(tmp_path / "watched") as journal:
        journal.add({"photo": "a.png", "sha256": "0"})
    before = journal.path.read_bytes()
    with pytest.raises(ValueError, match=r"results\.jsonl is of `resad watch`.*Choose another folder"):
        Results(tmp_path / "watched")
    assert journal.path.read_bytes() == before
    assert not (tmp_path / "watched" / TABLE).exists()
    for photos in (0, 1):
        with Results(tmp_path / "predicted") as results:
            for _ in range(photos):
                results.fail("a.png", "unreadable")
        kept = {path.name: path.read_bytes() for path in (tmp_path / "predicted").iterdir()}
        with pytest.raises(ValueError, match=r"results\.csv is of `resad predict`\. Choose another folder"):
            Journal(tmp_path / "predicted")
        assert {path.name: path.read_bytes() for path in (tmp_path / "predicted").iterdir()} == kept


def test_impossible_options_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="maps would be taken for photos"):
        watch(tmp_path, "tiles", tmp_path / "in", tmp_path / "in" / "found")
    with pytest.raises(ValueError, match=r"file:///etc/passwd: use an address that begins with http"):
        watch(tmp_path, "tiles", tmp_path / "in", tmp_path / "found", webhook="file:///etc/passwd")
    with Journal(tmp_path / "found") as journal, pytest.raises(ValueError, match="is no folder"):
        watcher(tmp_path / "none", journal, [])


# -- where rows are sent to -------------------------------------------------------------------------------------------


class Hook(BaseHTTPRequestHandler):
    """Refuses every second request."""

    taken: list[dict[str, Any]] = []  # noqa: RUF012
    asked = 0

    def do_POST(self) -> None:
        Hook.asked += 1
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204 if Hook.asked % 2 == 0 else 503)
        self.end_headers()
        if Hook.asked % 2 == 0:
            Hook.taken.append(json.loads(body))

    def log_message(self, *_: object) -> None:
        pass


SEND = """
import sys, time
from pathlib import Path
from anomalib_resad.deploy import sinks
sinks.PAUSE = 0.02
sender = sinks.Sender("hook", getattr(sinks, sys.argv[1])(sys.argv[2]), Path(sys.argv[3]))
sys.stdin.read()
sender.close()
"""


@contextmanager
def sending(kind: str, address: str, rows: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A sender in another process: this one may connect to nothing."""
    command = [sys.executable, "-c", SEND, kind, address, rows]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.communicate(timeout=30)


def test_a_webhook_gets_every_row_though_it_refuses_some(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with Journal(tmp_path) as journal:
        journal.add({"photo": "0.png", "sha256": "0"})
        address = f"http://127.0.0.1:{server.server_address[1]}/rows"
        with sending("webhook_sink", address, journal.path):
            wait_for(lambda: len(Hook.taken) == 1, "the first row")
            for index in (1, 2):
                journal.add({"photo": f"{index}.png", "sha256": str(index)})
            wait_for(lambda: len(Hook.taken) == 3, "the others")
        journal.add({"photo": "3.png", "sha256": "3"})
        with sending("webhook_sink", address, journal.path):
            wait_for(lambda: len(Hook.taken) == 4, "the one that came meanwhile")
    server.shutdown()
    assert [row["photo"] for row in Hook.taken] == [f"{index}.png" for index in range(4)], "in their order, none twice"


def test_mqtt_waits_for_the_broker(tmp_path: Path) -> None:
    pytest.importorskip("paho.mqtt.client", reason="the extra [mqtt] is not installed")
    taken: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_broker, args=(server, taken), daemon=True).start()
    with Journal(tmp_path) as journal:
        for index in range(2):
            journal.add({"photo": f"{index}.png", "sha256": str(index)})
        with sending("mqtt_sink", f"127.0.0.1:{server.getsockname()[1]}/line/tiles", journal.path):
            wait_for(lambda: len(taken) == 3, "three deliveries")
    assert [json.loads(each[each.index(b"{") :])["photo"] for each in taken] == ["0.png", "0.png", "1.png"]
    assert all(b"line/tiles" in each for each in taken)
    with pytest.raises(ValueError, match="write host:port/topic"):
        mqtt_sink("broker/topic")


def _broker(server: socket.socket, taken: list[bytes]) -> None:
    """As much of MQTT 3.1.1 as is needed; the first connection ends before the row is acknowledged."""
    while True:
        connection, _ = server.accept()
        with connection, connection.makefile("rb") as file:
            while head := file.read(1):
                size, shift = 0, 0
                while (digit := file.read(1)[0]) & 128:
                    size, shift = size | (digit & 127) << shift, shift + 7
                body = file.read(size | digit << shift)
                if head[0] >> 4 == 1:  # CONNECT
                    connection.sendall(b"\x20\x02\x00\x00")
                elif head[0] >> 4 == 3:  # PUBLISH
                    taken.append(body)
                    if len(taken) == 1:
                        break
                    at = 2 + int.from_bytes(body[:2], "big")
                    connection.sendall(b"\x40\x02" + body[at : at + 2])


def test_a_sender_knows_which_journal_it_sent(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        (tmp_path / f".{LINES}.hook").write_text("7")
        with pytest.raises(ValueError, match="Remove it, and all rows are sent again"):
            Sender("hook", webhook_sink("http://localhost/"), journal.path)
