# SPDX-License-Identifier: Apache-2.0

"""What is shown to people: names and messages that cannot do more than be read."""

import html
import re
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

WIDEST = 10_000  # columns of a table in a file or a pipe
BELOW = r"[/\\](?:[^\s/'\":;]+/)*"  # folders in a folder, up to the last slash
FOLDER = re.compile(r"(?<![\w.])/(?:[^\s/'\":;]+/)+")  # of an absolute path


def printable(text: str) -> str:
    """Escape control characters, which move a terminal's cursor or turn text around, and bytes that are no text.

    Args:
        text (str): A name of a file, or a message with one in it.
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def print_table(table: Table) -> None:
    """Print a table without cutting anything off; where nobody looks at a terminal, as wide as it is."""
    for column in table.columns:
        column.overflow = "fold"
    console = Console()
    (console if console.is_terminal else Console(width=WIDEST)).print(table)


def without_folders(text: str, folders: Iterable[Path]) -> str:
    """Leave of each path its last part: where a server keeps its files is nobody's business.

    Args:
        text (str): A message.
        folders (Iterable[Path]): Known folders, whose names may hold anything, also spaces.
    """
    known = {each for folder in folders for each in (str(folder), str(folder.resolve()))} - {"."}
    for folder in sorted(known, key=len, reverse=True):
        text = re.sub(re.escape(folder) + BELOW, "", text).replace(folder, Path(folder).name)
    return FOLDER.sub("", text)


def as_markdown(text: str) -> str:
    """Keep Markdown and HTML from doing anything with a text."""
    return re.sub(r"([\\`*_\[\]#|!~$])", r"\\\1", html.escape(text, quote=False))
