# SPDX-License-Identifier: Apache-2.0

"""Names of products: letters of all scripts, one form of each, and files of that name everywhere."""

import unicodedata
from pathlib import Path

import pytest

from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.deploy.bank import bank_file, product_name


@pytest.mark.parametrize(
    "name",
    [
        "Prüfteil 1",
        "产品",
        "किताब",
        "ผลิตภัณฑ์",
        "உற்பத்தி",
        "מוצר",
        "قطعة",
        "제품",
        "a.b (2)+-_",
        "_x",
        "com",
        "CON1",
        "é" * 100,
    ],
)
def test_letters_of_all_scripts_are_accepted(name: str) -> None:
    for form in ("NFC", "NFD"):
        given = unicodedata.normalize(form, name)
        assert product_name(given) == unicodedata.normalize("NFC", name)
        assert bank_file(Path(), given) == bank_file(Path(), name)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        *((each, "Windows takes") for each in ("CON", "nul", "Com1", "LPT9.png", "aux.tar.gz", "con .x", "COM¹")),
        *((each, "cannot be the name") for each in ("", ".a", "a.", "a ", " a", "-a", "a/b", "a\\b", "a:b")),
        *((each, "cannot be the name") for each in ("..", "a\tb", "a*", "a\n", "💡", "a\u200d", "a*" * 9999)),
        *((each, "cannot be the name") for each in ("a\x00", "a\u202eb", "\u0301a", "caf\udce9")),
        ("产" * 67, "takes 201 bytes in UTF-8; names of products take 200"),
        ("a" * 100_000, "takes 100000 bytes"),
    ],
)  # fmt: skip
def test_other_names_are_refused_with_the_reason(name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as refused:
        product_name(name)
    assert len(str(refused.value)) < 400


def test_both_forms_of_a_name_are_one_product(inferencer: ResADInferencer, good: list[Path]) -> None:
    composed, apart = (unicodedata.normalize(form, "Prüfteil é") for form in ("NFC", "NFD"))
    assert inferencer.enroll(apart, good[:1], rotations=1).product == composed
    with pytest.raises(ValueError, match="enrolled already"):
        inferencer.enroll(composed, good[:1])
    assert inferencer.products == [composed]
    assert len(inferencer.add(apart, good[1:2]).references) == 2
    assert inferencer.predict(good[2], apart).score == inferencer.predict(good[2], composed).score
    assert inferencer.set_threshold(apart, 1.0).product == composed
    inferencer.remove(apart)
    assert inferencer.products == []


def test_the_longest_name_is_written(inferencer: ResADInferencer, good: list[Path]) -> None:
    name = "产" * 66 + "ab"
    inferencer.enroll(name, good[:1], rotations=1)
    assert 0 < inferencer.predict(good[1], name).score < 1
