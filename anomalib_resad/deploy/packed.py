# SPDX-License-Identifier: Apache-2.0

"""A bundle as one file: a zip of the files of its folder, without the products' banks.

The files are stored as they are. So nothing has to be unpacked, equal bundles are equal files on every machine, and no
member can be larger than the file itself.
"""

import io
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

MEMBER = r"(model-[0-9a-f]{32}/)?[a-z]+\.(json|xml|bin)"  # so that any program may unpack it, too


def packed(contents: Mapping[str, bytes]) -> bytes:
    """A packed bundle.

    Args:
        contents (Mapping[str, bytes]): The files by their names in the bundle.
    """
    buffer = io.BytesIO()
    with ZipFile(buffer, "w", ZIP_STORED) as archive:
        for name in sorted(contents):
            archive.writestr(ZipInfo(name), contents[name])  # without a date
    return buffer.getvalue()


def read_file(bundle: Path, name: str) -> bytes:
    """One file of a bundle, of a folder or of a packed one.

    Args:
        bundle (Path): Folder, or packed file.
        name (str): Name of the file in the bundle.

    Raises:
        OSError: If it is not there, or cannot be read.
        ValueError: If the packed file is damaged, or holds what no bundle holds.
    """
    if not bundle.is_file():
        return (bundle / name).read_bytes()
    try:
        with ZipFile(bundle) as archive:
            _check(archive, bundle.stat().st_size)
            return archive.read(name)
    except KeyError as error:
        msg = f"{bundle} holds no {name}"
        raise FileNotFoundError(msg) from error
    except (BadZipFile, EOFError, NotImplementedError) as error:
        msg = f"{bundle} is damaged, or no packed bundle: {error}"
        raise ValueError(msg) from error


def _check(archive: ZipFile, size: int) -> None:
    """Refuse what :func:`packed` does not write.

    Raises:
        BadZipFile: If a member is there twice, is called what no file of a bundle is, is a link, encrypted or
            compressed, or the members are larger than the file.
    """
    members = archive.infolist()
    problems = {
        "a file is there twice": len({each.filename for each in members}) < len(members),
        "it holds other files": any(re.fullmatch(MEMBER, each.filename) is None for each in members),
        "it holds a link": any(stat.S_ISLNK(each.external_attr >> 16) for each in members),
        "its files are compressed or encrypted": any(each.compress_type or each.flag_bits & 1 for each in members),
        "its files are larger than itself": sum(each.file_size for each in members) > size,
    }
    found = [problem for problem, is_there in problems.items() if is_there]
    if found:
        raise BadZipFile("; ".join(found))
