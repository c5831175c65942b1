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
from anomalib_resad.deploy.page import EMPTY, REFUSED, Page
from anomalib_resad.deploy.uploads import Uploads
from anomalib_resad.enrollment.calibration import USUAL_RATE
from anomalib_resad.enrollment.decoding import BitDepth
from anomalib_resad.enrollment.photos import EXTENSIONS
from anomalib_resad.enrollment.rotations import ORIENTATIONS, Rotations

FONT = ["system-ui", "sans-serif"]  # of the browser: the page must work without a network
CHOICES: list[tuple[str, Rotations]] = [
    ("as the photos show", "auto"),
    ("any way round", ORIENTATIONS),
    ("always as in the photos", 1),
]
DEPTHS: list[tuple[str, BitDepth]] = [("what the files say", "auto"), *((str(bits), bits) for bits in (10, 12, 14, 16))]
SEVERAL: dict[str, Any] = {"file_count": "multiple", "file_types": sorted(EXTENSIONS), "type": "filepath"}
_MOVE = Block.async_move_resource_to_block_cache
REQUESTS_KEPT = 4  # as many of the largest requests fit on the disk


def build(page: Page) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="ResAD", analytics_enabled=False) as blocks:
        gr.Markdown("# ResAD\nEnroll a product with a few good photos, then inspect new ones.")
        found = gr.State(None)
        with gr.Tab("Inspect") as inspecting, gr.Row():
            product, photo, inspect, picture, verdict, threshold, keep, *settings = _inspect_tab(page)
        with gr.Tab("Products") as managing, gr.Row():
            name, *of_photos, corners, restart, enroll, remove, message, table = _products_tab(page)
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
        percent, calibrate, min_area, leave_out = settings
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
        for each in _enrolling(page, name, of_photos, enroll, remove, [message, table, product], raw):
            each.success(page.clear, found, shown, **quiet)
    return blocks


def _enrolling(
    page: Page,
    name: gr.Textbox,
    of_photos: list[Any],
    enroll: gr.Button,
    remove: gr.Button,
    told: list[Any],
    raw: dict[str, Any],
) -> list[Any]:
    """Connect the buttons that change which products there are."""
    refused = [REFUSED, gr.skip(), gr.skip()]
    enrolling = page.in_place(page.enroll, [*refused, gr.skip(), gr.skip()])
    removing = page.in_place(page.remove, refused)
    return [
        enroll.click(enrolling, [name, *of_photos], [*told, of_photos[0], of_photos[-1]], api_name="enroll", **raw),
        remove.click(removing, name, told, api_name="remove", **raw),
    ]


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


def _inspect_tab(page: Page) -> tuple[Any, ...]:
    with gr.Column():
        product = gr.Dropdown(page.inferencer.products, label="Product", elem_id="product")
        photo = gr.Image(label="Photo", type="filepath", sources=["upload"], height=360, elem_id="photo")
        inspect = gr.Button("Inspect", variant="primary", elem_id="inspect")
    with gr.Column():
        picture = gr.Image(
            label="Where it differs",
            type="filepath",
            interactive=False,
            height=360,
            elem_id="map",
            buttons=["download", "fullscreen"],  # sharing would send it to another server
        )
        verdict = gr.Markdown(EMPTY, elem_id="verdict")
        threshold = gr.Slider(0.01, 0.99, 0.5, step=0.005, label="Threshold", elem_id="threshold", buttons=[])
        keep = gr.Button("Keep this threshold for the product", elem_id="keep")
        with gr.Row():
            percent = gr.Number(
                100 * USUAL_RATE,
                label="Good photos that may alarm, in per cent (empty: the model's threshold)",
                elem_id="percent",
                buttons=[],
            )
            calibrate = gr.Button("Set the threshold from the product's photos", elem_id="calibrate")
        with gr.Row():
            min_area = gr.Number(0, label="Fewest pixels of a place that is found", elem_id="min_area", buttons=[])
            leave_out = gr.Button("Leave out smaller places", elem_id="leave_out")
    return product, photo, inspect, picture, verdict, threshold, keep, percent, calibrate, min_area, leave_out


def _products_tab(page: Page) -> tuple[Any, ...]:
    usual = page.inferencer.manifest.rotations
    with gr.Column():
        name = gr.Textbox(label="Product", placeholder="a new name, or an enrolled one to add photos to")
        files = gr.File(label="Good photos", elem_id="files", **SEVERAL)
        rotations = gr.Radio(
            CHOICES,
            value=usual if usual in dict(CHOICES).values() else None,
            label="How the product lies",
            elem_id="rotations",
        )
        bit_depth = gr.Dropdown(DEPTHS, value="auto", label="Bits of a channel, if more than 8", elem_id="bit_depth")
        with gr.Accordion("What counts, if not the whole photo", open=False, elem_id="counts"):
            corners = gr.Image(
                label="Click the corners of what counts",
                type="filepath",
                interactive=False,
                height=360,
                elem_id="corners",
                buttons=[],
            )
            region = gr.Textbox(label="Corners, in pixels of the photo", placeholder="x,y x,y x,y", elem_id="region")
            restart = gr.Button("No corners: the whole photo counts", elem_id="restart")
        enroll = gr.Button("Enroll", variant="primary", elem_id="enroll")
        remove = gr.Button("Remove this product", variant="stop")
        message = gr.Markdown(elem_id="message")
    table = gr.Dataframe(
        page.products,
        headers=["product", "photos", "MB", "threshold"],
        interactive=False,
        label="Enrolled",
        elem_id="table",
    )
    return name, files, rotations, bit_depth, region, corners, restart, enroll, remove, message, table


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
