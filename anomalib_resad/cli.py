# SPDX-License-Identifier: Apache-2.0

"""The ``resad`` command: what `anomalib` has no verb for."""

import signal
import sys
import warnings
from typing import Any

from jsonargparse import auto_cli
from rich.console import Console
from rich.markup import escape

from anomalib_resad.commands.bake import bake
from anomalib_resad.commands.bundle import info, pack, verify
from anomalib_resad.commands.check import check
from anomalib_resad.commands.console import explained
from anomalib_resad.commands.export import export, parity
from anomalib_resad.commands.history import history, undo
from anomalib_resad.commands.inspect import inspect
from anomalib_resad.commands.predict import predict
from anomalib_resad.commands.products import enroll, products
from anomalib_resad.commands.serve import serve
from anomalib_resad.commands.teach import teach
from anomalib_resad.commands.threshold import threshold
from anomalib_resad.commands.watch import watch
from anomalib_resad.deploy.messages import printable

FLAGS = ("--replace", "--resume", "--add", "--model", "--forget")
VERBS: dict[str, Any] = {
    "inspect": inspect,
    "export": export,
    "enroll": enroll,
    "predict": predict,
    "products": products,
    "threshold": threshold,
    "check": check,
    "teach": teach,
    "history": history,
    "undo": undo,
    "bake": bake,
    "bundle": {
        "_help": "Pack a bundle into one file, check it, or tell what it is.",
        "pack": pack,
        "verify": verify,
        "info": info,
    },
    "parity": parity,
    "serve": serve,
    "watch": watch,
}


def main() -> None:
    """Run the command. Whatever goes wrong is one sentence, and with ``--debug`` Python's traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl+C does
    if "--debug" not in sys.argv[1:]:  # what these packages tell their own developers, when PyTorch is needed
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(anomalib|timm)\.")
    words = _with_values([each for each in sys.argv[1:] if each != "--debug"])
    about = "ResAD on a device. With --debug, an error shows where in the program it came up."
    try:
        auto_cli(VERBS, as_positional=False, prog="resad", args=words, description=about)
    except (KeyboardInterrupt, Exception) as error:
        if "--debug" in sys.argv[1:]:
            raise
        said = "Interrupted." if isinstance(error, KeyboardInterrupt) else explained(error)
        Console(stderr=True).print(f"[red]Error:[/red] {escape(printable(said))}", soft_wrap=True)
        sys.exit(2)


def _with_values(words: list[str]) -> list[str]:
    """A flag alone is true."""
    following = [*words[1:], "--"]
    flags = [word in FLAGS and after.startswith("--") for word, after in zip(words, following, strict=False)]
    return [part for word, flag in zip(words, flags, strict=True) for part in ((word, "true") if flag else (word,))]


if __name__ == "__main__":
    main()
