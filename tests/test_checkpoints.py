# SPDX-License-Identifier: Apache-2.0

"""Checkpoint files: whole or refused, by every way in, on any machine."""

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.models import Padim

from anomalib_resad import ResAD, cli
from anomalib_resad.checkpoint_io import CHECKSUM, checksum
from anomalib_resad.export.edge_bundle import load_model
from tests.conftest import TINY, cross_category, product, quiet_engine, rewrite
from tests.test_backbone import Exploit


def resad() -> ResAD:
    return ResAD(**TINY, visualizer=False)


def ways(products: Path, folder: Path) -> dict[str, Callable[[Path], Any]]:
    """Every way in which a checkpoint is read."""
    tiles, photos = product(products, "tiles"), products / "tiles" / "test" / "good"
    both, fit = cross_category(products), quiet_engine(folder, max_epochs=2).fit
    return {
        "--model.checkpoint": lambda path: ResAD(checkpoint=path),
        "load_from_checkpoint": ResAD.load_from_checkpoint,
        "resad export": load_model,
        "test --ckpt_path": lambda path: quiet_engine(folder).test(resad(), datamodule=tiles, ckpt_path=path),
        "predict --ckpt_path": lambda path: quiet_engine(folder).predict(resad(), data_path=photos, ckpt_path=path),
        "fit --ckpt_path": lambda path: fit(resad(), datamodule=both, ckpt_path=path),
    }


WAYS = list(ways(Path(), Path()))


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_from_a_gpu_loads_without_one(way: str, trained: Path, products: Path, tmp_path: Path) -> None:
    content = torch.load(trained, weights_only=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:3")
        torch.save(content, tmp_path / "gpu.ckpt")
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / "gpu.ckpt", weights_only=True)
    ways(products, tmp_path)[way](tmp_path / "gpu.ckpt")


