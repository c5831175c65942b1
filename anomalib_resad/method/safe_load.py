# SPDX-License-Identifier: Apache-2.0

"""Read weight and checkpoint files without running any code from them."""

import io
import pickle
import re
import textwrap
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load

# What the libraries raise for damaged files.
UNREADABLE = (EOFError, RuntimeError, BadZipFile, SafetensorError, OSError, LookupError, TypeError, ValueError)


def load_weights_only(path: Path | str, what: str) -> dict[str, Any]:
    """Load a ``.safetensors`` or PyTorch file, tensors and plain data only.

    Args:
        path (Path | str): The file.
        what (str): What the file should hold, for the messages ("trained ResAD", "backbone weights").

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or asks to run code when it is unpickled.
    """
    return parse_weights_only(read_file(path, what), path, what)


def read_file(path: Path | str, what: str) -> bytes:
    """Read a file.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not Path(path).is_file():
        msg = f"No {what} at {path}: there is no such file."
        raise FileNotFoundError(msg)
    return Path(path).read_bytes()


def parse_weights_only(content: bytes, path: Path | str, what: str) -> dict[str, Any]:
    """As :func:`load_weights_only`, of a file that was read.

    Raises:
        ValueError: If the file is damaged, or asks to run code when it is unpickled.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load(content)
        _check_members(content)
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        msg = f"{path} is damaged or no {what} file ({len(content)} bytes). Copy the file again."
        if asked:
            msg = (
                f"{path} was not loaded: it is damaged, or holds Python objects ({asked[1]}) that would run code when "
                f"loaded, while {what} are tensors and plain data only. Copy the file again, or ask its author for a "
                "plain one."
            )
        raise ValueError(msg) from error
    except UNREADABLE as error:
        why = textwrap.shorten(str(error) or type(error).__name__, 300)
        msg = f"{path} is damaged or no {what} file ({len(content)} bytes): {why}. Copy the file again."
        raise ValueError(msg) from error
    if not isinstance(found, dict):
        msg = f"{path} holds a {type(found).__name__}, not the dictionary of {what}."
        raise ValueError(msg)  # noqa: TRY004  # a wrong file, not a wrong argument
    return found


def _check_members(content: bytes) -> None:
    """Compare each part of PyTorch's archive with its CRC-32, which PyTorch writes and does not read."""
    if content[:2] != b"PK":  # the format of before 2020
        return
    with ZipFile(io.BytesIO(content)) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        msg = f"its part {damaged} does not match its checksum"
        raise BadZipFile(msg)
