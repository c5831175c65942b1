# SPDX-License-Identifier: Apache-2.0

"""Several photos at a time: the same scores, in order, and never more in memory than said."""

import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from anomalib_resad.deploy import PhotoError, ResADInferencer, runtime
from anomalib_resad.deploy.in_flight import in_order
from anomalib_resad.deploy.journal import Journal
from anomalib_resad.deploy.runtime import Requests
from anomalib_resad.deploy.watching import FolderWatch
from tests.conftest import hold_inspections
from tests.test_watch import wait_for


@pytest.fixture
def several(bundle: Path, tmp_path: Path, good: list[Path]) -> ResADInferencer:
    """Two streams, and a product."""
    opened = ResADInferencer(bundle, banks=tmp_path / "banks", streams=2)
    opened.enroll("tiles", good[:2], rotations=1)
    return opened


def test_scores_are_the_same_bit_for_bit(several: ResADInferencer, bundle: Path, new: list[Path]) -> None:
    single = ResADInferencer(bundle, banks=several.banks)
    photos = new * 4
    alone = {photo: single.predict(photo, "tiles") for photo in new}
    for photo, found in zip(photos, several.predict_batch(photos, "tiles"), strict=True):
        assert found.raw_score == alone[photo].raw_score
        assert found.size == alone[photo].size
        np.testing.assert_array_equal(found.map, alone[photo].map)


def test_photos_are_read_as_results_are_taken(several: ResADInferencer, new: list[Path]) -> None:
    read: list[Path] = []

    def reading() -> Iterator[Path]:
        for photo in new * 10:
            read.append(photo)
            yield photo

    found = several.predict_batch(reading(), "tiles")
    for taken in range(1, 4):
        next(found)
        assert len(read) == taken + several.in_flight
    found.close()
    assert threading.active_count() < 10, "its threads end with it"
    with pytest.raises(ValueError, match="'none' is not enrolled"):  # before anything is taken
        several.predict_batch(new, "none")


def test_a_photo_that_cannot_be_used_ends_it_in_its_place(several: ResADInferencer, new: list[Path]) -> None:
    found = several.predict_batch([new[0], b"none", new[1]], "tiles")
    assert next(found).raw_score == several.predict(new[0], "tiles").raw_score
    with pytest.raises(PhotoError):
        next(found)


@pytest.mark.parametrize("at_once", [1, 3])
def test_work_is_shared_and_comes_in_order(at_once: int) -> None:
    """Each of the first ones waits until all places are taken; a single place is the thread of the caller."""
    together, threads = threading.Barrier(at_once), set()

    def work(item: int) -> int:
        threads.add(threading.get_ident())
        if item < at_once:
            together.wait(30)
        return -item

    assert list(in_order(work, range(50), at_once)) == [-item for item in range(50)]
    assert len(threads) == at_once
    assert (threading.get_ident() in threads) == (at_once == 1)


@pytest.mark.parametrize("streams", [0, True, 1.5])
def test_impossible_streams(bundle: Path, streams: Any) -> None:
    with pytest.raises(ValueError, match="must be a whole number of at least 1"):
        ResADInferencer(bundle, streams=streams)


def test_requests_share_the_places_of_photos(
    several: ResADInferencer, good: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests of four photos: three photos are in work, of both, and each request has its answer in order."""
    testclient = pytest.importorskip("fastapi.testclient", reason="the extra [api] is not installed")
    from anomalib_resad.deploy.api import application  # noqa: PLC0415  # an extra

    entered, leave = hold_inspections(several, monkeypatch)
    answers: list[list[str]] = []
    sent = [("photos", (path.name, path.read_bytes())) for path in good[:4]]
    with testclient.TestClient(application(several), base_url="http://127.0.0.1") as client:

        def ask() -> None:
            results = client.post("/v1/products/tiles/inspect", files=sent).json()["results"]
            answers.append([each["photo"] for each in results])

        asking = [threading.Thread(target=ask) for _ in range(2)]
        for thread in asking:
            thread.start()
        for _ in range(several.in_flight):
            assert entered.acquire(timeout=60)
        assert not entered.acquire(timeout=0.3)
        leave.set()
        for thread in asking:
            thread.join()
    assert answers == [[path.name for path in good[:4]]] * 2


def test_a_watched_folder_keeps_its_order(several: ResADInferencer, new: list[Path], tmp_path: Path) -> None:
    """Also where a photo is broken, which is looked at again later."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number, photo in enumerate(new):
        (folder / f"{number}.png").write_bytes(photo.read_bytes())
    (folder / "0.png").write_bytes(b"none")
    with Journal(tmp_path / "out") as journal:
        watching = FolderWatch(
            folder, journal, lambda content: several.inspect(content, "tiles"), lambda *_: None, 0.01, 0.02, at_once=3
        )
        while len(journal.recorded) < len(new):
            watching.look()
        rows = journal.path.read_text().splitlines()
    names = [each.split('"photo": "')[1].split('"')[0] for each in rows]
    assert names == [*(f"{number}.png" for number in range(1, len(new))), "0.png"]


def test_who_waits_longest_is_next() -> None:
    """Else a client that asks without a pause keeps others waiting for seconds."""
    request: Any = object()
    requests, order = Requests([request]), []

    def ask(name: str) -> None:
        taken = requests.take()
        order.append(name)
        requests.give(taken)

    assert requests.take() is request
    threads = [threading.Thread(target=ask, args=(name,)) for name in ("first", "second")]
    for number, thread in enumerate(threads):
        thread.start()
        wait_for(lambda number=number: len(requests._waiting) == number + 1, "a thread that waits")
    requests.give(request)
    ask("who gave it")
    assert order == ["first", "second", "who gave it"]
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("given", [False, True], ids=["before", "as it was given"])
def test_who_gives_up_waiting_loses_no_request(monkeypatch: pytest.MonkeyPatch, given: bool) -> None:
    request: Any = object()
    requests = Requests([request])
    requests.take()

    class Stopped(BaseException):  # as Ctrl-C, which would end the tests
        pass

    class Interrupted(SimpleQueue):  # type: ignore[type-arg]
        def get(self, *_: Any) -> Any:
            if not self.empty():
                return super().get()
            if given:
                requests.give(request)
            raise Stopped

    monkeypatch.setattr(runtime, "SimpleQueue", Interrupted)
    with pytest.raises(Stopped):
        requests.take()
    if not given:
        requests.give(request)
    assert requests.take() is request
