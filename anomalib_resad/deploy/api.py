# SPDX-License-Identifier: Apache-2.0

"""The REST API: products, photos, thresholds, inspection, health, and figures for Prometheus.

It stands behind the guards of :mod:`~anomalib_resad.deploy.guard`, beside the page or without it.
"""

import base64
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.middleware import Middleware

from anomalib_resad.deploy.answers import about, known, public, threshold_told
from anomalib_resad.deploy.bank import (
    BankError,
    EnrolledError,
    NotEnrolledError,
    NotTaughtError,
    UndoError,
    product_name,
)
from anomalib_resad.deploy.bank_store import Loaded
from anomalib_resad.deploy.bodies import (
    AreaOptions,
    EnrollOptions,
    InspectOptions,
    Options,
    Received,
    Sent,
    ThresholdOptions,
    on_disk,
    received,
)
from anomalib_resad.deploy.bundle import BundleError
from anomalib_resad.deploy.changes import Changes
from anomalib_resad.deploy.descriptions import refusals, sentence, taking
from anomalib_resad.deploy.guard import guards
from anomalib_resad.deploy.in_flight import in_order
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.deploy.messages import printable
from anomalib_resad.deploy.metrics import Measured, Metrics
from anomalib_resad.deploy.turns import Turns
from anomalib_resad.enrollment.checks import is_count
from anomalib_resad.enrollment.photos import PhotoError
from anomalib_resad.enrollment.region import polygon
from anomalib_resad.enrollment.rotations import ORIENTATIONS
from anomalib_resad.version import __version__

Photos = Annotated[Received, Depends(received)]
# Products may have come or gone since a request was checked.
STATUSES: dict[type, int] = {NotEnrolledError: 404, EnrolledError: 409, NotTaughtError: 409, UndoError: 409}


class Api:
    """What the API does.

    Args:
        inferencer (ResADInferencer): The model and its products.
        metrics (Metrics): Figures for Prometheus.
        max_upload_mb (int): Largest photo.
        folder (Path | None): Where photos are written while they are enrolled; ``None`` for the system's.
    """

    def __init__(
        self, inferencer: ResADInferencer, metrics: Metrics, max_upload_mb: int, folder: Path | None = None
    ) -> None:
        self.inferencer, self.metrics, self.max_upload_mb, self.folder = inferencer, metrics, max_upload_mb, folder
        self.turns = Turns(metrics, inferencer.in_flight)
        self._room = threading.BoundedSemaphore(self.turns.running)  # photos in memory, of all requests

    def router(self) -> APIRouter:
        """The addresses. What computes runs in threads, so that the state is told while it does."""
        router = APIRouter()
        router.get("/v1/health")(self.health)
        router.get("/v1/ready")(self.ready)
        router.get("/v1/version")(self.version)
        router.get("/metrics", include_in_schema=False)(self.figures)
        router.get("/v1/products")(self.products)
        router.get("/v1/products/{name}")(self.product)
        router.post("/v1/products/{name}", status_code=201, **taking(EnrollOptions, 409))(self.enroll)
        router.delete("/v1/products/{name}", status_code=204, responses=refusals(404))(self.remove)
        router.post("/v1/products/{name}/photos", **taking(Options, 404))(self.add)
        router.put("/v1/products/{name}/threshold", responses=refusals(404, 422, 503))(self.set_threshold)
        router.put("/v1/products/{name}/min_area", responses=refusals(404, 422, 503))(self.set_min_area)
        router.post("/v1/products/{name}/inspect", **taking(InspectOptions, 404))(self.inspect)
        changes = Changes(self.inferencer, self.metrics, self.turns, self.max_upload_mb, self.folder)
        router.include_router(changes.router())
        return router

    # -- state --------------------------------------------------------------------------------------------------------

    async def health(self) -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    def ready(self) -> dict[str, str]:
        """Whether the model can be used; 503 if its bundle was replaced or removed."""
        for name in self.inferencer.products[:1]:
            with suppress(BankError):  # of this product alone
                self.inferencer.bank(name)
        return {"status": "ready"}

    async def version(self) -> dict[str, str]:
        """Of the package, and the model: scores of equal ones can be compared."""
        manifest = self.inferencer.manifest
        return {"version": __version__, "model": manifest.model, "precision": str(manifest.precision)}

    def figures(self) -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    # -- products -----------------------------------------------------------------------------------------------------

    def products(self) -> list[dict[str, Any]]:
        """All products; those whose bank cannot be used have an `error`."""
        return [self._described(name) for name in self.inferencer.products]

    def _described(self, name: str) -> dict[str, Any]:
        try:
            return about(self.inferencer, self.inferencer.bank(name))
        except ValueError as error:
            return {"product": name, "error": public(self.inferencer, error)}

    def product(self, name: str) -> dict[str, Any]:
        """One product: its photos, and its threshold of the raw score."""
        return about(self.inferencer, self.inferencer.bank(known(self.inferencer, name)))

    def enroll(self, name: str, sent: Photos) -> dict[str, Any]:
        """Enroll a product from good photos; 409 if it is there, and not to be replaced."""
        name = product_name(name)
        options, photos = sent.read(EnrollOptions, self.max_upload_mb)
        if name in self.inferencer.products and not options.replace:
            raise HTTPException(409, f"{name!r} is enrolled already. Add photos to it, or replace it (replace=true).")
        turned: Any = {None: None, "1": 1, "8": ORIENTATIONS, "auto": "auto"}[options.rotations]
        rate = None if options.false_alarm_rate == "none" else options.false_alarm_rate
        with self.turns.turn(), on_disk(photos, self.folder) as files:
            bank = self.inferencer.enroll(
                name,
                files,
                options.threshold,
                replace_existing=options.replace,
                rotations=turned,
                bit_depth=options.bit_depth,
                false_alarm_rate=rate,
                min_area=options.min_area,
                region=polygon(options.region),
            )
        return about(self.inferencer, bank)

    def add(self, name: str, sent: Photos) -> dict[str, Any]:
        """Add good photos to a product."""
        name = known(self.inferencer, name)
        _, photos = sent.read(Options, self.max_upload_mb)
        with self.turns.turn(), on_disk(photos, self.folder) as files:
            return about(self.inferencer, self.inferencer.add(name, files))

    def remove(self, name: str) -> Response:
        """Remove a product."""
        name = known(self.inferencer, name)
        self.inferencer.remove(name)
        self.metrics.forget(name)
        return Response(status_code=204)

    def set_threshold(self, name: str, wanted: ThresholdOptions) -> dict[str, Any]:
        """Give a product its own threshold: of the raw score (`null` for the model's again), or for a rate."""
        name, given = known(self.inferencer, name), wanted.model_fields_set
        if len(given) != 1 or (given == {"false_alarm_rate"} and wanted.false_alarm_rate is None):
            raise HTTPException(422, "Give either a threshold (null for the model's), or a false_alarm_rate.")
        if wanted.false_alarm_rate is None:
            return about(self.inferencer, self.inferencer.set_threshold(name, wanted.threshold))
        with self.turns.turn():  # photos may have to be compared with each other
            return about(self.inferencer, self.inferencer.calibrate(name, wanted.false_alarm_rate))

    def set_min_area(self, name: str, wanted: AreaOptions) -> dict[str, Any]:
        """Change the fewest pixels of a region that is found."""
        return about(self.inferencer, self.inferencer.set_min_area(known(self.inferencer, name), wanted.min_area))

    # -- inspection ---------------------------------------------------------------------------------------------------

    def inspect(self, name: str, sent: Photos) -> dict[str, Any]:
        """Inspect photos, all by the threshold that is told."""
        name = known(self.inferencer, name)
        options, photos = sent.read(InspectOptions, self.max_upload_mb)
        with self.turns.turn():
            loaded = self.inferencer.loaded(name)
            inspected = partial(self._inspected, name, loaded, options.map)
            results = list(in_order(inspected, photos, self.inferencer.in_flight))
        return {"product": name, "threshold": threshold_told(self.inferencer, loaded.bank), "results": results}

    def _inspected(self, name: str, loaded: Loaded, picture: str, sent: Sent) -> dict[str, Any]:
        with self._room:
            return self._result(name, loaded, picture, sent)

    def _result(self, name: str, loaded: Loaded, picture: str, sent: Sent) -> dict[str, Any]:
        try:
            found, pixels = self.inferencer.inspect(sent.photo(), name, loaded)
        except PhotoError as error:
            return {"photo": sent.name, "error": public(self.inferencer, error)}
        self.metrics.count(name, found)
        result: dict[str, Any] = {
            "photo": sent.name,
            "score": found.score,
            "raw_score": found.raw_score,
            "label": found.status,
        }
        result |= found.where()
        if picture == "none":
            return result
        content = found.png(pixels, self.inferencer.manifest.map.threshold is None, picture == "gray")
        return result | {"map": base64.b64encode(content).decode()}


