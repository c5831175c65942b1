# SPDX-License-Identifier: Apache-2.0

"""The edge: an exported model that enrolls new products on the device itself.

Importing this package imports neither PyTorch nor anomalib; :mod:`anomalib_resad.deploy.export` needs them.
"""

from anomalib_resad.deploy.bank import Bank, BankError, Reference
from anomalib_resad.deploy.bundle import BundleError, Manifest, read_manifest
from anomalib_resad.deploy.inferencer import Prediction, ResADInferencer
from anomalib_resad.photo_files import PhotoError

__all__ = [
    "Bank",
    "BankError",
    "BundleError",
    "Manifest",
    "PhotoError",
    "Prediction",
    "Reference",
    "ResADInferencer",
    "read_manifest",
]
