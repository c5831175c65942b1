# SPDX-License-Identifier: Apache-2.0

"""A queue that ends: requests take turns with the model, and those that would wait too long are told so."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import HTTPException

from anomalib_resad.deploy.metrics import Metrics

RUNNING, WAITING = 2, 16  # requests that use the model (at least), and that wait; others are told to come again
WAIT_SECONDS = 30.0


class Turns:
    """Lets some requests use the model, and some wait.

    Args:
        metrics (Metrics): Where they are counted.
        in_flight (int): Photos that the model takes at the same time.
    """

    def __init__(self, metrics: Metrics, in_flight: int) -> None:
        self.metrics, self.running = metrics, max(RUNNING, in_flight)
        self._free = threading.BoundedSemaphore(self.running)
        self._lock, self._inside, self._closed = threading.Lock(), 0, False

    @property
    def inside(self) -> int:
        """Requests that use the model, or wait for it."""
        return self._inside

    def close(self) -> None:
        """Refuse further requests; those that are inside go on."""
        self._closed = True

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn.

        Raises:
            HTTPException: If too many wait already (429), it takes too long, or the service is being stopped (503).
        """
        with self._lock:
            if self._closed:
                raise HTTPException(503, "The service is being stopped.", {"Retry-After": "5", "Connection": "close"})
            if self._inside >= self.running + WAITING:
                raise HTTPException(429, f"{WAITING} requests wait already. Try again.", {"Retry-After": "1"})
            self._inside += 1
        try:
            self.metrics.queue.set(self._inside)
            if not self._free.acquire(timeout=WAIT_SECONDS):
                raise HTTPException(503, f"No turn within {WAIT_SECONDS:.0f} s. Try again.", {"Retry-After": "5"})
            try:
                yield
            finally:
                self._free.release()
        finally:
            with self._lock:
                self._inside -= 1
                self.metrics.queue.set(self._inside)
