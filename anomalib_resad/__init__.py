# SPDX-License-Identifier: Apache-2.0

"""ResAD for anomalib: train once on labeled products, inspect a new one after a few good photos.

The names below are imported at their first use, which makes ``ResAD`` known to anomalib by its short name, as if it
were one of anomalib's own. Importing the package alone imports neither PyTorch nor anomalib: on the edge there are none
(:mod:`anomalib_resad.deploy`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from anomalib_resad.version import __version__

if TYPE_CHECKING:
    from anomalib_resad.plugin import (
        CrossCategory,
        FewShotReferences,
        ProductFolder,
        ReferenceBank,
        ResAD,
        ResADModel,
    )

__all__ = ["CrossCategory", "FewShotReferences", "ProductFolder", "ReferenceBank", "ResAD", "ResADModel", "__version__"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in __all__:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module("anomalib_resad.plugin"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
