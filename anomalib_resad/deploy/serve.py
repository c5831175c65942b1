# SPDX-License-Identifier: Apache-2.0

"""A web page to enroll products and inspect photos, in Gradio.

What comes from the page is not trusted: the size of an upload is limited by the server, photos are decoded by
:mod:`~anomalib_resad.enrollment.decoding` alone, and names of products by :func:`bank_file` cannot leave the folder of
the banks.
"""

from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np

from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.deploy.pictures import overlay
from anomalib_resad.deploy.prediction import scales_of
from anomalib_resad.enrollment.photos import EXTENSIONS
from anomalib_resad.enrollment.rotations import ORIENTATIONS, Rotations
from anomalib_resad.enrollment.thresholds import denormalize

FONT = ["system-ui", "sans-serif"]  # of the browser: the page must work without a network
CHOICES: list[tuple[str, Rotations]] = [
    ("as the photos show", "auto"),
    ("any way round", ORIENTATIONS),
    ("always as in the photos", 1),
]
SEVERAL: dict[str, Any] = {"file_count": "multiple", "file_types": sorted(EXTENSIONS), "type": "filepath"}
EMPTY = "Drop a photo, choose what it shows, and press **Inspect**."


class Page:
    """The page's actions; each returns what its outputs show.

    Args:
        inferencer (ResADInferencer): The model and its products.
    """

    def __init__(self, inferencer: ResADInferencer) -> None:
        self.inferencer = inferencer

    def products(self) -> list[list[Any]]:
        """One row per product: name, photos, size, threshold."""
        rows: list[list[Any]] = []
        for name in self.inferencer.products:
            try:
                bank = self.inferencer.bank(name)
            except ValueError as error:
                rows.append([name, 0, "-", str(error)])
                continue
            own = "the model's" if bank.threshold is None else f"{bank.threshold:.4g} (own)"
            rows.append([name, len(bank.references), f"{bank.size / 1e6:.1f}", own])
        return rows

    def choices(self, chosen: str | None = None) -> Any:  # noqa: ANN401  # Gradio's update
        """The products to choose from."""
        names = self.inferencer.products
        return gr.Dropdown(choices=names, value=chosen if chosen in names else (names[0] if names else None))

    def enroll(self, name: str, files: Sequence[str] | None, rotations: Rotations | None = None) -> tuple[Any, ...]:
        """Enroll a product, or add photos to it, in as many orientations as those that are there."""
        name = (name or "").strip()
        with _shown():
            if not files:
                msg = "Drop some good photos first; 2 to 8 are usual."
                raise ValueError(msg)
            known = name in self.inferencer.products
            if known:
                bank = self.inferencer.add(name, list(files))
            else:
                bank = self.inferencer.enroll(name, list(files), rotations=rotations)
        done = f"**{name}** has {len(bank.references)} photos now." if known else f"**{name}** is enrolled."
        if bank.rotations > 1:
            done += f" Each photo is known in {bank.rotations} orientations."
        return f"{done} It takes {bank.size / 1e6:.1f} MB.", self.products(), self.choices(name), None

    def remove(self, name: str) -> tuple[Any, ...]:
        """Remove a product."""
        with _shown():
            self.inferencer.remove((name or "").strip())
        return f"**{name}** was removed.", self.products(), self.choices()

    def inspect(self, photo: str | None, product: str | None, threshold: float) -> tuple[Any, ...]:
        """Inspect a photo."""
        with _shown():
            if not photo or not product:
                msg = "Drop a photo and choose a product first; enroll one if there is none."
                raise ValueError(msg)
            found, pixels = self.inferencer.inspect(photo, product)
        picture = overlay(pixels, found.map, stretch=self.inferencer.manifest.map.threshold is None)
        return np.asarray(picture), found.score, self.verdict(found.score, threshold)

    def verdict(self, score: float | None, threshold: float) -> str:
        """Score and label at a threshold."""
        if score is None:
            return EMPTY
        word = "anomalous" if score > threshold else "good"
        return f"## {word}\nscore **{score:.3f}**, threshold {threshold:.3f}"

    def keep_threshold(self, product: str | None, threshold: float) -> tuple[Any, ...]:
        """Make the slider's value the product's own threshold, which is 0.5 from then on."""
        with _shown():
            if not product:
                msg = "Choose a product first."
                raise ValueError(msg)
            scale, _ = scales_of(self.inferencer.manifest, self.inferencer.bank(product))
            self.inferencer.set_threshold(product, denormalize(threshold, *(float(each) for each in scale)))
        return (
            0.5,
            self.products(),
            f"Threshold of **{product}** kept; it is at 0.5 from now on. Inspect the photo again.",
        )


