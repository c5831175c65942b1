# SPDX-License-Identifier: Apache-2.0

"""What a bank's file of the default model keeps beside its rows: which of them are searched."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from anomalib_resad.deploy import BankError, ResADInferencer
from anomalib_resad.deploy import bank_rows as rows_of_banks
from anomalib_resad.deploy.bank import SEARCHED, Bank
from anomalib_resad.deploy.bank_reading import check_bank
from anomalib_resad.enrollment.coreset import searched


@pytest.fixture
def enrolled(bundle_default: Path, good: list[Path], tmp_path: Path) -> ResADInferencer:
    inferencer = ResADInferencer(bundle_default, banks=tmp_path / "banks", threads=1)
    inferencer.enroll("tiles", good[:3], rotations=1)
    return inferencer


def of_earlier_versions(bank: Bank) -> Bank:
    """The same bank as they wrote it."""
    return replace(bank, arrays={name: rows for name, rows in bank.arrays.items() if name != SEARCHED})


def test_the_choice_is_that_of_the_search(enrolled: ResADInferencer) -> None:
    file = load_file(enrolled.banks / "tiles.safetensors")
    chosen = searched(file["rows_2"], 3, enrolled.manifest.searched)
    assert np.array_equal(np.flatnonzero(file[SEARCHED]), chosen)
    assert len(chosen) == len(file["rows_2"]) // 2


def test_opening_a_bank_chooses_nothing(
    enrolled: ResADInferencer, new: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choosing rows takes longer than inspecting a photo; a device with many products opens banks all the time."""
    expected = enrolled.predict(new[0], "tiles").score

    def refuse(*_: object) -> np.ndarray:
        pytest.fail("rows were chosen anew")

    monkeypatch.setattr(rows_of_banks, "searched", refuse)
    reopened = ResADInferencer(enrolled.bundle, banks=enrolled.banks, threads=1)
    assert reopened.predict(new[0], "tiles").score == expected


@pytest.mark.parametrize("most", [None, 50])
def test_banks_of_earlier_versions_score_alike(
    enrolled: ResADInferencer, good: list[Path], new: list[Path], most: int | None
) -> None:
    """They hold no choice, which is made as they are read. A changed one is written as this version writes it."""
    bank = enrolled.enroll("tiles", good[:3], rotations=1, max_patches=most, replace_existing=True)
    expected, added = enrolled.predict(new[0], "tiles"), enrolled.add("tiles", good[3:4])
    of_earlier_versions(bank).save(enrolled.banks / "tiles.safetensors")
    found = enrolled.predict(new[0], "tiles")
    assert found.raw_score == expected.raw_score
    np.testing.assert_array_equal(found.map, expected.map)
    now = enrolled.add("tiles", good[3:4])
    assert now.content == added.content


@pytest.mark.parametrize(
    "change",
    [
        lambda chosen: chosen * 2,
        lambda chosen: chosen * 0,
        lambda chosen: chosen[1:],
        lambda chosen: chosen.astype(np.float32),
        lambda chosen: np.roll(chosen * (np.arange(len(chosen)) > 0), 1),
        np.sort,
    ],
    ids=["2", "none", "too short", "float", "one less", "more of one photo"],
)
def test_a_choice_that_is_none_is_refused(
    enrolled: ResADInferencer, new: list[Path], change: Callable[[np.ndarray], np.ndarray]
) -> None:
    bank = enrolled.bank("tiles")
    changed = bank.arrays | {SEARCHED: change(bank.arrays[SEARCHED])}
    replace(bank, arrays=changed).save(enrolled.banks / "tiles.safetensors")
    with pytest.raises(BankError, match=r"no list of 0 and 1, as many of each photo\. Enroll again"):
        enrolled.predict(new[0], "tiles")


def test_levels_that_are_searched_apart_have_none(bundle: Path, good: list[Path], tmp_path: Path) -> None:
    inferencer = ResADInferencer(bundle, banks=tmp_path, threads=1)
    bank = inferencer.enroll("tiles", good[:3], rotations=1, max_patches=50)
    assert SEARCHED not in bank.arrays
    chosen = bank.arrays | {SEARCHED: np.ones(len(bank.arrays["rows_2"]), np.uint8)}
    with pytest.raises(BankError, match="no list of 0 and 1"):
        check_bank(replace(bank, arrays=chosen), inferencer.manifest, "bank")
