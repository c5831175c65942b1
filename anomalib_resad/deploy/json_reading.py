# SPDX-License-Identifier: Apache-2.0

"""JSON from files that somebody may have written."""

import json
import math
from typing import Any


def strict_json(text: str | bytes) -> Any:  # noqa: ANN401
    """Read JSON; no key may stand there twice, and every number is finite.

    Raises:
        ValueError: If it is not so.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            msg = f"a key stands there twice, among {[key for key, _ in pairs]}"
            raise ValueError(msg)
        return dict(pairs)

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            msg = f"{number} is no number that could be used"
            raise ValueError(msg)
        return float(number)

    return json.loads(text, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
