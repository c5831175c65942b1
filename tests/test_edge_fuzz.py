# SPDX-License-Identifier: Apache-2.0

"""Banks and manifests that were damaged at random: refused by their named error, or what was written."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from anomalib_resad.deploy.bank import ENTRY, Bank, BankError, checksum_of
from anomalib_resad.deploy.bank_reading import read_bank
from anomalib_resad.deploy.bundle import FILES, BundleError, Level, Manifest, Scale, read_bundle
from anomalib_resad.enrollment.photos import Reference

LEVELS = (Level(4, 2, 3), Level(3, 1, 1))
MANIFEST = Manifest(
    model="a" * 64,
    precision="fp16",
    backbone="resnet18",
    image_size=(64, 48),
    levels=LEVELS,
    keyed=False,
    rotations="auto",
    row_multiple=32,
    score=Scale(1.5, 0.25, 3.0),
    map=Scale(1.25, None, None),
    label_above=0.5,
    versions={"torch": "2.14"},
    files=dict.fromkeys(FILES, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),  # empty ones
)
BANK = Bank(
    "Prüfteil 1",
    MANIFEST.encoder,
    (Reference("a.png", "0" * 64), Reference("caf\udce9.png", "1" * 64)),
    {f"rows_{n}": np.random.default_rng(n).random((2 * each.patches, each.channels)) for n, each in enumerate(LEVELS)},
    threshold=1.75,
)
BANK.arrays.update({name: rows.astype(np.float32) for name, rows in BANK.arrays.items()})
BOUNDED = settings(max_examples=250, deadline=5000, derandomize=True, suppress_health_check=list(HealthCheck))
DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "move"]),
        st.integers(0, 900) | st.integers(0, 5000),
        st.integers(0, 7),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=3,
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
Damage = list[tuple[str, int, int, bytes]]


def damaged(content: bytes, damage: Damage) -> bytes:
    for kind, where, bit, inserted in damage:
        at = where % max(1, len(content))
        if kind == "flip":
            content = content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :] if content else content
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + inserted + content[at:]
        else:
            content = content[at:] + content[:at]
    return content


def bank_of(content: bytes) -> Bank:
    with TemporaryDirectory() as folder:
        (Path(folder) / "bank").write_bytes(content)
        return read_bank(Path(folder) / "bank", MANIFEST)


def written(write: Callable[[Path], object], name: str) -> bytes:
    with TemporaryDirectory() as folder:
        write(Path(folder))
        return (Path(folder) / name).read_bytes()


def manifest_of(content: bytes) -> Manifest:
    with TemporaryDirectory() as folder:
        (Path(folder) / "manifest.json").write_bytes(content)
        for name in FILES:
            (Path(folder) / name).touch()
        return read_bundle(Path(folder))[0]


WHOLE_BANK = written(lambda folder: BANK.save(folder / "bank"), "bank")
WHOLE_MANIFEST = written(MANIFEST.write, "manifest.json")
TEXTS = BANK._metadata()


def same(bank: Bank, other: Bank) -> bool:
    plain = [each.name for each in fields(Bank) if each.name != "arrays"]
    arrays = bank.arrays.keys() == other.arrays.keys() and all(
        np.array_equal(rows, other.arrays[name]) for name, rows in bank.arrays.items()
    )
    return arrays and all(getattr(bank, name) == getattr(other, name) for name in plain)


def test_what_is_whole_is_read() -> None:
    assert same(bank_of(WHOLE_BANK), BANK)
    assert manifest_of(WHOLE_MANIFEST) == MANIFEST
    earlier = save(BANK.arrays, TEXTS | {"checksum": BANK.checksum})
    assert same(bank_of(earlier), BANK), "banks of 0.1.0 have an entry for each text"


@BOUNDED
@given(damage=DAMAGE)
def test_banks_of_damaged_bytes(damage: Damage) -> None:
    try:
        assert same(bank_of(damaged(WHOLE_BANK, damage)), BANK)
    except BankError:
        return


@BOUNDED
@given(name=st.sampled_from([*TEXTS, "checksum", "more"]), value=VALUES, sealed=st.booleans(), as_text=st.booleans())
def test_banks_of_other_metadata(name: str, value: Any, sealed: bool, as_text: bool) -> None:
    """Also where somebody sealed it: then every value is of its type, and every number finite."""
    metadata: dict[str, Any] = {**TEXTS, "checksum": BANK.checksum, name: json.dumps(value) if as_text else value}
    if sealed:
        content = {key: each for key, each in metadata.items() if key != "checksum"}
        metadata["checksum"] = checksum_of(content, BANK.arrays)
    try:
        bank = bank_of(save(BANK.arrays, {ENTRY: json.dumps(metadata)}))
    except BankError:
        return
    if not sealed:
        assert same(bank, BANK)
    assert all(type(each) is int for each in (bank.rotations, bank.bit_depth, bank.max_patches or 1))
    assert bank.threshold is None or abs(bank.threshold) < 1e30
    assert all(isinstance(each, str) for each in (bank.product, bank.encoder))
    assert bank.references == BANK.references


@BOUNDED
@given(
    level=st.sampled_from(sorted(BANK.arrays)), row=st.integers(0, 1), value=st.sampled_from([0, 2e19, np.nan, -np.inf])
)
def test_banks_of_impossible_rows(level: str, row: int, value: float) -> None:
    rows = BANK.arrays[level].copy()
    rows[row] = value
    arrays = BANK.arrays | {level: rows}
    with pytest.raises(BankError, match="holds NaN, infinity, huge rows or rows of zeros"):
        bank_of(save(arrays, {ENTRY: json.dumps(TEXTS | {"checksum": checksum_of(TEXTS, arrays)})}))


@BOUNDED
@given(damage=DAMAGE)
def test_manifests_of_damaged_bytes(damage: Damage) -> None:
    try:
        assert manifest_of(damaged(WHOLE_MANIFEST, damage)) == MANIFEST
    except BundleError:
        return


@BOUNDED
@given(name=st.sampled_from(sorted(json.loads(WHOLE_MANIFEST))), value=VALUES, inside=st.booleans(), old=st.booleans())
def test_manifests_of_other_values(name: str, value: Any, inside: bool, old: bool) -> None:
    """As this version writes them, and without a checksum as 0.1.0 did: then all values are of their types."""
    content = json.loads(WHOLE_MANIFEST)
    if old:
        for key in ("checksum", "weights", "folder"):
            del content[key]
    if inside and isinstance(content.get(name), dict):
        content[name][min(content[name])] = value
    else:
        content[name] = value
    try:
        manifest = manifest_of(json.dumps(content).encode())
    except BundleError:
        return
    if not old:
        assert manifest == MANIFEST
    assert isinstance(manifest.keyed, bool)
    assert all(each is None or abs(each) < 1e30 for each in (manifest.score.threshold, manifest.score.low))
