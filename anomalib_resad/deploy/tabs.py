# SPDX-License-Identifier: Apache-2.0

"""What stands on the page, tab by tab."""

from typing import Any

import gradio as gr

from anomalib_resad.deploy.history import KEPT
from anomalib_resad.deploy.page import EMPTY, Page
from anomalib_resad.enrollment.calibration import USUAL_RATE
from anomalib_resad.enrollment.decoding import BitDepth
from anomalib_resad.enrollment.photos import EXTENSIONS
from anomalib_resad.enrollment.rotations import ORIENTATIONS, Rotations

CHOICES: list[tuple[str, Rotations]] = [
    ("as the photos show", "auto"),
    ("any way round", ORIENTATIONS),
    ("always as in the photos", 1),
]
DEPTHS: list[tuple[str, BitDepth]] = [("what the files say", "auto"), *((str(bits), bits) for bits in (10, 12, 14, 16))]
SEVERAL: dict[str, Any] = {"file_count": "multiple", "file_types": sorted(EXTENSIONS), "type": "filepath"}


def _picture_to_click(label: str, elem_id: str) -> gr.Image:
    return gr.Image(label=label, type="filepath", interactive=False, height=360, elem_id=elem_id, buttons=[])


def teaching() -> tuple[Any, ...]:
    """Where a defect is marked that is taught."""
    with gr.Accordion("This is a defect: teach it", open=False, elem_id="teaching"):
        gr.Markdown("Was it missed? Mark it in the photo. What looks like it scores higher from then on.")
        corners = _picture_to_click("Click two opposite corners of a box, or three and more around it", "defect")
        marked = gr.Textbox(label="Corners, in pixels of the photo", placeholder="x,y x,y", elem_id="marked")
        restart = gr.Button("No corners", elem_id="unmark")
        teach = gr.Button("Teach this defect", variant="primary", elem_id="teach")
        forget = gr.Button("Forget all that this product was taught", elem_id="forget")
    return marked, corners, restart, teach, forget


def undoing() -> tuple[Any, ...]:
    """The changes of a product."""
    with gr.Accordion("Changes of this product", open=False, elem_id="changes"):
        steps = gr.Dataframe(
            headers=["step", "what", "time (UTC)"],
            interactive=False,
            label=f"The last {KEPT}, the latest first",
            elem_id="steps",
        )
        undo = gr.Button("Undo the last change", elem_id="undo")
    return steps, undo


def inspect_tab(page: Page) -> tuple[Any, ...]:
    """Where photos are inspected, and products judged otherwise."""
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
        to_teach = teaching()
        with gr.Accordion("How this product is judged", open=False, elem_id="judged"):
            percent = gr.Number(
                100 * USUAL_RATE,
                label="Good photos that may alarm, in per cent (empty: the model's threshold)",
                elem_id="percent",
                buttons=[],
            )
            calibrate = gr.Button("Set the threshold from the product's photos", elem_id="calibrate")
            min_area = gr.Number(0, label="Fewest pixels of a place that is found", elem_id="min_area", buttons=[])
            leave_out = gr.Button("Leave out smaller places", elem_id="leave_out")
        to_undo = undoing()
    settings = percent, calibrate, min_area, leave_out
    return product, photo, inspect, picture, verdict, threshold, keep, *settings, to_teach, to_undo


def products_tab(page: Page) -> tuple[Any, ...]:
    """Where products are enrolled and removed."""
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
            corners = _picture_to_click("Click the corners of what counts", "corners")
            region = gr.Textbox(label="Corners, in pixels of the photo", placeholder="x,y x,y x,y", elem_id="region")
            restart = gr.Button("No corners: the whole photo counts", elem_id="restart")
        enroll = gr.Button("Enroll", variant="primary", elem_id="enroll")
        message = gr.Markdown(elem_id="message")
        with gr.Row():
            undo = gr.Button("Undo its last change", elem_id="undo_named")
            remove = gr.Button("Remove this product", variant="stop")
    table = gr.Dataframe(
        page.products,
        headers=["product", "photos", "MB", "threshold"],
        interactive=False,
        label="Enrolled",
        elem_id="table",
    )
    return name, files, rotations, bit_depth, region, corners, restart, enroll, remove, undo, message, table
