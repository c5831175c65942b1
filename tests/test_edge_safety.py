# SPDX-License-Identifier: Apache-2.0

"""The edge among others: several writers, renamed and altered files, numbers that cannot be, options that clash."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_resad.deploy import BankError, BundleError, ResADInferencer
from anomalib_resad.deploy.bank import Bank
from anomalib_resad.enrollment.thresholds import denormalize, normalize
from tests.test_edge_commands import resad

ADD = """
import sys
from anomalib_resad.deploy import ResADInferencer
inferencer = ResADInferencer(sys.argv[1], banks=sys.argv[2], threads=1)
for photo in sys.argv[3:]:
    inferencer.add("tiles", [photo])
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Small different photos."""
    folder, generator = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    for number in range(17):
        pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return sorted(folder.iterdir())


def test_nothing_is_lost_where_several_add_at_once(bundle: Path, tmp_path: Path, many: list[Path]) -> None:
    """Two processes, and four threads of this one, of one inferencer and of others."""
    inferencer = ResADInferencer(bundle, banks=tmp_path, threads=1)
    inferencer.enroll("tiles", many[:1], rotations=1)
    (tmp_path / ".tiles.safetensors.dead.part").write_bytes(b"of a writer that was killed")
    commands = [[sys.executable, "-c", ADD, bundle, tmp_path, *many[first : first + 4]] for first in (1, 5)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    others = [inferencer, inferencer, *(ResADInferencer(bundle, banks=tmp_path, threads=1) for _ in range(2))]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda pair: pair[0].add("tiles", [pair[1]]), zip(others * 2, many[9:], strict=True)))
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    bank = inferencer.bank("tiles")
    assert {each.name for each in bank.references} == {path.name for path in many}
    assert not list(tmp_path.glob(".*.part"))
    for name, array in inferencer.enroll("at once", many, rotations=1).arrays.items():
        assert np.array_equal(array, bank.arrays[name])


def test_the_second_of_two_new_enrollments_is_refused(bundle: Path, tmp_path: Path, many: list[Path]) -> None:
    """Also where both began before either ended."""
    inferencers = [ResADInferencer(bundle, banks=tmp_path, threads=1) for _ in range(3)]

    def enroll(pair: tuple[ResADInferencer, Path]) -> str:
        try:
            pair[0].enroll("tiles", [pair[1]], rotations=1)
        except ValueError as error:
            return str(error)
        return "done"

    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(enroll, zip(inferencers, many[:3], strict=True)))
    assert said.count("done") == 1
    assert sum("enrolled already" in each for each in said) == 2


def test_renamed_banks_are_refused(inferencer: ResADInferencer, good: list[Path]) -> None:
    for name, photo in (("one", good[0]), ("other", good[1])):
        inferencer.enroll(name, [photo])
    one, other = (inferencer.banks / f"{name}.safetensors" for name in ("one", "other"))
    shutil.copy(one, one.with_name("kept"))
    other.replace(one)
    with pytest.raises(BankError, match=r"'one' is that of 'other': its file was renamed"):
        inferencer.predict(good[0], "one")


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), 1e39, "high"])
def test_thresholds_that_cannot_be_are_refused_where_they_enter(
    inferencer: ResADInferencer, good: list[Path], threshold: object
) -> None:
    bank = inferencer.enroll("tiles", good[:1])
    with pytest.raises(ValueError, match="threshold="):
        inferencer.set_threshold("tiles", threshold)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold="):
        inferencer.enroll("pill", good[:1], threshold=threshold)  # type: ignore[arg-type]
    assert inferencer.products == ["tiles"]
    Bank("tiles", bank.encoder, bank.references, bank.arrays, threshold).save(inferencer.banks / "tiles.safetensors")  # type: ignore[arg-type]
    with pytest.raises(BankError, match=r"threshold=.*Enroll again"):
        inferencer.predict(good[0], "tiles")


def test_other_numbers_that_cannot_be(bundle: Path, inferencer: ResADInferencer, good: list[Path]) -> None:
    for name in ("threads", "most_loaded"):
        for wrong in (-1, 0, 1.5, "2", True, float("nan"), [1]):
            with pytest.raises(ValueError, match=re.escape(f"{name}={wrong!r} must be a whole number of at least 1")):
                ResADInferencer(bundle, **{name: wrong})
    ResADInferencer(bundle, threads=np.int64(1), most_loaded=np.int32(1))
    for device in ("TPU", "", "CPU2", "cpu"):
        with pytest.raises(ValueError, match=f"device='{device}' is no OpenVINO device of this machine, which has CPU"):
            ResADInferencer(bundle, device=device)
    ResADInferencer(bundle, device="AUTO:CPU")
    for value in (0.0, 1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            denormalize(value, 0.5, 0.0, 1.0)
    for name in ("max_patches", "false_alarm_rate", "rotations", "threshold"):
        for value in ("2", True, float("nan"), [1]):
            with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
                inferencer.enroll("tiles", good[:1], **{name: value})
    bank = inferencer.enroll("tiles", good[:1], max_patches=np.int64(9), rotations=np.int64(1))
    for threshold in (np.float32(0.5), np.float64(0.5), np.int64(1), 1):
        assert inferencer.set_threshold("tiles", threshold).threshold == float(threshold)
        assert inferencer.bank("tiles").threshold == float(threshold)
    with pytest.raises(ValueError, match="threshold=True must be a finite number"):
        inferencer.set_threshold("tiles", True)
    for rate in ("0.05", True, [0.05]):
        with pytest.raises(ValueError, match="must be a share of good photos"):
            inferencer.calibrate("tiles", rate)
    for wrong in ({"rotations": "auto"}, {"max_patches": 0}, {"max_patches": "all"}):
        Bank("tiles", bank.encoder, bank.references, bank.arrays, **wrong).save(inferencer.banks / "tiles.safetensors")
        with pytest.raises(BankError, match="no numbers"):
            inferencer.bank("tiles")


def test_scores_that_are_no_numbers_never_come_out(
    inferencer: ResADInferencer, good: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    inferencer.enroll("tiles", good[:1], rotations=1)
    for value in (np.nan, np.inf):
        outputs = [np.full(1, value, np.float32), np.zeros((1, 1, 4, 4), np.float32)]
        monkeypatch.setattr(inferencer, "encode", lambda pixels, *_: [pixels])
        monkeypatch.setattr(inferencer, "_run", lambda *_, given=outputs: given)
        with pytest.raises(BundleError, match="scores of NaN or infinity"):
            inferencer.predict(good[0], "tiles")


def test_normalizing_never_overflows() -> None:
    """However far a score is from the threshold, and however narrow the range is."""
    for width in (np.float32(1e-30), np.float32(2.0)):
        for threshold, expected in ((-1e30, 1), (1e30, 0)):
            assert normalize(np.float32(0.3), np.float32(threshold), np.float32(0), width) == expected


def test_every_change_of_a_manifest_is_noticed(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    path = copy / "manifest.json"
    content = json.loads(path.read_text())
    for key, value in (("backbone", "resnet19"), ("label_above", 0.4), ("rotations", 8), ("keyed", True)):
        path.write_text(json.dumps(content | {key: value}))
        with pytest.raises(BundleError, match="checksum differs"):
            ResADInferencer(copy)
    del content["checksum"]
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match="checksum differs"):
        ResADInferencer(copy)
    del content["weights"], content["folder"]  # as 0.1.0 wrote it
    for text, problem in (
        (json.dumps(content)[:-1] + ', "keyed": true}', "stands there twice"),
        (json.dumps(content | {"score": {"threshold": float("nan"), "low": 0, "high": 1}}), "NaN is no number"),
        (json.dumps(content | {"score": {"threshold": 0.5, "low": 2, "high": 1}}), "no range"),
        (json.dumps(content | {"score": {"threshold": 1e39, "low": 0, "high": 1}}), "no range"),
        (json.dumps(content).replace('"label_above": 0.5', '"label_above": 1e999'), "1e999 is no number"),
        (json.dumps(content | {"label_above": 2}), "label_above"),
        (json.dumps(content | {"searched": 0}), "searched"),
        (json.dumps(content | {"row_multiple": 0}), "number"),
        (json.dumps(content | {"image_size": [64, "64"]}), "number"),
        (json.dumps(content | {"keyed": 1}), "keyed"),
        (json.dumps(content | {"backbone": None}), "text"),
        (json.dumps(content | {"files": {}}), "files"),
        ("[" * 100_000, "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(BundleError, match=problem):
            ResADInferencer(copy)
    path.write_text(json.dumps(content, indent=8))
    known = ResADInferencer(bundle).manifest
    assert ResADInferencer(copy).manifest == replace(known, weights="unknown")


def test_what_was_checked_is_what_runs(bundle: Path, tmp_path: Path, good: list[Path], new: list[Path]) -> None:
    """A bundle that is replaced under a running process changes no number of it."""
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    running, other = (ResADInferencer(each, banks=tmp_path / "banks") for each in (copy, bundle))
    for file in ("encoder.bin", "detector.bin", "encoder.xml", "detector.xml"):
        (copy / file).write_bytes(b"")
    running.enroll("tiles", good[:2])
    assert running.predict(new[0], "tiles").score == other.predict(new[0], "tiles").score


def test_a_bundle_that_is_replaced_is_noticed(bundle: Path, tmp_path: Path, good: list[Path]) -> None:
    """The copy has the date and the size of the other; going on would give the numbers of a model that is gone."""
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    path, other = copy / "manifest.json", tmp_path / "other.json"
    running = ResADInferencer(copy, banks=tmp_path / "banks")
    running.enroll("tiles", good[:2], rotations=1)
    score = running.predict(good[3], "tiles").score
    path.touch()
    assert running.predict(good[3], "tiles").score == score, "its date alone says nothing"
    shutil.copy2(path, other)
    replace(running.manifest, label_above=0.6).write(copy)
    assert path.stat().st_size == other.stat().st_size
    shutil.copystat(other, path)
    for act in (
        lambda: running.predict(good[3], "tiles"),
        lambda: running.add("tiles", good[2:3]),
        lambda: running.set_threshold("tiles", 1.0),
    ):
        with pytest.raises(BundleError, match=r"was replaced after it was opened\. Open it again"):
            act()
    assert ResADInferencer(copy, banks=tmp_path / "banks").manifest.label_above == 0.6
    path.unlink()
    running.predict(good[3], "tiles")  # nothing says that there is another one


def test_equal_banks_are_equal_files(bundle: Path, tmp_path: Path, good: list[Path]) -> None:
    """In any order, and in another process."""
    code = """
