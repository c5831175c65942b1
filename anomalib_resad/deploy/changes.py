# SPDX-License-Identifier: Apache-2.0

"""The part of the REST API that teaches defects that were missed, and undoes changes."""

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, HTTPException

from anomalib_resad.deploy.answers import about, known
from anomalib_resad.deploy.bank import product_name
from anomalib_resad.deploy.bodies import Received, TeachOptions, UndoOptions, on_disk, received
from anomalib_resad.deploy.descriptions import refusals, taking
from anomalib_resad.deploy.history import Step
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.deploy.metrics import Metrics
from anomalib_resad.deploy.teaching import read_box
from anomalib_resad.deploy.turns import Turns
from anomalib_resad.enrollment.photos import Photo

Taught = Annotated[Received, Depends(received)]
NO_MARK = (
    "Nothing says where the defect is. Send a mask (a file of the photo's size, white there), or a box "
    "(x,y,width,height in pixels of the photo)."
)


class Changes:
    """What the API does about defects that were missed, and about changes that were made.

    Args:
        inferencer (ResADInferencer): The model and its products.
        metrics (Metrics): Figures for Prometheus.
        turns (Turns): The queue of all requests that use the model.
        max_upload_mb (int): Largest photo.
        folder (Path | None): Where photos are written meanwhile; ``None`` for the system's.
    """

    def __init__(
        self, inferencer: ResADInferencer, metrics: Metrics, turns: Turns, max_upload_mb: int, folder: Path | None
    ) -> None:
        self.inferencer, self.metrics, self.turns = inferencer, metrics, turns
        self.max_upload_mb, self.folder = max_upload_mb, folder

    def router(self) -> APIRouter:
        """The addresses."""
        router = APIRouter()
        router.post("/v1/products/{name}/taught", **taking(TeachOptions, 404, most=1))(self.teach)
        router.delete("/v1/products/{name}/taught", responses=refusals(404, 409, 503))(self.forget)
        router.get("/v1/products/{name}/history", responses=refusals(404, 503))(self.history)
        router.post("/v1/products/{name}/undo", responses=refusals(404, 409, 422, 503))(self.undo)
        return router

    def teach(self, name: str, sent: Taught) -> dict[str, Any]:
        """Teach a product a defect that was missed, marked in one photo: what looks like it scores higher."""
        name = known(self.inferencer, name)
        options, photos = sent.read(TeachOptions, self.max_upload_mb)
        if len(photos) != 1:
            raise HTTPException(422, f"{len(photos)} photos were sent. Teach one at a time, with its own mask or box.")
        if options.mask is None and options.box is None:
            raise HTTPException(422, NO_MARK)
        box = read_box(options.box)
        marks = [] if options.mask is None else [options.mask.sent()]
        with self.turns.turn(), on_disk([*photos, *marks], self.folder) as (photo, *masks):
            before = self._judged(name, photo)
            bank = self.inferencer.teach(name, photo, masks[0] if masks else None, box)
            return about(self.inferencer, bank) | {"before": before, "after": self._judged(name, photo)}

    def forget(self, name: str) -> dict[str, Any]:
        """Forget all that a product was taught, 409 if that is nothing; this can be undone."""
        return about(self.inferencer, self.inferencer.forget(known(self.inferencer, name)))

    def history(self, name: str) -> list[dict[str, Any]]:
        """The last changes of a product, the oldest first; also of one that was removed."""
        return [_told(step) for step in self.inferencer.history(name)]

    def undo(self, name: str, wanted: Annotated[UndoOptions | None, Body()] = None) -> dict[str, Any]:
        """Make a product what it was before a step; later steps are undone with it. This is a step, too.

        `product` is `null` where the product is not enrolled any more: undo that to have it back.
        """
        name = product_name(name)
        undone = self.inferencer.undo(name, None if wanted is None else wanted.step)
        if name in self.inferencer.products:
            return {"undone": _told(undone), "product": about(self.inferencer, self.inferencer.bank(name))}
        self.metrics.forget(name)
        return {"undone": _told(undone), "product": None}

    def _judged(self, name: str, photo: Photo) -> dict[str, Any]:
        found = self.inferencer.predict(photo, name)
        return {"score": found.score, "raw_score": found.raw_score, "label": found.status}


def _told(step: Step) -> dict[str, Any]:
    return {
        "step": step.number,
        "time": step.time,
        "what": step.what,
        "photos": step.photos,
        "threshold": step.threshold,
    }
