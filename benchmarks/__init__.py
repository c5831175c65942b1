# SPDX-License-Identifier: Apache-2.0

"""Slow work: the demo, and measurements."""
