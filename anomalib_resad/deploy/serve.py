# SPDX-License-Identifier: Apache-2.0

"""A web page to enroll products and inspect photos, in Gradio.

What comes from the page is not trusted: requests are limited (:mod:`~anomalib_resad.deploy.guard`), photos are decoded
by :mod:`~anomalib_resad.enrollment.decoding` alone, and names of products by :func:`bank_file` cannot leave the folder
of the banks.
"""

import os
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.blocks import Block
from gradio.utils import get_upload_folder

from anomalib_resad.deploy import api
from anomalib_resad.deploy.drawing import Drawing
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.deploy.page import REFUSED, Page
from anomalib_resad.deploy.page_changes import PageChanges
from anomalib_resad.deploy.tabs import inspect_tab, products_tab
from anomalib_resad.deploy.uploads import Uploads

FONT = ["system-ui", "sans-serif"]  # of the browser: the page must work without a network
_MOVE = Block.async_move_resource_to_block_cache
REQUESTS_KEPT = 4  # as many of the largest requests fit on the disk


def build(page: Page) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="ResAD", analytics_enabled=False) as blocks:
        gr.Markdown("# ResAD\nEnroll a product with a few good photos, then inspect new ones.")
        found = gr.State(None)
        with gr.Tab("Inspect") as inspecting, gr.Row():
            product, photo, inspect, picture, verdict, threshold, keep, *settings = inspect_tab(page)
        with gr.Tab("Products") as managing, gr.Row():
            name, *of_photos, corners, restart, enroll, remove, undo, message, table = products_tab(page)
        # Gradio's preprocessing would open images, and knows of each session's first choice of products alone.
        raw: dict[str, Any] = {"preprocess": False}
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", **raw}
        gr.on([blocks.load, inspecting.select, product.focus], page.choices, product, product, **quiet)
        managing.select(page.products, None, table, **quiet)
        shown = [picture, found, threshold, verdict]
        chosen, nothing = [found, product, photo], [gr.skip()] * 4
        gr.on([product.change, photo.change], page.in_place(page.changed, nothing), chosen, shown, **quiet)
        done = inspect.click(
            page.in_place(page.inspect, [None, None, REFUSED]),
            [photo, product, threshold, found],
            [picture, found, verdict],
            api_name="inspect",
            **raw,
        )
        done.success(page.in_place(page.fitting, nothing), chosen, shown, **quiet)
        # Of a user alone: where an action sets the slider, it says its own verdict.
        threshold.input(page.verdict, [found, product, threshold], verdict, **quiet)
        percent, calibrate, min_area, leave_out, *changes = settings
        for button, action, value in (
            (keep, page.keep_threshold, threshold),
            (calibrate, page.calibrate, percent),
            (leave_out, page.leave_out, min_area),
        ):
            button.click(
                page.in_place(action, [gr.skip(), gr.skip(), REFUSED, gr.skip(), gr.skip()]),
                [product, value, found],
                [threshold, table, verdict, picture, found],
                api_name=action.__name__,
                **raw,
            )
        _drawing(page, of_photos, corners, restart, message, quiet)
        _changing(page, changes, (photo, product, found), [threshold, table, verdict, picture, found], raw)
        for each in _enrolling(page, name, of_photos, [enroll, remove, undo], [message, table, product], raw):
            each.success(page.clear, found, shown, **quiet)
    return blocks


def _enrolling(
    page: Page,
    name: gr.Textbox,
    of_photos: list[Any],
    buttons: list[gr.Button],
    told: list[Any],
    raw: dict[str, Any],
) -> list[Any]:
    """Connect the buttons that change which products there are."""
    refused = [REFUSED, gr.skip(), gr.skip()]
    enrolling = page.in_place(page.enroll, [*refused, gr.skip(), gr.skip()])
    removing = page.in_place(page.remove, refused)
    undoing = page.in_place(PageChanges(page).undo_named, refused)
    enroll, remove, undo = buttons
    return [
        enroll.click(enrolling, [name, *of_photos], [*told, of_photos[0], of_photos[-1]], api_name="enroll", **raw),
        remove.click(removing, name, told, api_name="remove", **raw),
        undo.click(undoing, name, told, api_name="undo_named", **raw),
    ]


