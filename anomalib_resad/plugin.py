# SPDX-License-Identifier: Apache-2.0

"""Everything of the package that needs PyTorch and anomalib; importing it makes ``ResAD`` known to anomalib."""

import os
import re
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from anomalib import models
from anomalib.utils import config

from anomalib_resad.data.cross_category import CrossCategory
from anomalib_resad.data.product_folder import ProductFolder
from anomalib_resad.few_shot_references import FewShotReferences
from anomalib_resad.lightning_model import ResAD
from anomalib_resad.method.reference_bank import ReferenceBank
from anomalib_resad.torch_model import ResADModel
from anomalib_resad.training.epoch_seeds import heed_seed_everything

__all__ = ["CrossCategory", "FewShotReferences", "ProductFolder", "ReferenceBank", "ResAD", "ResADModel"]

# get_model("ResAD") and the command line find subclasses of AnomalibModule by themselves; class paths need these two.
models.ResAD = ResAD  # type: ignore[attr-defined]
models.ALLOWED_MODULES.add("anomalib_resad")
heed_seed_everything()

DEBUG = "RESAD_DEBUG"  # set in the environment, it shows where an error came up


# What PyTorch makes of an error in a process that loads data: the last frame, and what was said there.
WORKERS = re.compile(
    r'Caught \w+ in DataLoader worker process .*^  File "([^"\n]+)", line \d+, in [^\n]*\n(?: [^\n]*\n)*[\w.]+: (.*)',
    re.DOTALL | re.MULTILINE,
)


def _own(error: BaseException, trace: TracebackType | None) -> str | None:
    """What this package said when it raised an error on purpose, also behind jsonargparse's, or in a data loader."""
    behind = [frame.f_locals.get("exceptions") for frame, _ in traceback.walk_tb(trace)]
    for each in [error, *(one for several in behind if isinstance(several, list) for one in several)]:
        if not isinstance(each, ValueError | OSError):
            continue
        frames, of_worker = traceback.extract_tb(each.__traceback__), WORKERS.match(str(each))
        file, said = of_worker.groups() if of_worker else (frames[-1].filename if frames else "", str(each))
        if Path(__file__).parent in Path(file).parents:
            return said.strip()
    return None


def shorten_errors() -> None:
    """Let the `anomalib` command end our own messages to its user in one sentence, not below pages of its frames.

    Errors that do not come from this package, and other programs, are as they were. anomalib sets its hook while it is
    imported, so that ours is set when the arguments are there, before anything is made of them.
    """
    update = config.update_config

    def update_and_listen(given: Any) -> Any:  # noqa: ANN401  # as of anomalib
        before = sys.excepthook

        def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            own = None if os.environ.get(DEBUG) else _own(error, trace)
            if own is None:
                before(kind, error, trace)
            else:
                sys.stderr.write(f"Error: {own} ({DEBUG}=1 shows where it came up.)\n")

        sys.excepthook = tell
        return update(given)

    if Path(sys.argv[0]).stem == "anomalib":
        config.update_config = update_and_listen  # type: ignore[assignment]


shorten_errors()
