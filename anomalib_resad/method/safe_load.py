# SPDX-License-Identifier: Apache-2.0

"""Read weight and checkpoint files without running any code from them."""

import pickle
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


def load_weights_only(path: Path | str, what: str) -> dict[str, Any]:
    """Load a ``.safetensors`` or PyTorch file, tensors and plain data only.

    Args:
        path (Path | str): The file.
        what (str): What the file should hold, for the messages ("trained ResAD", "backbone weights").

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or asks to run code when it is unpickled.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"No {what} at {path}: there is no such file."
        raise FileNotFoundError(msg)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        msg = (
            f"{path} was not loaded: it is damaged, or holds Python objects that would run code when loaded, while "
            f"{what} are tensors and plain data only. Copy the file again, or ask its author for a plain one. ({error})"
        )
        raise ValueError(msg) from error
    except (EOFError, RuntimeError, BadZipFile, SafetensorError, OSError, KeyError) as error:
        msg = f"{path} is damaged or no {what} file ({path.stat().st_size} bytes): {error}. Copy the file again."
        raise ValueError(msg) from error
    if not isinstance(content, dict):
        msg = f"{path} holds a {type(content).__name__}, not the dictionary of {what}."
        raise ValueError(msg)  # noqa: TRY004  # a wrong file, not a wrong argument
    return content