@pytest.fixture(scope="module")
def bad(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that are no checkpoint of a ResAD, or no longer, by what the message says of them."""
    folder = tmp_path_factory.mktemp("bad")
    whole = trained.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    content = torch.load(trained, weights_only=True)
    content["state_dict"]["model.estimator.constraintors.0.conv.weight"][0, 0, 0, 0] += 1e-3
    files = {
        "is damaged": whole[: len(whole) // 2],
        "does not match its checksum": bytes(flipped),
        "is damaged or no": b"",
        "or no trained ResAD file": b"\x89PNG no checkpoint",
    }
    paths = {message: folder / f"{index}.ckpt" for index, message in enumerate(files)}
    for message, path in paths.items():
        path.write_bytes(files[message])
    paths["does not match the checksum in it"] = folder / "altered.ckpt"
    torch.save(content, paths["does not match the checksum in it"])
    paths["would run code"] = folder / "unsafe.ckpt"
    torch.save({"state_dict": Exploit(folder / "pwned")}, paths["would run code"])
    paths["is no ResAD checkpoint"] = folder / "padim.ckpt"
    padim = Padim(backbone="resnet18", pre_trained=False)
    torch.save({"state_dict": {}, "hyper_parameters": dict(padim.hparams)}, paths["is no ResAD checkpoint"])
    return paths


@pytest.mark.parametrize("way", WAYS)
def test_bad_checkpoints_end_in_one_sentence(way: str, bad: dict[str, Path], products: Path, tmp_path: Path) -> None:
    """With the name of the file and the way out."""
    for message, path in bad.items():
        with pytest.raises(ValueError, match=rf"{path.name} .*{message}") as caught:
            ways(products, tmp_path)[way](path)
        assert re.search(r"Copy the file again|Train one with", str(caught.value))
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt: there is no such file"):
        ways(products, tmp_path)[way](tmp_path / "none.ckpt")
    assert not list(bad["would run code"].parent.glob("pwned"))


IMPOSSIBLE = {
    "_image_threshold=inf": {"_image_threshold": math.inf},
    "_image_threshold=nan": {"_image_threshold": math.nan},
    "_pixel_threshold=1e+30": {"_pixel_threshold": 1e30},
    "product_threshold=-inf": {"product_threshold": float(torch.tensor(-1e39))},
    "from image_min=2 to image_max=1": {"image_min": 2.0, "image_max": 1.0},
    "from pixel_min=nan to pixel_max=1": {"pixel_min": math.nan, "pixel_max": 1.0},
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_thresholds_that_cannot_be_are_refused_by_every_way(
    message: str, trained: Path, products: Path, tmp_path: Path
) -> None:
    content = torch.load(trained, weights_only=True)
    for name, value in IMPOSSIBLE[message].items():
        content["state_dict"][f"post_processor.{name}"].fill_(value)
    for checked in (True, False):
        path = rewrite(content, tmp_path / "impossible.ckpt", checked)
        for way in ways(products, tmp_path).values() if checked else [load_model]:
            with pytest.raises(ValueError, match=rf"impossible.ckpt holds thresholds .*{re.escape(message)}.* Train"):
                way(path)


def test_a_checkpoint_without_thresholds_is_one(trained: Path, tmp_path: Path) -> None:
    """Of a training without validation."""
    content = torch.load(trained, weights_only=True)
    for name, value in content["state_dict"].items():
        if name.startswith("post_processor."):
            value.fill_(math.nan)
    assert not load_model(rewrite(content, tmp_path / "none.ckpt")).post_processor.has_statistics


def test_no_traceback_in_resad_export(
    bad: dict[str, Path], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    content = torch.load(trained, weights_only=True)
    nonsense = {"backbone": "none_such", "sigma": "wide", "coupling_layers": {}, "match": 3, "layers": ["conv9"]}
    for name, value in nonsense.items():
        changed = content | {"hyper_parameters": content["hyper_parameters"] | {name: value}}
        bad = bad | {f"nonsense {name}": rewrite(changed, tmp_path / f"{name}.ckpt")}
    for path in bad.values():
        command = ["resad", "export", "--checkpoint", str(path), "--output", str(tmp_path / "bundle")]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        assert "Error: " in capsys.readouterr().err
        assert not (tmp_path / "bundle").exists()


def test_every_flipped_bit_is_noticed(trained: Path, tmp_path: Path) -> None:
    """In the tensors, the settings and what a resumed training needs; also where the file was saved anew."""
    whole, rng = trained.read_bytes(), np.random.default_rng(0)
    expected = torch.load(trained, weights_only=True)[CHECKSUM]
    refused = 0
    for position in rng.integers(len(whole), size=40):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        (tmp_path / "damaged.ckpt").write_bytes(damaged)
        try:
            model = ResAD.load_from_checkpoint(tmp_path / "damaged.ckpt")
        except ValueError:
            refused += 1
            continue
        del model  # a bit between the parts of the archive, which means nothing
        assert checksum(torch.load(tmp_path / "damaged.ckpt", weights_only=True)) == expected
    assert refused >= 38
    content = torch.load(trained, weights_only=True)
    tensors = [value for value in content["state_dict"].values() if isinstance(value, torch.Tensor) and value.numel()]
    tensors += [value for each in content["optimizer_states"][0]["state"].values() for value in each.values()]
    tensors = [tensor for tensor in tensors if tensor.is_contiguous()]  # of others, a flat one is a copy
    for tensor in (tensors[int(index)] for index in rng.integers(len(tensors), size=40)):
        flat = tensor.reshape(-1).view(torch.uint8)
        place = int(rng.integers(len(flat)))
        flat[place] ^= 1
        assert checksum(content) != expected
        flat[place] ^= 1
    for change in ({"epoch": 7}, {"hyper_parameters": content["hyper_parameters"] | {"sigma": 5.0}}):
        assert checksum(content | change) != expected
    assert checksum(content) == expected


def test_a_folder_that_cannot_be_written_is_named_before_the_first_epoch(
    products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ResAD, "on_train_start", lambda _: pytest.fail("features were computed"))
    (tmp_path / "file").touch()
    keep = ModelCheckpoint(dirpath=tmp_path / "file" / "weights")
    with pytest.raises(OSError, match=r"No checkpoint can be written: .*file.weights.*Choose another folder"):
        quiet_engine(tmp_path, max_epochs=1, callbacks=[keep]).fit(resad(), datamodule=cross_category(products))
