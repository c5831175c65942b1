# SPDX-License-Identifier: Apache-2.0

"""The tests. What stands here happens before anything is imported that reads it."""

import os

# Two workers share two cores: with more threads each, they would wait for each other at every matrix product.
os.environ["OMP_NUM_THREADS"] = "1"