class _shown:  # noqa: N801  # used as a function
    """Show an error's text on the page."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | OSError):
            raise gr.Error(str(error), duration=15, print_exception=False) from error


def build(inferencer: ResADInferencer) -> gr.Blocks:
    """The page."""
    page = Page(inferencer)
    usual = inferencer.manifest.rotations
    with gr.Blocks(title="ResAD", analytics_enabled=False) as blocks:
        gr.Markdown("# ResAD\nEnroll a product with a few good photos, then inspect new ones.")
        with gr.Tab("Inspect"), gr.Row():
            with gr.Column():
                product = gr.Dropdown(inferencer.products, label="Product", elem_id="product")
                photo = gr.Image(
                    label="Photo", type="filepath", image_mode=None, sources=["upload"], height=360, elem_id="photo"
                )
                inspect = gr.Button("Inspect", variant="primary", elem_id="inspect")
            with gr.Column():
                picture = gr.Image(label="Where it differs", interactive=False, format="png", height=360, elem_id="map")
                verdict = gr.Markdown(EMPTY, elem_id="verdict")
                threshold = gr.Slider(0.01, 0.99, 0.5, step=0.005, label="Threshold", elem_id="threshold")
                keep = gr.Button("Keep this threshold for the product")
                score = gr.State(None)
        with gr.Tab("Products"), gr.Row():
            with gr.Column():
                name = gr.Textbox(label="Product", placeholder="a new name, or an enrolled one to add photos to")
                files = gr.File(label="Good photos", elem_id="files", **SEVERAL)
                rotations = gr.Radio(
                    CHOICES,
                    value=usual if usual in dict(CHOICES).values() else None,
                    label="How the product lies",
                    elem_id="rotations",
                )
                enroll = gr.Button("Enroll", variant="primary", elem_id="enroll")
                remove = gr.Button("Remove this product", variant="stop")
                message = gr.Markdown(elem_id="message")
            table = gr.Dataframe(
                page.products, headers=["product", "photos", "MB", "threshold"], interactive=False, label="Enrolled"
            )
        blocks.load(page.choices, None, product, api_visibility="private")
        inspect.click(page.inspect, [photo, product, threshold], [picture, score, verdict], api_name="inspect")
        threshold.change(page.verdict, [score, threshold], verdict, api_visibility="private", show_progress="hidden")
        keep.click(page.keep_threshold, [product, threshold], [threshold, table, verdict], api_name="keep_threshold")
        enroll.click(page.enroll, [name, files, rotations], [message, table, product, files], api_name="enroll")
        remove.click(page.remove, name, [message, table, product], api_name="remove")
    return blocks


def launch(inferencer: ResADInferencer, host: str, port: int | None, max_upload_mb: int) -> None:
    """Serve the page until it is interrupted."""
    build(inferencer).queue(default_concurrency_limit=2).launch(
        server_name=host,
        server_port=port,
        max_file_size=f"{max_upload_mb}mb",
        share=False,
        show_error=True,
        footer_links=[],
        theme=gr.themes.Default(font=FONT, font_mono=["monospace"]),
    )
