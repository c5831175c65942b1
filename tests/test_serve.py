# SPDX-License-Identifier: Apache-2.0

"""The web page: the real server in a process of its own, in headless Chromium where there is one."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

gradio = pytest.importorskip("gradio", reason="the extra [serve] is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in BROWSERS if (found := shutil.which(name))), None)


@pytest.fixture
def server(bundle: Path, tmp_path: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "anomalib_resad.cli", "serve", "--bundle", bundle, "--banks", tmp_path / "banks"]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path / "uploads"), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = next(found[0] for line in process.stdout if (found := re.search(r"http://[\d.:]+", line)))
            yield address
        finally:
            process.terminate()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_enroll_and_inspect_in_a_browser(server: str, products: Path, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    assert server.startswith("http://127.0.0.1:"), "this machine alone may open the page"
    good = sorted((products / "tiles" / "train" / "good").glob("*.png"))[:2]
    photo = min((products / "tiles" / "test").glob("[!g]*/*.png"))
    (tmp_path / "broken.png").write_bytes(good[0].read_bytes()[:100])
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        failures: list[str] = []
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(server)
        page.get_by_role("tab", name="Products").click()
        page.get_by_label("Product", exact=True).last.fill("../leave")
        page.locator("#files input[type=file]").set_input_files(good)
        page.get_by_text(good[1].name.removesuffix(".png")).first.wait_for()
        page.locator("#enroll").click()
        page.get_by_text("cannot be the name of a product").wait_for()
        page.get_by_label("Product", exact=True).last.fill("tiles")
        page.get_by_label("any way round").check()
        page.locator("#enroll").click()
        page.get_by_text("tiles is enrolled. Each photo is known in 8 orientations.").wait_for()
        _picture(page, "products")
        page.get_by_role("tab", name="Inspect").click()
        page.locator("#photo input[type=file]").set_input_files(photo)
        page.locator("#photo img").wait_for()
        page.locator("#inspect").click()
        page.locator("#map img").wait_for()
        page.locator("#verdict").get_by_text("score").wait_for()
        source = page.locator("#map img").get_attribute("src")
        page.locator("#threshold input[type=number]").fill("0.99")
        page.locator("#threshold input[type=number]").press("Enter")
        page.locator("#verdict").get_by_text("good").wait_for()
        _picture(page, "inspect")
        shown = page.request.get(source)
        (tmp_path / "map.png").write_bytes(shown.body())
        browser.close()
    assert not failures
    with Image.open(tmp_path / "map.png") as overlaid, Image.open(photo) as original:
        assert overlaid.size == original.size
        assert np.any(np.asarray(overlaid.convert("RGB")) != np.asarray(original.convert("RGB")))
    assert [path.name for path in (tmp_path / "banks").glob("[!.]*")] == ["tiles.safetensors"]
    assert not list(tmp_path.glob("leave*"))


def _picture(page: object, name: str) -> None:
    """Keep what the page looks like, where a folder is named for it."""
    if folder := os.environ.get("RESAD_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")  # type: ignore[attr-defined]


def test_the_actions_refuse_what_is_not_a_photo(bundle: Path, tmp_path: Path) -> None:
    from anomalib_resad.deploy import ResADInferencer  # noqa: PLC0415
    from anomalib_resad.deploy.serve import Page, build  # noqa: PLC0415

    page = Page(ResADInferencer(bundle, banks=tmp_path / "banks"))
    build(page.inferencer)
    fake = tmp_path / "photo.png"
    fake.write_text("<script>")
    for action in (
        lambda: page.enroll("tiles", [str(fake)]),
        lambda: page.enroll("tiles", None),
        lambda: page.enroll("..", [str(fake)]),
        lambda: page.inspect(str(fake), "tiles", 0.5),
        lambda: page.remove("tiles"),
        lambda: page.keep_threshold("tiles", 0.5),
    ):
        with pytest.raises(gradio.Error):
            action()
    assert page.products() == []
