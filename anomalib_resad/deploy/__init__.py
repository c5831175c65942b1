# SPDX-License-Identifier: Apache-2.0

"""The edge: an exported model that enrolls new products on the device itself.

Nothing in this package imports PyTorch or anomalib; what makes bundles for it is :mod:`anomalib_resad.export`.
"""

from anomalib_resad.deploy.bank import Bank, BankError
from anomalib_resad.deploy.bundle import BundleError, Manifest, read_manifest
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.deploy.prediction import Prediction
from anomalib_resad.deploy.regions import Region, find_regions
from anomalib_resad.enrollment.photos import PhotoError, Reference

__all__ = [
    "Bank",
    "BankError",
    "BundleError",
    "Manifest",
    "PhotoError",
    "Prediction",
    "Reference",
    "Region",
    "ResADInferencer",
    "find_regions",
    "read_manifest",
]
