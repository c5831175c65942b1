# SPDX-License-Identifier: Apache-2.0

"""The actions of the page; requests to the application that serves it are in ``test_page_requests.py``."""

import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.deploy.messages import as_markdown, printable, without_folders

gradio = pytest.importorskip("gradio", reason="the extra [serve] is not installed")

from anomalib_resad.deploy.guard import MOST_FILES  # noqa: E402
from anomalib_resad.deploy.page import CHANGED, EMPTY, LONGEST_SHOWN, REFUSED, Page  # noqa: E402
from anomalib_resad.deploy.uploads import KEPT_SECONDS, MOST_KEPT, Uploads  # noqa: E402


@pytest.fixture
def page(inferencer: ResADInferencer, uploads: Path) -> Page:
    return Page(inferencer, Uploads(uploads, 1_000_000))


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


def test_a_verdict_is_not_of_the_product_in_tiles(page: Page, good: list[Path], new: list[Path]) -> None:
    """Every change of what is kept of a product makes another score, also one that other commands make."""
    inferencer = page.inferencer
    inferencer.enroll("tiles", good[:2], rotations=1)
    found = page.inspect(str(new[0]), "tiles", 0.5)[1]
    assert page.verdict(found, "tiles", 0.5) != CHANGED
    inferencer.enroll("tiles", good[:2], rotations=1, tile_scale=1.0, replace_existing=True)
    assert page.verdict(found, "tiles", 0.5) == CHANGED


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
        return sorted(int(path.parent.name) for path in tmp_path.rglob("*") if path.is_file())

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
