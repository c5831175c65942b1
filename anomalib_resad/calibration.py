# SPDX-License-Identifier: Apache-2.0

"""Where version 0.1.0 had the thresholds of exported models; they live in ``enrollment.thresholds`` now."""

from anomalib_resad.enrollment.thresholds import Thresholds

__all__ = ["Thresholds"]
