# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch.nn.functional import cosine_similarity

from anomalib_resad import ReferenceBank
from anomalib_resad.method.bank_record import BankRecord
from anomalib_resad.method.features import Features, rows_of, to_rows
from anomalib_resad.method.reference_bank import Metric, nearest, nearest_rows

METRICS: list[Metric] = ["l2", "cosine"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", [1, 31, 64, 1600, 1601, 2500])
def test_nearest_is_what_a_full_comparison_finds(metric: Metric, rows: int) -> None:
    queries, bank = random(50, 6), random(rows, 6, seed=1)
    full = -torch.cdist(queries, bank) if metric == "l2" else cosine_similarity(queries[:, None], bank[None], dim=2)
    assert torch.equal(nearest_rows(queries, bank, metric), full.argmax(dim=1))


@pytest.mark.parametrize("metric", METRICS)
def test_order_and_duplicates_of_references_change_nothing(metric: Metric) -> None:
    features, rows = random(2, 6, 5, 7), random(3000, 6, seed=1)
    matched = nearest(features, rows, metric)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(2))
    assert torch.equal(nearest(features, rows[order], metric), matched)
    assert torch.equal(nearest(features, torch.cat([rows, rows[:700]]), metric), matched)


@pytest.mark.parametrize("metric", METRICS)
def test_batch_composition_changes_no_bit(metric: Metric) -> None:
    features, rows = random(4, 6, 8, 8).float(), random(2000, 6, seed=1).float()
    alone = torch.cat([nearest(features[index : index + 1], rows, metric) for index in range(4)])
    assert torch.equal(nearest(features, rows, metric), alone)
    assert torch.equal(nearest(features.flip(0), rows, metric).flip(0), alone)


def test_layout_by_coordinates() -> None:
    """Features that say where they come from must come back to where they were."""
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    image = torch.stack([torch.stack([y, x, torch.full_like(y, 100 * index)]) for index in range(3)])  # (3, 3, 5, 7)
    rows = to_rows(image)
    assert rows[7 * 2 + 4].tolist() == [2, 4, 0]
    assert rows[35 + 7 * 2 + 4].tolist() == [2, 4, 100]
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(nearest(image, shuffled), image)


def filled(photos: int = 2) -> ReferenceBank:
    bank = ReferenceBank([4, 6])
    bank.fill(Features([random(photos, 4, 3, 3).float(), random(photos, 6, 2, 2).float()]))
    return bank


def test_save_and_load_whatever_the_size(tmp_path) -> None:
    bank, other = filled(5), filled(1)
    record = BankRecord("tiles", "folder", 2, 7, (("a.png", "0" * 64), ("b.png", "1" * 64)), 5, "auto", 8)
    bank.store(bank.rows, record)
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    other.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(bank.rows.values, other.rows.values, strict=True))
    assert other.record == record
    assert other.record.names == "a.png, b.png"


def test_records_of_version_0_1_are_read() -> None:
    """They were dictionaries, whose leave-one-out scores may be another estimator's."""
    bank = filled()
    files = [{"name": "a.png", "sha256": "0" * 64}]
    bank.set_extra_state({"category": "tiles", "k_shot": 1, "files": files, "rotations": 8, "leave_one_out": [1.0]})
    assert bank.record == BankRecord("tiles", None, 1, None, (("a.png", "0" * 64),), 1, None, 8)


def test_bad_banks_are_refused() -> None:
    bank = filled()
    before = [level.clone() for level in bank.rows.values]
    with pytest.raises(ValueError, match="NaN"):
        bank.fill(Features([torch.full((1, 4, 3, 3), float("nan")), torch.zeros(1, 6, 2, 2)]))
    with pytest.raises(ValueError, match=r"\(4, 6\)"):
        bank.fill(Features([torch.zeros(1, 5, 3, 3), torch.zeros(1, 6, 2, 2)]))
    with pytest.raises(ValueError, match="at least one photo"):
        bank.fill(Features([torch.zeros(0, 4, 3, 3), torch.zeros(0, 6, 2, 2)]))
    assert all(torch.equal(a, b) for a, b in zip(bank.rows.values, before, strict=True))
    with pytest.raises(RuntimeError, match="references="):
        ReferenceBank([4])(Features([torch.zeros(1, 4, 2, 2)]))
    with pytest.raises(ValueError, match="match='dot'"):
        ReferenceBank([4], metric="dot")


def keyed(photos: torch.Tensor, share: float | None = None) -> ReferenceBank:
    """A bank of joined levels, ``(K, 8, 4, 4)``, with as many keys."""
    bank = ReferenceBank([8], 8, "cosine")
    if share is not None:
        bank.share.fill_(share)
    bank.store(rows_of(Features([photos], photos)), BankRecord(photos=len(photos)))
    return bank


def test_half_of_each_photos_rows_are_searched() -> None:
    """Those that cover the others, whatever the other photos are; all of them where levels lie apart."""
    photos = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    bank = keyed(photos)
    assert (len(bank.rows.values[0]), len(bank.searched.values[0])) == (48, 24)
    alone = [keyed(photo[None]).searched.values[0] for photo in photos]
    assert torch.equal(bank.searched.values[0], torch.cat(alone))
    assert torch.equal(keyed(photos.flip(0)).searched.values[0], torch.cat(alone[::-1]))
    queries = Features([photos[:1] + 0.1], photos[:1] + 0.1)
    twice = keyed(torch.cat([photos, photos[:1]]))
    assert torch.equal(twice(queries)[0], bank(queries)[0]), "a photo that is there twice"
    assert not torch.equal(keyed(photos, share=1.0)(queries)[0], bank(queries)[0])
    apart = ReferenceBank([8])
    apart.fill(Features([photos]))
    assert len(apart.searched.values[0]) == 48
    reduced = keyed(photos)
    reduced.store(bank.searched, BankRecord(photos=5))
    assert len(reduced.searched.values[0]) == 24, "no whole photos: all of it"


def test_what_is_searched_is_saved_and_old_models_search_all() -> None:
    photos = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    state = keyed(photos, share=0.25).state_dict()
    assert not any("searched" in name for name in state)
    restored = ReferenceBank([8], 8, "cosine")
    restored.load_state_dict(state)
    assert torch.equal(restored.searched.values[0], keyed(photos, share=0.25).searched.values[0])
    del state["share"]
    restored.load_state_dict(state)
    assert len(restored.searched.values[0]) == 32
