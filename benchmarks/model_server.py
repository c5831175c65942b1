# SPDX-License-Identifier: Apache-2.0

"""The open inference protocol (KServe v2), as OpenVINO Model Server, KServe and Triton speak it, without the server.

None of them can be installed from a package index. So the requests that they document are answered here, from the
folders that they read.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import openvino as ov

DATATYPES = {"UINT8": np.uint8, "FP32": np.float32}


@cache
def _compiled(path: Path) -> ov.CompiledModel:
    """A version of a model, which is never written again."""
    return ov.Core().compile_model(path, "CPU")


def request_of(pixels: np.ndarray) -> tuple[bytes, int]:
    """A request with binary data: the body, and the length of its JSON, which stands in a header."""
    tensor = {"name": "input", "shape": pixels.shape, "datatype": "UINT8"}
    wanted = [{"name": name, "parameters": {"binary_data": True}} for name in ("pred_score", "pred_label")]
    content = {"inputs": [tensor | {"parameters": {"binary_data_size": pixels.nbytes}}], "outputs": wanted}
    head = json.dumps(content).encode()
    return head + pixels.tobytes(), len(head)


def answer(model: Path, body: bytes, length: int) -> tuple[bytes, int]:
    """What a model server makes of a request: it takes the latest version in the folder of a model.

    Raises:
        ValueError: If the request does not fit the model.
    """
    latest = max((path for path in model.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    compiled = _compiled(next(latest.glob("*.xml")))
    content = json.loads(body[:length])
    (given,) = content["inputs"]
    port = compiled.input(given["name"])
    values = np.frombuffer(body[length:], DATATYPES[given["datatype"]]).reshape(given["shape"])
    if values.dtype != port.get_element_type().to_dtype() or not port.get_partial_shape().compatible(
        ov.PartialShape(values.shape)
    ):
        msg = f"{given['datatype']} {given['shape']} is not {port.get_element_type()} {port.get_partial_shape()}"
        raise ValueError(msg)
    found = compiled({given["name"]: values})
    kinds = {np.dtype(kind): name for name, kind in DATATYPES.items()}
    outputs, data = [], b""
    for wanted in content["outputs"]:
        value = found[wanted["name"]]
        size = {"binary_data_size": value.nbytes}
        outputs.append(
            {"name": wanted["name"], "shape": value.shape, "datatype": kinds[value.dtype], "parameters": size}
        )
        data += value.tobytes()
    head = json.dumps({"model_name": model.name, "model_version": latest.name, "outputs": outputs}).encode()
    return head + data, len(head)


def outputs_of(body: bytes, length: int) -> dict[str, np.ndarray]:
    """The tensors of an answer."""
    found, start = {}, length
    for each in json.loads(body[:length])["outputs"]:
        end = start + each["parameters"]["binary_data_size"]
        found[each["name"]] = np.frombuffer(body[start:end], DATATYPES[each["datatype"]]).reshape(each["shape"])
        start = end
    return found
