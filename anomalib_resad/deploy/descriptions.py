# SPDX-License-Identifier: Apache-2.0

"""What the API tells of itself: what its requests take, in OpenAPI, and what is wrong with one."""

from collections.abc import Iterable
from typing import Any

from anomalib_resad.deploy.bodies import DTYPE, FORM, JSON, NAME, RAW, SHAPE, JsonPhoto, Options
from anomalib_resad.deploy.guard import MOST_FILES

REFUSALS = {
    404: "The product is not enrolled",
    409: "The product is there, and is not to be replaced; or there is nothing to undo or to forget",
    413: "A photo, or the request, is too large",
    415: "The body is of a type that is not read",
    422: "A photo or an option cannot be used; `detail` says why",
    429: "Too many requests wait; `Retry-After` says when to come again",
    503: "The model or the bank cannot be used",
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Statuses of requests that are refused."""
    return {status: {"description": REFUSALS[status]} for status in statuses}


def taking(options: type[Options], status: int, most: int = MOST_FILES) -> dict[str, Any]:
    """What is told of a request that carries photos.

    Args:
        options (type[Options]): Its options.
        status (int): That of a product that is missing, or there.
        most (int): Most photos.
    """
    return {"openapi_extra": _described(options, most), "responses": refusals(status, 413, 415, 422, 429, 503)}


def sentence(problems: Iterable[Any]) -> str:
    """What is wrong with options, in one sentence, from pydantic's list."""
    return "; ".join(map(_told, problems)) + "."


def _told(problem: Any) -> str:  # noqa: ANN401  # a dictionary of pydantic's
    where, given = ".".join(str(each) for each in problem["loc"] if each != "body"), repr(problem.get("input"))
    shown = "" if problem["type"] == "missing" else f" (given: {given if len(given) < 60 else given[:57] + '...'})"
    return f"{where}: {problem['msg']}{shown}" if where else f"{problem['msg']}{shown}"


def _described(options: type[Options], most: int) -> dict[str, Any]:
    fields = options.model_json_schema()["properties"]
    mask = fields.pop("mask", None)  # a file, which no address holds
    photo = JsonPhoto.model_json_schema(ref_template="")
    photo["properties"]["content"] |= {"format": "byte"}
    listed = {"type": "array", "minItems": 1, "maxItems": most}
    file = {"type": "string", "format": "binary"}

    def body(item: dict[str, Any]) -> dict[str, Any]:
        properties = {"photos": listed | {"items": item}, **fields}
        if mask is not None:
            properties["mask"] = item | {"description": mask["description"]}
        return {"schema": {"type": "object", "required": ["photos"], "properties": properties}}

    told = (
        (SHAPE, f"Of values ({RAW}): height, width and 3 for RGB, or height and width.", "480,640,3"),
        (DTYPE, "Of values: uint8 or uint16.", "uint8"),
        (NAME, "Name of a photo that is the body, percent-encoded.", "0001.png"),
    )
    headers = [
        {"name": name, "in": "header", "description": text, "schema": {"type": "string"}, "example": example}
        for name, text, example in told
    ]
    query = [
        {"name": name, "in": "query", "description": field.get("description", ""), "schema": field}
        for name, field in fields.items()
    ]
    kinds = {FORM: body(file), JSON: body(photo), "image/*": {"schema": file}, RAW: {"schema": file}}
    return {"requestBody": {"required": True, "content": kinds}, "parameters": [*query, *headers]}
