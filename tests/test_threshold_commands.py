# SPDX-License-Identifier: Apache-2.0

"""The commands that set a threshold on the device, and check it on later photos."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from anomalib_resad import cli
from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.deploy.bundle import Scale
from anomalib_resad.deploy.results import map_of
from tests.test_edge_thresholds import knowing


class Device:
    """A bundle with a folder of banks, and the command."""

    def __init__(self, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.bundle, self.monkeypatch, self.capsys = bundle, monkeypatch, capsys
        monkeypatch.setattr(cli.signal, "signal", lambda *_: None)

    def __call__(self, verb: str, *arguments: object, status: int = 0) -> str:
        words = ["resad", verb, "--bundle", self.bundle, *arguments]
        self.monkeypatch.setattr(sys, "argv", [str(each) for each in words])
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = " ".join("".join(self.capsys.readouterr()).split())
        assert code == status, said
        return said


@pytest.fixture
def device(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Device:
    return Device(knowing(bundle, tmp_path / "bundle"), monkeypatch, capsys)


def test_thresholds_as_commands(device: Device, good: list[Path], tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    for path in good[:2]:
        shutil.copy(path, tmp_path / "good")
    one, both = (("--product", "tiles", "--photos", each) for each in (good[0], tmp_path / "good"))
    assert "the model's threshold" in device("enroll", *one)
    assert "until a second photo is there" in device("threshold", "--product", "tiles")
    said = device("enroll", *both, "--mode", "replace")
    assert "for a false-alarm rate of 5 %; 2 photos make it 95 % sure that at most" in said
    assert "false_alarm_rate=0.1" in device("enroll", *both, "--mode", "add", "--false_alarm_rate", "0.1", status=2), (
        "which is kept"
    )
    shown = device("threshold", "--product", "tiles")
    assert "Its 2 photos score" in shown
    assert shown.split("for a")[0] in said
    assert "for a false-alarm rate of 1 %" in device("threshold", "--product", "tiles", "--rate", "0.01")
    assert "its own threshold 1.7." in device("threshold", "--product", "tiles", "--score", "1.7")
    assert "the model's threshold" in device("threshold", "--product", "tiles", "--model")
    assert "several thresholds" in device("threshold", "--product", "tiles", "--rate", "0.1", "--model", status=2)
    assert "must be a share" in device("threshold", "--product", "tiles", "--rate", "5", status=2)
    assert "the model's threshold" in device("enroll", *both, "--mode", "replace"), "as it was chosen"
    assert "fewer than 500 pixels are left out" in device("threshold", "--product", "tiles", "--min_area", "500")
    assert "min_area=-1 must be a number of pixels" in device(
        "threshold", "--product", "tiles", "--min_area", "-1", status=2
    )
    device("enroll", *both, "--mode", "replace", "--min_area", "40")
    assert "fewer than 40 pixels" in device("threshold", "--product", "tiles")
    assert "min_area=4" in device("enroll", *both, "--mode", "add", "--min_area", "4", status=2)
    device("products", "--remove", "tiles")
    assert "the model's threshold" in device("enroll", *both, "--false_alarm_rate", "null")


def test_check_counts_and_adds(device: Device, good: list[Path], tmp_path: Path) -> None:
    inferencer = ResADInferencer(device.bundle)
    inferencer.enroll("tiles", good[:2])
    later = tmp_path / "later"
    (later / "deep").mkdir(parents=True)
    for number, path in enumerate(good):
        shutil.copy(path, later / "deep" / f"{number}.png")
    shutil.copy(good[4], later / "again.png")
    raw = {f"deep/{number}.png": inferencer.predict(path, "tiles").raw_score for number, path in enumerate(good)}
    raw = dict(sorted(raw.items(), key=lambda pair: pair[1])[2:])  # without the two that are enrolled
    limit = sorted(raw.values())[1]
    inferencer.set_threshold("tiles", limit)
    common = ("check", "--product", "tiles", "--photos", later)
    said = device(*common, "--output", tmp_path / "found")
    assert "2 of 4 good photos would alarm; with 95 % confidence between 6.8 and 93 % of such photos" in said
    assert "3 photos were left out" in said
    assert "add them with --add" in said
    alarms = {name for name, score in raw.items() if score > limit}
    assert len(alarms) == 2
    for name in raw:
        assert (name in said.replace("again.png", "deep/4.png")) == (name in alarms)
    assert len(list((tmp_path / "found").rglob("*.png"))) == 4
    assert all(map_of(tmp_path / "found", name).is_file() for name in raw if name != "deep/4.png")
    (later / "broken.png").write_bytes(b"none")
    said = device(*common, "--add", status=1)
    assert "They were added: 4 photos" in said
    assert "broken.png: unreadable" in said
    assert "0 of 2 good photos would alarm; with 95 % confidence between 0 and 84 %" in device(*common, status=1)


def test_check_says_what_is_missing(device: Device, good: list[Path]) -> None:
    inferencer = ResADInferencer(device.bundle)
    inferencer.enroll("tiles", good[:2])
    common = ("check", "--product", "tiles", "--photos")
    assert "All 1 photos" in device(*common, good[0], status=2)
    assert "'pill' is not enrolled" in device("check", "--product", "pill", "--photos", good[0], status=2)
    inferencer.set_threshold("tiles", None)
    replace(inferencer.manifest, score=Scale(None, None, None)).write(device.bundle)
    assert "has no threshold that a photo could exceed" in device(*common, good[3], status=2)
