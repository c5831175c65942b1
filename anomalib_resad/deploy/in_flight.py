# SPDX-License-Identifier: Apache-2.0

"""Several photos at a time: while one is decoded, others are encoded or compared with their references.

A small pool of threads does it, each with an infer request of its own for as long as it runs a model. OpenVINO's
``AsyncInferQueue`` would do so with callbacks, but ended the process with OpenVINO 2026.4.1.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
MOST_USUAL = 4  # more streams hold more photos in memory


def usual_streams() -> int:
    """How many streams do most photos in a second on this machine, for work that nobody waits for photo by photo."""
    return min(MOST_USUAL, os.cpu_count() or 1)


def in_order(work: Callable[[T], R], items: Iterable[T], at_once: int) -> Generator[R, None, None]:
    """What is made of each item, in the order of the items, which are only taken when there is room for them.

    Besides those that are being worked on, one finished result may wait to be taken. The first error ends it.

    Args:
        work (Callable[[T], R]): What is done with an item; called in several threads.
        items (Iterable[T]): Read in the thread of the caller.
        at_once (int): Items that are worked on at the same time.
    """
    if at_once == 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(at_once)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # also where the caller takes no more
