# SPDX-License-Identifier: Apache-2.0

"""What a request to the API carries: photos as files or as pixels, and options, in the form that suits the client.

A form (``multipart/form-data``) and JSON carry several photos and options. Other bodies are one photo; options then
stand in the address, as they may with every body.
"""

import io
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import unquote

import numpy as np
from fastapi import HTTPException, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException

from anomalib_resad.deploy.guard import MOST_FILES
from anomalib_resad.enrollment.photos import Photo, PhotoError

FORM, JSON, RAW = "multipart/form-data", "application/json", "application/octet-stream"
NPY = b"\x93NUMPY"  # how files of numpy.save begin
SHAPE, DTYPE, NAME = "X-Shape", "X-Dtype", "X-Photo"  # headers of a body that is one photo
UNNAMED = "photo"
MOST_SIDES = 32  # of an array of NumPy 1; photos have two or three
Dtype = Literal["uint8", "uint16"]
OptionsT = TypeVar("OptionsT", bound=BaseModel)


# -- options ----------------------------------------------------------------------------------------------------------


class Options(BaseModel):
    """Options of a request; one that is not known is refused, since it would do nothing."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_values(cls, given: Any) -> Any:  # noqa: ANN401  # whatever was sent
        """Refuse ``true`` where a number belongs: it would count as 1."""
        for name, value in given.items() if isinstance(given, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields and cls.model_fields[name].annotation is not bool:
                msg = f"{name}={str(value).lower()} is no number"
                raise ValueError(msg)
        return given


class EnrollOptions(Options):
    """How a product is enrolled."""

    rotations: Annotated[Literal["1", "8", "auto"], BeforeValidator(str)] | None = Field(
        None, description="Orientations of each photo; by default the model's."
    )
    bit_depth: int | Literal["auto"] = Field("auto", description="Bits of a channel, of photos of more than 8.")
    threshold: float | None = Field(None, description="The product's own threshold of the raw score.")
    false_alarm_rate: float | Literal["auto", "none"] = Field(
        "auto",
        description="Share of good photos that may alarm, for a threshold from the product's photos; none for the "
        "model's threshold.",
    )
    min_area: int | None = Field(None, description="Fewest pixels of a region; by default as before, or 0.")
    region: str | None = Field(
        None,
        description="What counts: corners of a polygon in pixels, x,y x,y x,y; none for all; else as before.",
    )
    replace: bool = Field(False, description="Replace the product if it is there.")


class InspectOptions(Options):
    """What is told of photos."""

    map: Literal["none", "overlay", "gray"] = Field(
        "none", description="A PNG of each, in base64: the map over the photo, or gray (255 for 1)."
    )


class TeachOptions(Options):
    """Where the defect of a photo is that is taught: one of the two."""

    mask: "JsonPhoto | None" = Field(None, description="Where the defect is: a mask of the photo's size, white there.")
    box: str | None = Field(None, description="The same as x,y,width,height in pixels of the photo.")


class UndoOptions(Options):
    """What is undone."""

    step: int | None = Field(None, description="Number of the step, later ones with it; null for the last one.")


class ThresholdOptions(Options):
    """A product's threshold: one of the two."""

    threshold: float | None = Field(None, description="Of the raw score; null for the model's.")
    false_alarm_rate: float | None = Field(None, description="Share of good photos that may alarm.")


class AreaOptions(Options):
    """A product's minimum area."""

    min_area: int = Field(description="Fewest pixels of a region that is found, of the photo.")


