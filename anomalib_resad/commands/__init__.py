# SPDX-License-Identifier: Apache-2.0

"""The commands of `resad`, one module for each kind. Only those of `export` need PyTorch."""
