# SPDX-License-Identifier: Apache-2.0

"""Datamodules for anomalib: products in MVTec AD's layout, and many source categories with one target."""