# -- photos -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """A photo of a request.

    Attributes:
        name (str): Its name.
        content (bytes): A file, or values in the order red, green, blue, row by row, the low byte first.
        shape (Sequence[int] | None): Of the values; ``None`` for a file.
        dtype (str): Of the values.
    """

    name: str
    content: bytes
    shape: Sequence[int] | None = None
    dtype: Dtype = "uint8"

    def photo(self) -> Photo:
        """What the inferencer takes.

        Raises:
            PhotoError: If the values do not fit their shape, or a file of NumPy holds something else.
        """
        if self.shape is not None:
            return self._array(self.content, tuple(self.shape), np.dtype(self.dtype).newbyteorder("<"), "C")
        if not self.content.startswith(NPY):
            return self.content
        file = io.BytesIO(self.content)
        try:
            old = np.lib.format.read_magic(file) == (1, 0)
            shape, fortran, dtype = (
                np.lib.format.read_array_header_1_0(file) if old else np.lib.format.read_array_header_2_0(file)
            )
        except Exception as error:  # NumPy evaluates the header, which raises almost anything
            why = (str(error).splitlines() or [type(error).__name__])[0]
            msg = f"{self.name}: damaged file of NumPy ({why})."
            raise PhotoError(msg) from error
        return self._array(self.content[file.tell() :], shape, dtype, "F" if fortran else "C")

    def _array(self, values: bytes, shape: tuple[int, ...], dtype: np.dtype, order: Literal["C", "F"]) -> np.ndarray:
        if dtype.kind != "u" or dtype.itemsize > 2:
            msg = f"{self.name}: values of {dtype} are no pixels. Send uint8, or uint16 of a product's bit depth."
            raise PhotoError(msg)
        expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if len(values) != expected or len(shape) > MOST_SIDES or min(shape, default=0) < 1:
            msg = (
                f"{self.name}: {len(values)} bytes are no {dtype} of shape {tuple(shape)}, which has {expected}. Send "
                "height, width and 3 for red, green and blue, or height and width for gray."
            )
            raise PhotoError(msg)
        array = np.frombuffer(values, dtype).reshape(shape, order=order)
        return array.astype(dtype.newbyteorder("="), copy=False)


@contextmanager
def on_disk(photos: Sequence[Sent], parent: Path | None) -> Iterator[list[Photo]]:
    """Photos as files, whose names are kept with the product; pixels stay as they are."""
    with TemporaryDirectory(prefix="resad-", dir=parent) as folder:
        paths: list[Photo] = []
        for index, sent in enumerate(photos):
            photo = sent.photo()
            if isinstance(photo, bytes):
                name = re.sub(r"[^\w. ()+-]", "_", re.split(r"[/\\]", sent.name)[-1])[-50:].strip(" .")
                path = Path(folder) / str(index) / (name or UNNAMED)
                path.parent.mkdir()
                path.write_bytes(photo)
                photo = path
            paths.append(photo)
        yield paths


class JsonPhoto(BaseModel):
    """A photo in JSON: a file in base64, or values with their shape."""

    model_config = ConfigDict(extra="forbid", val_json_bytes="base64")

    name: str = UNNAMED
    content: bytes = Field(description="Base64 of a file, or of values, row by row, the low byte first.")
    shape: list[int] | None = Field(None, description="Of values: height, width and 3 for RGB, or height and width.")
    dtype: Dtype = "uint8"

    def sent(self) -> Sent:
        """The same as of any body."""
        return Sent(self.name, self.content, self.shape, self.dtype)


class JsonBody(BaseModel):
    """Photos in JSON, and a mask where one belongs; options stand beside them."""

    model_config = ConfigDict(extra="allow")

    photos: list[JsonPhoto] = Field(min_length=1, max_length=MOST_FILES)
    mask: JsonPhoto | None = None


# -- requests ---------------------------------------------------------------------------------------------------------


class Received:
    """A request whose body is here, and is not decoded yet.

    Args:
        kind (str): Its content type.
        headers (Headers): Its headers.
        query (dict[str, Any]): Options in its address.
        body (FormData | bytes): Its body.
    """

    def __init__(self, kind: str, headers: Headers, query: dict[str, Any], body: FormData | bytes) -> None:
        self.kind, self.headers, self.query, self.body = kind, headers, query, body

    def read(self, options: type[OptionsT], most_mb: int) -> tuple[OptionsT, list[Sent]]:
        """Its options and photos.

        Args:
            options (type[OptionsT]): What options there are.
            most_mb (int): Largest photo.

        Raises:
            HTTPException: If there is no photo, one is too large (413), or the body is of another type (415).
            ValidationError: If an option is not known, or impossible.
        """
        fields, photos = self._form(most_mb) if isinstance(self.body, FormData) else self._one_body(self.body)
        chosen = options.model_validate(self.query | fields)
        if not photos or not all(each.content for each in photos):
            empty = next((f"{each.name!r} is empty" for each in photos), "No photo was sent")
            raise HTTPException(422, f"{empty}. Send 1 to {MOST_FILES} photos (`photos` of a form or of JSON).")
        masks = [each.sent() for each in fields.values() if isinstance(each, JsonPhoto)]
        for each in [*photos, *masks]:
            if len(each.content) > most_mb * 1_000_000:
                raise HTTPException(413, f"{each.name!r} is larger than {most_mb} MB (--max_upload_mb).")
        return chosen, photos

    def _form(self, most_mb: int) -> tuple[dict[str, Any], list[Sent]]:
        assert isinstance(self.body, FormData)
        most = most_mb * 1_000_000 + 1
        fields = {
            name: JsonPhoto(name=value.filename or name, content=value.file.read(most), shape=None)
            if isinstance(value, UploadFile)
            else value
            for name, value in self.body.multi_items()
            if name != "photos"
        }
        files = self.body.getlist("photos")
        if not all(isinstance(each, UploadFile) for each in files):
            raise HTTPException(422, "`photos` of a form are files. With curl: -F photos=@photo.png")
        read = [(each, each.file.read(most)) for each in files if isinstance(each, UploadFile)]
        return fields, [Sent(each.filename or UNNAMED, content) for each, content in read]

    def _one_body(self, body: bytes) -> tuple[dict[str, Any], list[Sent]]:
        if self.kind == JSON:
            given = JsonBody.model_validate_json(body)
            masks = {} if given.mask is None else {"mask": given.mask}
            return (given.model_extra or {}) | masks, [each.sent() for each in given.photos]
        if self.kind != RAW and not self.kind.startswith("image/"):
            raise HTTPException(
                415, f"Content-Type {self.kind or '(none)'}: send photos as {FORM}, {JSON}, {RAW} or image/*."
            )
        name = unquote(self.headers.get(NAME, UNNAMED))
        shape, dtype = self.headers.get(SHAPE), self.headers.get(DTYPE, "uint8")
        if shape is None:
            return {}, [Sent(name, body)]
        sides = shape.split(",")
        if not all(side.strip().isdecimal() for side in sides) or dtype not in ("uint8", "uint16"):
            raise HTTPException(
                422, f"{SHAPE}: {shape}, {DTYPE}: {dtype} are none. Write {SHAPE}: 480,640,3 and uint8 or uint16."
            )
        return {}, [Sent(name, body, [int(side) for side in sides], "uint16" if dtype == "uint16" else "uint8")]


async def received(request: Request) -> AsyncIterator[Received]:
    """Receive a request; what takes time is left to the thread that serves it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    about = (kind, request.headers, dict(request.query_params))
    if kind == FORM:
        async with request.form() as form:
            yield Received(*about, form)
        return
    try:
        body = await request.body()
    except MultiPartException as error:  # of the guard, of a body that is larger than it said
        raise HTTPException(413, error.message) from error
    yield Received(*about, body)
