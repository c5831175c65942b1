# SPDX-License-Identifier: Apache-2.0

"""Dockerfile and compose file of the edge, as far as they can be tried without Docker.

The wheel that the image installs is built and installed by test_edge_wheel.py.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
RESAD = [sys.executable, "-m", "anomalib_resad.cli"]
TOKEN = "0" * 16


def instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile and their arguments, continued lines joined."""
    text = (ROOT / "edge" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "edge" / "compose.yaml").read_text())
    return found


def last(name: str) -> str:
    return [rest for each, rest in instructions() if each == name][-1]


def placed(command: list[str], places: dict[str, str]) -> list[str]:
    """A command of a container with the places of this machine; variables have their default."""
    plain = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", each) for each in command]
    return [places.get(each, each) for each in plain]


def test_what_is_copied_is_there_and_nobody_is_root() -> None:
    copied = [rest.split()[0] for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")]
    assert copied
    assert all((ROOT / each).exists() for each in copied)
    names = [name for name, _ in instructions()]
    assert last("USER") == "10001"
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")
    shell = "".join(rest for name, rest in instructions() if name == "RUN")
    assert "[api,mqtt]" in shell
    assert "torch" not in shell


def test_the_container_answers_its_health_check(bundle: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = {"/bundle": str(bundle), "/banks": str(tmp_path / "banks"), "7860": port, "0.0.0.0": "127.0.0.1"}  # noqa: S104
    environment = os.environ | {"RESAD_TOKEN": TOKEN}
    check = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    check = [sys.executable, "-c", check[2].replace(":7860", f":{port}")]
    command = [*RESAD, *placed(json.loads(last("CMD")), places)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            for _ in range(120):
                done = subprocess.run(check, env=environment, capture_output=True, check=False, timeout=30)
                if done.returncode == 0 or process.poll() is not None:
                    break
                time.sleep(0.5)
            assert done.returncode == 0, done.stderr.decode()
            wrong = environment | {"RESAD_TOKEN": "1" * 16}
            assert subprocess.run(check, env=wrong, capture_output=True, check=False, timeout=30).returncode != 0
        finally:
            process.terminate()
    assert process.returncode == 0, "it ends as it should"


@pytest.mark.parametrize("name", ["api", "watch"])
def test_commands_of_the_services_are_taken(name: str, bundle: Path, tmp_path: Path) -> None:
    places = {"/bundle": str(bundle), "/banks": str(tmp_path), "/photos": str(tmp_path), "/found": str(tmp_path)}
    verb, *options = placed(services()["services"][name]["command"], places)
    command = [*RESAD, verb, *options, "--print_config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["bundle"] == str(bundle)


def test_services_use_the_volumes_that_are_declared() -> None:
    compose = services()
    for name, service in compose["services"].items():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        mounted = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", each).split(":") for each in service["volumes"]]
        assert {source for source, *_ in mounted if "/" not in source} <= compose["volumes"].keys()
        targets = {target for _, target, *_ in mounted}
        command = service["command"]
        assert {each for each in command if each.startswith("/")} <= targets, name
        assert ["ro"] in [rest for _, target, *rest in mounted if target == "/bundle"]
    assert (ROOT / "edge" / compose["x-resad"]["build"]["context"]).resolve() == ROOT
