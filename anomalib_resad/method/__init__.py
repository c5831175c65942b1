# SPDX-License-Identifier: Apache-2.0

"""The method, in PyTorch: backbone, matching, estimators, losses. Imports nothing of the package outside this folder.

Of anomalib it uses two plain modules (a buffer of changing size, a Gaussian blur), and neither Lightning nor its data.
"""
