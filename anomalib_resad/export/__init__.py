# SPDX-License-Identifier: Apache-2.0

"""From PyTorch to other runtimes: bundles for the edge, anomalib's own exports, and how far they differ."""
