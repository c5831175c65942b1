# SPDX-License-Identifier: Apache-2.0

"""Everything of the package that needs PyTorch and anomalib; importing it makes ``ResAD`` known to anomalib."""

from anomalib import models

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
