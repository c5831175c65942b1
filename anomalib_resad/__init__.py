# SPDX-License-Identifier: Apache-2.0

"""ResAD for anomalib: train once on labeled products, inspect a new one after a few good photos.

Importing this package makes ``ResAD`` known to anomalib by its short name, as if it were one of anomalib's own.
"""

from anomalib import models

from anomalib_resad.callback import FewShotReferences
from anomalib_resad.datamodule import CrossCategory
from anomalib_resad.lightning_model import ResAD
from anomalib_resad.product_folder import ProductFolder
from anomalib_resad.reference_bank import ReferenceBank
from anomalib_resad.torch_model import ResADModel
from anomalib_resad.version import __version__

__all__ = ["CrossCategory", "FewShotReferences", "ProductFolder", "ReferenceBank", "ResAD", "ResADModel", "__version__"]

# get_model("ResAD") and the command line find subclasses of AnomalibModule by themselves; class paths need these two.
models.ResAD = ResAD  # type: ignore[attr-defined]
models.ALLOWED_MODULES.add("anomalib_resad")
