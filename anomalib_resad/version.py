# SPDX-License-Identifier: Apache-2.0

"""The version, in a module that can be read without importing the package."""

__version__ = "0.2.0.dev0"
