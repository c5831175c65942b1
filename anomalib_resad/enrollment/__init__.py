# SPDX-License-Identifier: Apache-2.0

"""What training, evaluation and the edge do alike with photos, banks and thresholds. Without PyTorch and anomalib."""
