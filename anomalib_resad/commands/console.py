# SPDX-License-Identifier: Apache-2.0

"""What the commands print, and how they tell errors."""

from rich.console import Console
from rich.markup import escape

from anomalib_resad.deploy.messages import printable

console = Console()


def say(text: str) -> None:
    """Print a line that may hold names of files and products."""
    console.print(escape(printable(text)), soft_wrap=True)


def explained(error: Exception) -> str:
    """What to tell of an error; of those that nobody foresaw, also what it is."""
    missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    if missing.startswith("anomalib_resad."):
        return (
            "This command needs PyTorch and anomalib, which this installation is without: it is that for devices. Run "
            "it where the whole package is installed, and copy what it writes."
        )
    if isinstance(error, ValueError | OSError | ModuleNotFoundError):
        return str(error)
    return f"unexpected {type(error).__name__}: {error}. Add --debug to see where it came up, and report it"
