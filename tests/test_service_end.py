# SPDX-License-Identifier: Apache-2.0

"""The server's process: its socket, and its end in the middle of requests, each of which has an answer."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra [api] is not installed")
pytest.importorskip("prometheus_client", reason="the extra [api] is not installed")
from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.deploy.service import _listening

# In processes of their own: that of the tests may connect to nothing. Each photo takes a quarter of a second.
SERVICE = """
import sys, time
from anomalib_resad.cli import main
from anomalib_resad.deploy import ResADInferencer
inspect = ResADInferencer.inspect
def slow(*given):
    time.sleep(0.25)
    return inspect(*given)
ResADInferencer.inspect = slow
sys.argv = ["resad", "serve", "--page", "false", *sys.argv[1:]]
main()
"""
CLIENTS = """
import base64, http.client, json, os, signal, sys, threading, time
address, pid, clients = sys.argv[1], int(sys.argv[2]), 4
photo = {"content": base64.b64encode(open(sys.argv[3], "rb").read()).decode()}
body = json.dumps({"photos": [photo] * 8})
def ask(connection):
    connection.request("POST", "/v1/products/tiles/inspect", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = json.loads(answer.read())
    return answer.status, sum("score" in each for each in content.get("results", []))
def get(connection, path):
    connection.request("GET", path)
    return connection.getresponse().read().decode()
answers, kept = [], http.client.HTTPConnection(address, timeout=60)
get(kept, "/v1/health")
held = [http.client.HTTPConnection(address, timeout=60) for _ in range(clients)]
threads = [threading.Thread(target=lambda each=each: answers.append(ask(each))) for each in held]
for thread in threads:
    thread.start()
while f"resad_queue {clients}.0" not in get(kept, "/metrics"):
    time.sleep(0.01)
os.kill(pid, signal.SIGTERM)
time.sleep(0.5)
late = [ask(kept)[0]]
try:
    http.client.HTTPConnection(address, timeout=60).connect()
except ConnectionRefusedError:
    late.append("refused")
for thread in threads:
    thread.join()
print(json.dumps({"answers": answers, "late": late}))
"""


def test_held_requests_are_answered(bundle: Path, good: list[Path], tmp_path: Path) -> None:
    """Two are computed, two wait: 4 seconds of work, which is longer than connections are kept for their own sake."""
    ResADInferencer(bundle, banks=tmp_path / "banks").enroll("tiles", good[:1], rotations=1)
    command = [sys.executable, "-u", "-c", SERVICE, f"--bundle={bundle}", f"--banks={tmp_path / 'banks'}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = next(found[1] for line in process.stdout if (found := re.search(r"http://([\d.:]+)", line)))
            given = [address, str(process.pid), str(good[1])]
            asked = subprocess.run(
                [sys.executable, "-c", CLIENTS, *given], capture_output=True, text=True, check=False, timeout=120
            )
            assert asked.returncode == 0, asked.stderr
            assert process.wait(timeout=30) == 0
        finally:
            if process.poll() is None:
                process.kill()
    told = json.loads(asked.stdout)
    assert told["answers"] == [[200, 8]] * 4
    assert told["late"] == [503, "refused"]


@pytest.mark.parametrize("port", [None, 0])
def test_answers_wait_for_no_acknowledgment(port: int | None) -> None:
    """Connections take the option over from the socket that is listened on."""
    with _listening("127.0.0.1", port) as listening:
        assert listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
