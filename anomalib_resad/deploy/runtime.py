# SPDX-License-Identifier: Apache-2.0

"""The models of a bundle in OpenVINO, compiled from the bytes that were checked."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from anomalib_resad.deploy.bundle import ENCODER, FILES, BundleError
from anomalib_resad.enrollment.checks import is_count

# OpenVINO keeps what it prepared for the last shapes that it saw, 5,000 of them by default: up to 1 MB for each size of
# a photo. Most products have photos of one size.
CACHED_SHAPES = 64
COMPOUND = ("AUTO", "MULTI", "HETERO", "BATCH")  # devices that choose among others


class Runtime:
    """Compiles each model at its first use; safe to use from several threads, which wait for each other.

    Args:
        files (Mapping[str, bytes]): Content of the files of a bundle.
        device (str): OpenVINO device.
        threads (int | None): Most CPU threads; ``None`` leaves it to OpenVINO.
        bfloat16 (bool): Whether a CPU may compute in it what of the encoder is not marked to stay in float32.

    Raises:
        ValueError: If there is no such device, or the number is impossible.
    """

    def __init__(self, files: Mapping[str, bytes], device: str, threads: int | None, bfloat16: bool = False) -> None:
        self._files = {name: files[name] for name in FILES}
        self._device = device
        self._encoder_config = {"INFERENCE_PRECISION_HINT": "bf16"} if bfloat16 and device == "CPU" else {}
        self._config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None and not is_count(threads):
            msg = f"threads={threads!r} must be a whole number of at least 1, or None to leave it to OpenVINO."
            raise ValueError(msg)
        if threads is not None:
            self._config["INFERENCE_NUM_THREADS"] = int(threads)
        if device == "CPU":
            self._config["CPU_RUNTIME_CACHE_CAPACITY"] = CACHED_SHAPES
        self._core = ov.Core()
        known = self._core.available_devices
        if device not in known and device.partition(":")[0] not in (
            *COMPOUND,
            *(each.partition(".")[0] for each in known),
        ):
            msg = f"device={device!r} is no OpenVINO device of this machine, which has {', '.join(known)}."
            raise ValueError(msg)
        self._requests: dict[str, ov.InferRequest] = {}
        self._lock = threading.RLock()

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
                weights = Path(file).with_suffix(".bin").name
                try:
                    model = self._core.read_model(self._files[file], self._files[weights])
                    config = self._config | (self._encoder_config if file == ENCODER else {})
                    compiled = self._core.compile_model(model, self._device, config)
                except RuntimeError as error:
                    msg = f"OpenVINO cannot run {file} on {self._device}: {str(error).strip().splitlines()[-1]}"
                    raise BundleError(msg) from error
                self._requests[file] = compiled.create_infer_request()
                del self._files[file], self._files[weights]
            outputs = self._requests[file].infer(inputs, share_inputs=True)
            return [outputs[number] for number in range(len(outputs))]