import sys
from anomalib_resad.deploy import ResADInferencer
ResADInferencer(sys.argv[1], banks=sys.argv[2]).enroll("tiles", sys.argv[3:], rotations=1)
"""
    command = [sys.executable, "-c", code, bundle, tmp_path / "other", *reversed(good[:3])]
    subprocess.run([str(each) for each in command], check=True, timeout=120)
    ResADInferencer(bundle, banks=tmp_path / "one").enroll("tiles", good[:3], rotations=1)
    one, other = ((tmp_path / each / "tiles.safetensors").read_bytes() for each in ("one", "other"))
    assert one == other
    assert one.count(b'"resad":') == 1, "safetensors orders several entries at random"


def test_stale_temporary_files_are_removed_by_age(inferencer: ResADInferencer, good: list[Path]) -> None:
    inferencer.enroll("a", good[:1], rotations=1)
    banks = inferencer.banks
    live = banks / f".b.safetensors.{'0' * 32}.part"
    longer = banks / f".a.safetensors.c.safetensors.{'0' * 32}.part"  # of the product a.safetensors.c
    old = banks / f".b.safetensors.{'1' * 32}.part"
    foreign = banks / ".others.part"
    for path in (live, longer, old, foreign):
        path.touch()
    for path in (old, foreign):
        os.utime(path, (0, 0))
    inferencer.set_threshold("a", 1.0)
    assert {path for path in (live, longer, old, foreign) if path.exists()} == {live, longer, foreign}


def test_replacing_keeps_the_threshold_of_the_product(
    inferencer: ResADInferencer, good: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    inferencer.enroll("tiles", good[:1], threshold=1.25, rotations=1)
    assert inferencer.enroll("tiles", good[1:2], replace_existing=True, rotations=1).threshold == 1.25
    assert inferencer.enroll("tiles", good[1:2], 2.5, replace_existing=True, rotations=1).threshold == 2.5
    assert inferencer.enroll("new", good[1:2], replace_existing=True, rotations=1).threshold is None
    path = inferencer.banks / "tiles.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert inferencer.enroll("tiles", good[:1], replace_existing=True, rotations=1).threshold is None
    assert "If 'tiles' had a threshold of its own, set it again" in caplog.text


def test_photos_of_one_name_are_told_apart(inferencer: ResADInferencer, good: list[Path], tmp_path: Path) -> None:
    for number, photo in enumerate(good[:2]):
        (tmp_path / str(number)).mkdir()
        shutil.copy(photo, tmp_path / str(number) / "a.png")
    bank = inferencer.enroll("tiles", [tmp_path / "0" / "a.png", tmp_path / "1" / "a.png", good[2]])
    with pytest.raises(ValueError, match=r"'a\.png' names several photos of 'tiles': a\.png \([0-9a-f]{8}\)"):
        inferencer.remove("tiles", "a.png")
    first = next(each for each in bank.references if each.name == "a.png")
    inferencer.remove("tiles", first.sha256[:8])
    assert first not in inferencer.bank("tiles").references
    assert len(inferencer.bank("tiles").references) == 2


def test_options_that_would_be_ignored_are_refused(inferencer: ResADInferencer, bundle: Path, good: list[Path]) -> None:
    inferencer.enroll("tiles", good[:1])
    command = ("enroll", "--bundle", bundle, "--banks", inferencer.banks, "--product", "tiles", "--photos", good[1])
    for option, value in (("--threshold", 1.0), ("--max_patches", 5), ("--rotations", 8)):
        said = resad(*command, "--mode", "add", option, value, status=2)
        assert f"{option[2:]}={value}" in said
    assert len(inferencer.bank("tiles").references) == 1