def application(
    inferencer: ResADInferencer,
    host: str = "127.0.0.1",
    allowed_hosts: Sequence[str] = (),
    token: str | None = None,
    max_upload_mb: int = 30,
    max_total_mb: int = 200,
    folder: Path | None = None,
    tidy: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The API behind its guards.

    Args:
        inferencer (ResADInferencer): The model and its products.
        host (str): Address that is listened on.
        allowed_hosts (Sequence[str]): Further names under which it is opened.
        token (str | None): What clients must know; ``None`` for nothing.
        max_upload_mb (int): Largest file.
        max_total_mb (int): Largest request.
        folder (Path | None): Where photos are written while they are enrolled; ``None`` for the system's.
        tidy (Callable[[], None]): Run before each request that may leave files.

    Raises:
        ValueError: If a host or a limit is impossible.
    """
    if not (is_count(max_upload_mb) and is_count(max_total_mb)):
        msg = f"max_upload_mb={max_upload_mb!r} and max_total_mb={max_total_mb!r} must be whole numbers of at least 1."
        raise ValueError(msg)
    metrics = Metrics()
    stack = guards(host, allowed_hosts, token, most_bytes=max_total_mb * 1_000_000, tidy=tidy)
    app = FastAPI(
        title="ResAD",
        version=__version__,
        openapi_url="/v1/openapi.json",
        docs_url=None,  # their scripts come from another server
        redoc_url=None,
        middleware=[Middleware(Measured, metrics=metrics), *stack],
    )
    served = Api(inferencer, metrics, max_upload_mb, folder)
    app.include_router(served.router())
    app.state.turns = served.turns  # which are waited for when the process is to end

    def refused(_: Request, error: Exception) -> JSONResponse:
        status = 503 if isinstance(error, BankError | BundleError | OSError) else STATUSES.get(type(error), 422)
        return JSONResponse({"detail": public(inferencer, error)}, status)

    def misused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ValidationError | RequestValidationError)
        return JSONResponse({"detail": printable(sentence(error.errors()))}, 422)

    app.add_exception_handler(ValueError, refused)
    app.add_exception_handler(OSError, refused)
    app.add_exception_handler(ValidationError, misused)
    app.add_exception_handler(RequestValidationError, misused)
    return app
