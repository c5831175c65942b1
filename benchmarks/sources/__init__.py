# SPDX-License-Identifier: Apache-2.0

"""Source products in number, drawn from seeds: what a model is trained on when few labeled products are at hand."""