def _changing(page: Page, changes: list[Any], given: tuple[Any, ...], shown: list[Any], raw: dict[str, Any]) -> None:
    """Connect what teaches and undoes."""
    actions = PageChanges(page)
    (marked, corners, restart, teach, forget), (steps, undo) = changes
    photo, product, found = given
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", **raw}
    refused = [gr.skip(), gr.skip(), REFUSED, *[gr.skip()] * 4]
    forgetting = page.in_place(actions.forget, refused[:-1])
    drawn, skipped = [marked, corners], [gr.skip()] * 2
    click = page.in_place(actions.click, skipped)

    def clicked(photo: Any, name: Any, text: Any, last: Any, event: gr.SelectData) -> tuple[Any, ...]:  # noqa: ANN401
        return click(photo, name, text, last, list(event.index))  # Gradio gives an event by its type alone

    gr.on(
        [photo.change, product.change, restart.click],
        page.in_place(actions.restart, skipped),
        [photo, product, corners],
        drawn,
        **quiet,
    )
    marked.input(page.in_place(actions.show, skipped), [photo, product, marked, corners], drawn, **quiet)
    corners.select(clicked, [photo, product, marked, corners], drawn, **quiet)
    gr.on([product.change, shown[2].change], actions.steps, product, steps, **quiet)
    teaching, undoing = page.in_place(actions.teach, refused), page.in_place(actions.undo, refused)
    taught = teach.click(teaching, [photo, product, marked, found], [*shown, marked, steps], api_name="teach", **raw)
    taught.success(page.in_place(actions.restart, skipped), [photo, product, corners], drawn, **quiet)
    forget.click(forgetting, [product, found], [*shown, steps], api_name="forget", **raw)
    undo.click(undoing, [product, found], [*shown, product, steps], api_name="undo", **raw)


def _drawing(
    page: Page, of_photos: list[Any], corners: gr.Image, restart: gr.Button, message: gr.Markdown, quiet: dict[str, Any]
) -> None:
    """Connect the picture on which a region is drawn."""
    drawing = Drawing(page)
    files, _, bit_depth, region = of_photos
    given, told = [files, bit_depth, region, corners], [region, corners, message]
    refused = [gr.skip(), gr.skip(), REFUSED]
    click = page.in_place(drawing.click, refused)

    def clicked(photos: Any, bits: Any, text: Any, shown: Any, event: gr.SelectData) -> tuple[Any, ...]:  # noqa: ANN401
        return click(photos, bits, text, shown, list(event.index))  # Gradio gives an event by its type alone

    gr.on([files.change, region.input], page.in_place(drawing.show, refused[1:]), given, told[1:], **quiet)
    corners.select(clicked, given, told, **quiet)
    restart.click(page.in_place(drawing.restart, refused), [files, bit_depth, corners], told, **quiet)


def _move_uploads_alone(block: Block, path: str | Path | None) -> Coroutine[Any, Any, str | None]:
    """Refuse files of the server, and addresses to load from, that a client names instead of an upload."""
    folder = Path(get_upload_folder()).resolve()
    if path is not None and folder not in Path(path).resolve().parents:
        msg = "This file was not uploaded."
        raise gr.Error(msg, print_exception=False)
    return _MOVE(block, path)


def application(
    inferencer: ResADInferencer,
    host: str = "127.0.0.1",
    allowed_hosts: Sequence[str] = (),
    token: str | None = None,
    max_upload_mb: int = 30,
    max_total_mb: int = 200,
    folder: Path | None = None,
) -> FastAPI:
    """The page and the API behind their guards; what is uploaded comes into Gradio's folder (``GRADIO_TEMP_DIR``).

    Args:
        inferencer (ResADInferencer): The model and its products.
        host (str): Address that is listened on.
        allowed_hosts (Sequence[str]): Further names under which the page is opened.
        token (str | None): What clients must know; ``None`` for nothing.
        max_upload_mb (int): Largest file.
        max_total_mb (int): Largest request.
        folder (Path | None): Where photos of the API are written while they are enrolled; ``None`` for the system's.

    Raises:
        ValueError: If a host or a limit is impossible.
    """
    largest = max_total_mb * 1_000_000
    uploads = Uploads(Path(get_upload_folder()), REQUESTS_KEPT * largest)
    os.environ.setdefault("GRADIO_RUN_HISTORY", "False")  # or photos stay in the browser
    Block.async_move_resource_to_block_cache = _move_uploads_alone  # type: ignore[method-assign, assignment]
    blocks = build(Page(inferencer, uploads)).queue(default_concurrency_limit=2, max_size=32, api_open=False)
    app = api.application(inferencer, host, allowed_hosts, token, max_upload_mb, max_total_mb, folder, uploads.tidy)
    return gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        max_file_size=f"{max_upload_mb}mb",
        show_error=False,  # only those that are meant to be shown
        footer_links=[],
        ssr_mode=False,
        theme=gr.themes.Default(font=FONT, font_mono=["monospace"]),
    )
