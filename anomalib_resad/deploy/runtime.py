# SPDX-License-Identifier: Apache-2.0

"""The models of a bundle in OpenVINO, compiled from the bytes that were checked."""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import openvino as ov

from anomalib_resad.deploy.bundle import ENCODER, FILES, BundleError
from anomalib_resad.enrollment.checks import is_count
from anomalib_resad.enrollment.image_size import Size

# OpenVINO keeps what it prepared for the last shapes that it saw, 5,000 of them by default: up to 1 MB for each size of
# a photo. Most products have photos of one size.
CACHED_SHAPES = 64
COMPOUND = ("AUTO", "MULTI", "HETERO", "BATCH")  # devices that choose among others


class Requests:
    """The requests of a model, given to who waits longest.

    Args:
        requests (Sequence[ov.InferRequest]): Those that run at the same time.
    """

    def __init__(self, requests: Sequence[ov.InferRequest]) -> None:
        self._free, self._lock = list(requests), threading.Lock()
        self._waiting: deque[SimpleQueue[ov.InferRequest]] = deque()

    def take(self) -> ov.InferRequest:
        """A free request; waits for one."""
        with self._lock:
            if self._free:
                return self._free.pop()
            mine: SimpleQueue[ov.InferRequest] = SimpleQueue()
            self._waiting.append(mine)
        try:
            return mine.get()
        except BaseException:  # Ctrl-C: nobody waits there any more
            with self._lock:
                given = mine not in self._waiting
                if not given:
                    self._waiting.remove(mine)
            if given:
                self.give(mine.get())
            raise

    def give(self, request: ov.InferRequest) -> None:
        """Give one back. Not to a queue of all: who gave one and wants the next would be faster than who waits."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().put(request)
            else:
                self._free.append(request)


class Runtime:
    """Compiles each model at its first use; safe to use from several threads, of which some run at the same time.

    Args:
        files (Mapping[str, bytes]): Content of the files of a bundle.
        device (str): OpenVINO device.
        threads (int | None): Most CPU threads; ``None`` leaves it to OpenVINO.
        streams (int): How many run at the same time; further ones wait. A single one has all CPU threads, several
            share them, so that more is done in a second, and each takes longer.
        bfloat16 (bool): Whether a CPU may compute in it what of the encoder is not marked to stay in float32.

    Raises:
        ValueError: If there is no such device, or a number is impossible.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        device: str,
        threads: int | None,
        streams: int = 1,
        bfloat16: bool = False,
    ) -> None:
        self._files = {name: files[name] for name in FILES}
        self._device = device
        if not is_count(streams):
            msg = f"streams={streams!r} must be a whole number of at least 1: the photos that are computed together."
            raise ValueError(msg)
        self._streams = int(streams)
        hint = {"PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT"}
        self._config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", **hint}
        if streams > 1:
            self._config["PERFORMANCE_HINT_NUM_REQUESTS"] = self._streams
        self._encoder_config = {"INFERENCE_PRECISION_HINT": "bf16"} if bfloat16 and device == "CPU" else {}
        if threads is not None and not is_count(threads):
            msg = f"threads={threads!r} must be a whole number of at least 1, or None to leave it to OpenVINO."
            raise ValueError(msg)
        if threads is not None:
            self._config["INFERENCE_NUM_THREADS"] = int(threads)
        if device == "CPU":
            self._config["CPU_RUNTIME_CACHE_CAPACITY"] = max(1, CACHED_SHAPES // self._streams)  # each has its own
        self._core = ov.Core()
        known = self._core.available_devices
        if device not in known and device.partition(":")[0] not in (
            *COMPOUND,
            *(each.partition(".")[0] for each in known),
        ):
            msg = f"device={device!r} is no OpenVINO device of this machine, which has {', '.join(known)}."
            raise ValueError(msg)
        self._requests: dict[str, Requests] = {}
        self._lock = threading.Lock()

    def run(self, file: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Run a model.

        Args:
            file (str): Which one, by the name of its file.
            inputs (list[np.ndarray]): What it takes.

        Raises:
            BundleError: If the device cannot run it.
        """
        with self._lock:
            if file not in self._requests:
                self._requests[file] = self._compiled(file)
            requests = self._requests[file]
        whole = [np.ascontiguousarray(values) for values in inputs]  # kept until the end: tensors may lie in them
        request = requests.take()
        try:
            # Not by `infer(inputs)`: it asks the request for its tensors and holds Python's lock meanwhile, for which
            # OpenVINO waits in another stream. Nor with memory of Python, which cannot be let go without that lock.
            for number, values in enumerate(whole):
                shared = self._streams == 1 and values.flags.writeable
                request.set_input_tensor(number, ov.Tensor(values, shared_memory=shared))
            request.start_async()
            request.wait()
            return [np.array(each.data) for each in request.output_tensors]
        finally:
            requests.give(request)

    def _compiled(self, file: str) -> Requests:
        weights = Path(file).with_suffix(".bin").name
        try:
            model = self._core.read_model(self._files[file], self._files[weights])
            config = self._config | (self._encoder_config if file == ENCODER else {})
            compiled = self._core.compile_model(model, self._device, config)
        except RuntimeError as error:
            msg = f"OpenVINO cannot run {file} on {self._device}: {str(error).strip().splitlines()[-1]}"
            raise BundleError(msg) from error
        requests = Requests([compiled.create_infer_request() for _ in range(self._streams)])
        del self._files[file], self._files[weights]
        return requests


def canvas_of(size: Size) -> np.ndarray:
    """The second input of an encoder that resizes to any size: its height and width alone count."""
    return np.zeros(size, dtype=np.uint8)
