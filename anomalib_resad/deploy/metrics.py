# SPDX-License-Identifier: Apache-2.0

"""What Prometheus reads of the service."""

import time
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anomalib_resad.deploy.prediction import Prediction

METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # of the latency's histogram


class Metrics:
    """Figures of one application; names of products are labels, until the product is removed."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "resad_requests", "Requests to the API", ["method", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "resad_request_seconds", "Seconds of a request", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.queue = Gauge("resad_queue", "Requests that wait for the model, or use it", registry=self.registry)
        self.alarms = Counter("resad_alarms", "Photos that were found anomalous", ["product"], registry=self.registry)
        self.moved = Counter("resad_moved", "Photos whose content has moved", ["product"], registry=self.registry)
        self.scores = Summary(
            "resad_score", "Scores of photos, 0 to 1; sum by count is the mean", ["product"], registry=self.registry
        )
        self.good = Summary(
            "resad_good_score", "The same of those that were found good", ["product"], registry=self.registry
        )

    def count(self, product: str, found: Prediction) -> None:
        """Count a photo that was inspected."""
        if found.moved:
            self.moved.labels(product).inc()
            return
        self.scores.labels(product).observe(found.score)
        if found.label:
            self.alarms.labels(product).inc()
        elif found.label is not None:
            self.good.labels(product).observe(found.score)

    def forget(self, product: str) -> None:
        """Drop the figures of a product that was removed."""
        for each in (self.alarms, self.moved, self.scores, self.good):
            with suppress(KeyError):  # none of its photos was inspected
                each.remove(product)


class Measured:
    """Counts requests to the API and their time, also those that are refused.

    Args:
        app (ASGIApp): The application.
        metrics (Metrics): Where they are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        status, start = 500, time.perf_counter()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "none")  # its pattern: paths would be a label without an end
            method = scope["method"] if scope["method"] in METHODS else "other"  # clients may send any word
            self.metrics.requests.labels(method, route, status).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)
