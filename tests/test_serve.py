# SPDX-License-Identifier: Apache-2.0

"""The web page: the real server in a process of its own, in headless Chromium where there is one."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

gradio = pytest.importorskip("gradio", reason="the extra [serve] is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in BROWSERS if (found := shutil.which(name))), None)


@contextmanager
def serving(bundle: Path, folder: Path, *options: str) -> Iterator[str]:
    """The address of a server that runs meanwhile, and ends as it should."""
    command = [sys.executable, "-m", "anomalib_resad.cli", "serve", "--bundle", bundle, "--banks", folder / "banks"]
    left = folder / "uploads" / f"resad-{'0' * 32}"  # of a server that was killed
    left.mkdir(parents=True)
    (left / "photo.png").touch()
    left.with_name(f".{left.name}.lock").touch()
    environment = os.environ | {"GRADIO_TEMP_DIR": str(folder / "uploads"), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([*command, *options], env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield next(found[0] for line in process.stdout if (found := re.search(r"http://[\d.:]+", line)))
        finally:
            process.terminate()
    assert process.returncode == 0
    assert not [path for path in (folder / "uploads").rglob("*") if path.is_file()], "no upload stays"


REQUESTS = """
import sys
from urllib.error import HTTPError
from urllib.request import Request, urlopen
right = {"Authorization": "Bearer " + "0" * 16}
for headers in ({}, {"Host": "evil.example"}, {"Origin": "http://evil.example"}, right):
    try:
        print(urlopen(Request(sys.argv[1], headers=headers), timeout=30).status)
    except HTTPError as error:
        print(error.code)
"""


@pytest.mark.parametrize(("options", "answers"), [([], "200 400 403 200"), (["--token", "0" * 16], "401 400 403 200")])
def test_the_command_serves_guarded(bundle: Path, tmp_path: Path, options: list[str], answers: str) -> None:
    with serving(bundle, tmp_path, *options) as address:
        assert address.startswith("http://127.0.0.1:"), "this machine alone may open the page"
        # In another process: this one may connect to nothing.
        asked = subprocess.run(
            [sys.executable, "-c", REQUESTS, address], capture_output=True, text=True, check=True, timeout=120
        )
    assert asked.stdout.split() == answers.split()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_enroll_and_inspect_in_a_browser(bundle: Path, products: Path, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    good = sorted((products / "tiles" / "train" / "good").glob("*.png"))[:2]
    photo = min((products / "tiles" / "test").glob("[!g]*/*.png"))
    with serving(bundle, tmp_path) as server, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        phone = browser.new_context(viewport={"width": 390, "height": 800}).new_page()  # a session of its own
        failures: list[str] = []
        for each in (page, phone):
            each.on("pageerror", lambda error: failures.append(str(error)))
            each.goto(server)
        page.get_by_role("tab", name="Products").click()
        _enroll(page, "tiles", good)
        page.get_by_text("tiles is enrolled. Each photo is known in 8 orientations.").wait_for()
        _enroll(page, "../leave", good)
        page.locator("#message").get_by_text("cannot be the name of a product").wait_for()
        page.locator("#table").get_by_text("tiles").last.click(timeout=5000)  # nothing covers it
        _enroll(page, "others", None)
        page.get_by_text("others is enrolled.").wait_for()
        _picture(page, "products")
        shown = [_inspect(page, photo, "desktop"), _inspect(phone, photo, "phone")]
        (tmp_path / "map.png").write_bytes(shown[0])
        for each in (page, phone):
            _switch(each)
        browser.close()
    assert not failures
    with Image.open(tmp_path / "map.png") as overlaid, Image.open(photo) as original:
        assert overlaid.size == original.size
        assert np.any(np.asarray(overlaid.convert("RGB")) != np.asarray(original.convert("RGB")))
    assert [path.name for path in sorted((tmp_path / "banks").glob("[!.]*"))] == [
        "others.safetensors",
        "tiles.safetensors",
    ]
    assert not list(tmp_path.glob("leave*"))


def _enroll(page: Any, name: str, photos: list[Path] | None) -> None:
    """Enroll a product from photos, or from those that lie there since they were refused."""
    page.get_by_label("Product", exact=True).last.fill(name)
    if photos:
        page.locator("#files input[type=file]").set_input_files(photos)
        page.get_by_text(photos[1].name.removesuffix(".png")).first.wait_for()
    page.get_by_label("any way round").check()
    page.locator("#enroll").click()


def _inspect(page: Any, photo: Path, device: str) -> bytes:
    """Inspect a photo, and keep a threshold at which it is good; the first map."""
    page.get_by_role("tab", name="Inspect").click()
    page.locator("#product input").click()
    page.get_by_role("option", name="tiles").click()
    page.locator("#photo input[type=file]").set_input_files(photo)
    page.locator("#photo img").wait_for()
    page.locator("#inspect").click()
    page.locator("#map img").wait_for()
    page.locator("#verdict").get_by_text("score").wait_for()
    shown = page.request.get(page.locator("#map img").get_attribute("src")).body()
    _picture(page, f"inspect_{device}")
    page.locator("#threshold input[type=number]").fill("0.99")
    page.locator("#threshold input[type=number]").press("Enter")
    page.locator("#verdict").get_by_text("threshold 0.990").wait_for()
    assert "good" in page.locator("#verdict").inner_text()
    page.locator("#keep").click()
    page.locator("#verdict").get_by_text("was kept").wait_for()
    page.wait_for_timeout(500)  # for anything that would change the verdict afterwards
    assert re.match(r"good\s+tiles: score 0\.[0-4]\d\d, threshold 0\.500", page.locator("#verdict").inner_text())
    _picture(page, f"kept_{device}")
    return shown


def _switch(page: Any) -> None:
    """Another product: nothing of the first one stays."""
    page.locator("#product input").click()
    page.get_by_role("option", name="others").click()
    page.locator("#verdict").get_by_text("Drop a photo").wait_for()
    assert page.locator("#map img").count() == 0
    page.locator("#threshold input[type=number]").fill("0.01")
    page.locator("#threshold input[type=number]").press("Enter")
    page.wait_for_timeout(500)
    assert "score" not in page.locator("#verdict").inner_text()


def _picture(page: Any, name: str) -> None:
    """Keep what the page looks like, where a folder is named for it."""
    if folder := os.environ.get("RESAD_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
