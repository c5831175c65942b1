# SPDX-License-Identifier: Apache-2.0

"""What only a training needs: the way of source photos, synthetic defects, seeds, the optimizer."""
