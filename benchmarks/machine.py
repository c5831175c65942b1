# SPDX-License-Identifier: Apache-2.0

"""The machine that is measured, told without PyTorch."""

import platform
from pathlib import Path


def cpu() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
