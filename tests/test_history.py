# SPDX-License-Identifier: Apache-2.0

"""Each change of a product can be undone, whatever it was, and whenever the device stops."""

import logging
from pathlib import Path

import pytest

from anomalib_resad.deploy import BankError, ResADInferencer, bank_store
from anomalib_resad.deploy.history import FOLDER, KEPT
from tests.test_edge_commands import resad
from tests.test_threshold_commands import Device

SAID = ["enroll", "threshold", "add", "minimum area", "threshold", "remove {}", "replace", "remove"]


def content(inferencer: ResADInferencer, name: str = "tiles") -> bytes | None:
    path = inferencer.banks / f"{name}.safetensors"
    return path.read_bytes() if path.exists() else None


def test_each_change_is_undone(inferencer: ResADInferencer, good: list[Path]) -> None:
    """Each one by its number, the first enrollment and the removal too; the other product stays as it is."""
    other = inferencer.enroll("other", good[:1])
    changes = [
        lambda: inferencer.enroll("tiles", good[:2], rotations=1),
        lambda: inferencer.set_threshold("tiles", 1.7),
        lambda: inferencer.add("tiles", good[2:3]),
        lambda: inferencer.set_min_area("tiles", 20),
        lambda: inferencer.calibrate("tiles", 0.1),
        lambda: inferencer.remove("tiles", good[0].name),
        lambda: inferencer.enroll("tiles", good[3:5], replace_existing=True, rotations=1),
        lambda: inferencer.remove("tiles"),
    ]
    states = [content(inferencer)]
    for change in changes:
        change()
        states.append(content(inferencer))
    steps = inferencer.history("tiles")
    assert [each.what for each in steps] == [each.format(good[0].name) for each in SAID]
    assert [each.photos for each in steps] == [2, 2, 3, 3, 3, 2, 2, 0]
    assert steps[1].threshold == 1.7
    last = 8
    for number in (8, 7, 6, 5):
        assert inferencer.undo("tiles", number).number == number
        assert content(inferencer) == states[number - 1]
        last += 1
        undone = inferencer.history("tiles")[-1]
        assert (undone.what, undone.number) == (f"undo {number}", last)
    inferencer.predict(good[0], "tiles")
    assert content(inferencer, "other") == other.content
    assert inferencer.products == ["other", "tiles"], "the history is no product"


def test_undoing_twice_changes_nothing(inferencer: ResADInferencer, good: list[Path]) -> None:
    """Also of the first enrollment: the product goes, and comes back."""
    first = inferencer.enroll("tiles", good[:2], rotations=1)
    inferencer.undo("tiles")
    assert inferencer.products == []
    with pytest.raises(ValueError, match="'tiles' is not enrolled"):
        inferencer.predict(good[0], "tiles")
    inferencer.undo("tiles")
    assert content(inferencer) == first.content
    with pytest.raises(ValueError, match="is what it was before step 2"):
        inferencer.undo("tiles", 2)
    for nobody in ("pill", "../tiles"):
        with pytest.raises(ValueError, match=r"is not enrolled|cannot be the name"):
            inferencer.undo(nobody)
    assert sorted(path.name for path in (inferencer.banks / FOLDER).iterdir()) == ["tiles"]
    with pytest.raises(ValueError, match=r"no step 9 that could be undone; kept are 1 to 3"):
        inferencer.undo("tiles", 9)


def test_the_last_steps_are_kept(inferencer: ResADInferencer, good: list[Path]) -> None:
    inferencer.enroll("tiles", good[:1])
    for number in range(KEPT + 3):
        inferencer.set_threshold("tiles", float(number))
        inferencer.set_threshold("tiles", float(number))  # changes nothing, so it is no step
    assert [each.number for each in inferencer.history("tiles")] == list(range(5, 5 + KEPT))
    assert len(list((inferencer.banks / FOLDER / "tiles").iterdir())) == KEPT
    inferencer.undo("tiles", 5)
    assert inferencer.bank("tiles").threshold == 2.0


@pytest.mark.parametrize("when", ["record", "write", "prune"])
def test_whenever_the_device_stops(
    when: str, inferencer: ResADInferencer, good: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change that was not made is not in the history, one that was made is."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    inferencer.enroll("tiles", good[:2], rotations=1)
    before, undecided = content(inferencer), inferencer.bank("tiles").threshold
    with monkeypatch.context() as patch:
        if when == "record":
            patch.setattr("anomalib_resad.deploy.history.write_whole", stop)
        elif when == "write":
            patch.setattr(bank_store, "write_whole", stop)
        else:
            patch.setattr("anomalib_resad.deploy.history.History._prune", stop)
        with pytest.raises(KeyboardInterrupt):
            inferencer.set_threshold("tiles", 1.0)
    made = when == "prune"
    assert [each.what for each in inferencer.history("tiles")] == ["enroll", *(["threshold"] if made else [])]
    assert (content(inferencer) == before) != made
    inferencer.set_threshold("tiles", 2.0)
    assert [each.number for each in inferencer.history("tiles")] == [1, 2, *([3] if made else [])]
    inferencer.undo("tiles")
    assert inferencer.bank("tiles").threshold == (1.0 if made else undecided)


def test_a_step_that_cannot_be_used_harms_nothing(
    inferencer: ResADInferencer, good: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    inferencer.enroll("tiles", good[:1])
    inferencer.set_threshold("tiles", 1.0)
    inferencer.set_threshold("tiles", 2.0)
    folder = inferencer.banks / FOLDER / "tiles"
    (folder / ".00000009.step.dead.part").write_bytes(b"of a writer that was killed")
    (folder / "00000002.step").write_bytes(b"none")
    third = folder / "00000003.step"
    third.write_bytes(third.read_bytes()[:-5] + b"other")
    now = content(inferencer)
    with caplog.at_level(logging.WARNING):
        assert [each.number for each in inferencer.history("tiles")] == [1, 3]
    assert "00000002.step is no step" in caplog.text
    with pytest.raises(BankError, match=r"00000003.step was altered: its checksum differs"):
        inferencer.undo("tiles")
    assert content(inferencer) == now
    inferencer.set_threshold("tiles", 3.0)
    inferencer.undo("tiles")
    assert inferencer.bank("tiles").threshold == 2.0
    assert not list(folder.glob(".*"))


def test_banks_of_another_model_stay_where_they_are(
    bundle: Path, bundle_default: Path, good: list[Path], tmp_path: Path
) -> None:
    ResADInferencer(bundle, banks=tmp_path).enroll("tiles", good[:1])
    other = ResADInferencer(bundle_default, banks=tmp_path)
    bank = other.enroll("tiles", good[:1], replace_existing=True)
    with pytest.raises(BankError, match="as it was before step 2, was enrolled with another model"):
        other.undo("tiles")
    assert content(other) == bank.content


def test_as_commands(
    bundle: Path, good: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = Device(bundle, monkeypatch, capsys)
    common = ("--product", "tiles", "--banks", tmp_path / "banks")
    device("enroll", *common, "--photos", good[0])
    device("threshold", *common, "--score", "1.7")
    said = device("history", *common)
    assert "enroll" in said
    assert "1.7" in said
    assert "tiles is what it was before step 1 (enroll). tiles is not enrolled now" in device(
        "undo", *common, "--step", 1
    )
    assert "'pill' is not enrolled" in device("history", "--product", "pill", status=2)
    assert "tiles: 1 photos, its own threshold 1.7." in resad("undo", "--bundle", bundle, *common)
