# SPDX-License-Identifier: Apache-2.0

"""One file for one product: the verdicts of the edge, in whatever precision a device computes by itself."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from anomalib_resad.deploy import BankError, ResADInferencer
from anomalib_resad.deploy.bake import _check, bake
from anomalib_resad.deploy.bundle import ENCODER, Scale, read_bundle, read_manifest
from anomalib_resad.enrollment.files import content_hash
from anomalib_resad.enrollment.photos import read_pixels
from anomalib_resad.export.quantization import quantize_encoder
from tests.test_export import precisions


@pytest.fixture(scope="module")
def enrolled(bundle_default: Path, good: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ResADInferencer:
    """Of four photos, so that neighborhoods are judged too."""
    inferencer = ResADInferencer(bundle_default, banks=tmp_path_factory.mktemp("banks"))
    inferencer.enroll("tiles", good[:4])
    return inferencer


def compare(
    path: Path, inferencer: ResADInferencer, photos: list[Path], like: str = "uint8 rgb", atol: float = 1e-4
) -> None:
    """What a compiled file says of photos, against the runtime of the edge."""
    pixels, color = like.split()
    compiled = ov.Core().compile_model(path, "CPU")  # bfloat16 on CPUs that have it, unless the file says otherwise
    for photo in photos:
        expected = inferencer.predict(photo, "tiles")
        values = read_pixels(photo)[None, ..., :: -1 if color == "bgr" else 1]
        if pixels == "float32":
            values = values.transpose(0, 3, 1, 2) / np.float32(255)
        found = compiled({"input": np.ascontiguousarray(values)})
        assert found["pred_score"].shape == found["pred_label"].shape == (1,)
        assert found["pred_score"].item() == pytest.approx(expected.score, abs=1e-4)
        assert found["pred_label"].item() == expected.label
        assert found["pred_label"].dtype == found["pred_mask"].dtype == np.uint8
        np.testing.assert_allclose(found["anomaly_map"][0, 0], expected.map, atol=atol)
        assert np.array_equal(found["pred_mask"], found["anomaly_map"] > 0.5)


@pytest.mark.parametrize("like", ["uint8 rgb", "uint8 bgr", "float32 rgb", "float32 bgr"])
def test_verdicts_of_the_edge(enrolled: ResADInferencer, new: list[Path], tmp_path: Path, like: str) -> None:
    pixels, color = like.split()
    path = bake(enrolled.bundle, "tiles", tmp_path / "tiles", enrolled.banks, pixels, color)
    assert path == tmp_path / "tiles" / "1" / "model.xml"
    compare(path, enrolled, new, like)
    assert not {name for name, kind in precisions(path).items() if kind in ("bf16", "f16")}, "all in float32"
    model = ov.Core().read_model(path)
    assert model.input(0).get_node().layout == ov.Layout("NHWC" if pixels == "uint8" else "NCHW")


def test_papers_model_and_batches(
    inferencer: ResADInferencer, good: list[Path], new: list[Path], tmp_path: Path
) -> None:
    """Three levels of features, each with rows of its own, 16 of them in the last; photos of one size together."""
    inferencer.enroll("tiles", good[:1])
    path = bake(inferencer.bundle, "tiles", tmp_path / "tiles", inferencer.banks)
    compare(path, inferencer, new)
    assert not {name for name, kind in precisions(path).items() if kind in ("bf16", "f16")}
    photos = np.stack([read_pixels(photo) for photo in new[:3]])
    together = ov.Core().compile_model(path, "CPU")(photos)
    alone = [inferencer.predict(photo, "tiles").score for photo in new[:3]]
    np.testing.assert_allclose(together["pred_score"], alone, atol=1e-4)


def test_its_own_threshold(enrolled: ResADInferencer, good: list[Path], new: list[Path], tmp_path: Path) -> None:
    """It moves the threshold of the map too, and a file is of the bank as it was."""
    inferencer = ResADInferencer(enrolled.bundle, banks=tmp_path / "banks")
    inferencer.enroll("tiles", good[:3])
    raw = sorted(inferencer.predict(photo, "tiles").raw_score for photo in new)
    inferencer.set_threshold("tiles", (raw[0] + raw[1]) / 2)
    path = bake(inferencer.bundle, "tiles", tmp_path / "tiles", inferencer.banks)
    labels = [inferencer.predict(photo, "tiles").label for photo in new]
    assert labels.count(False) == 1
    compare(path, inferencer, new)
    information = ov.Core().read_model(path).get_rt_info("resad").astype(dict)
    assert information["threshold"].astype(float) == pytest.approx((raw[0] + raw[1]) / 2)
    assert information["product"].astype(str) == "tiles"
    assert information["bank"].astype(str) == inferencer.bank("tiles").checksum
    assert information["model"].astype(str) == inferencer.manifest.model


def test_eight_bits(bundle_default: Path, good: list[Path], new: list[Path], tmp_path: Path) -> None:
    """The encoder's convolutions stay in 8 bits, with the features of the edge."""
    manifest = read_manifest(bundle_default)
    folder = tmp_path / "int8"
    folder.mkdir()
    for file in ("detector.xml", "detector.bin"):
        (folder / file).write_bytes((bundle_default / file).read_bytes())
    encoder = quantize_encoder(
        ov.Core().read_model(bundle_default / ENCODER), [read_pixels(each)[None] for each in good]
    )
    ov.save_model(encoder, folder / ENCODER, compress_to_fp16=True)
    files = {name: content_hash(folder / name) for name in manifest.files}
    replace(manifest, precision="int8", files=files).write(folder)
    inferencer = ResADInferencer(folder)
    inferencer.enroll("tiles", good[:3])
    # Where rounding of pixels takes a value to the next of 256 steps; CPUs without AVX512 differ most.
    compare(bake(folder, "tiles", tmp_path / "tiles"), inferencer, new, atol=1e-3)


def test_versions_are_written_whole(enrolled: ResADInferencer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "models" / "tiles"

    def once(_: int) -> str:
        return bake(enrolled.bundle, "tiles", output, enrolled.banks).parent.name

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(once, range(2))) == ["1", "2"], "two at the same time take two numbers"
    assert bake(enrolled.bundle, "tiles", output / "7", enrolled.banks).parent == output / "7"
    assert once(0) == "8"
    with pytest.raises(FileExistsError, match="nothing was changed"):
        bake(enrolled.bundle, "tiles", output / "7", enrolled.banks)

    def full(*_: object) -> None:
        msg = "no space left on the device"
        raise OSError(msg)

    monkeypatch.setattr("anomalib_resad.deploy.bake.save_in_float32", full)
    with pytest.raises(OSError, match="no space"):
        once(0)
    assert sorted(path.name for path in output.glob("[!.]*")) == ["1", "2", "7", "8"]
    assert not list(output.glob(".*.part"))
    assert sorted(path.name for path in (output / "8").iterdir()) == ["model.bin", "model.xml"]


def test_what_cannot_be_baked(enrolled: ResADInferencer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'pill' is not enrolled\. Enrolled: tiles"):
        bake(enrolled.bundle, "pill", tmp_path / "pill", enrolled.banks)
    with pytest.raises(ValueError, match="pixels='float16'"):
        bake(enrolled.bundle, "tiles", tmp_path / "tiles", enrolled.banks, pixels="float16")  # type: ignore[arg-type]
    banks = tmp_path / "banks"
    banks.mkdir()
    (banks / "tiles.safetensors").write_bytes(b"no bank")
    with pytest.raises(BankError, match="truncated or no bank"):
        bake(enrolled.bundle, "tiles", tmp_path / "tiles", banks)
    manifest = replace(enrolled.manifest, score=Scale(None, None, None), map=Scale(None, None, None))
    _, files = read_bundle(enrolled.bundle)
    monkeypatch.setattr("anomalib_resad.deploy.bake.read_bundle", lambda _: (manifest, files))
    with pytest.raises(ValueError, match="No threshold is known for 'tiles'"):
        bake(enrolled.bundle, "tiles", tmp_path / "tiles", enrolled.banks)
    reduced = replace(enrolled.manifest, precision="bf16")
    with pytest.raises(ValueError, match="'tiles' was enrolled with a backbone in bfloat16"):
        _check(reduced, enrolled.bank("tiles"))
    assert not (tmp_path / "tiles").exists()
    assert not (tmp_path / "pill").exists()


def test_the_command(enrolled: ResADInferencer, tmp_path: Path) -> None:
    """Without PyTorch and anomalib."""
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "anomalib", "lightning", "timm"):
            raise ImportError("must not be imported: " + name)
sys.meta_path.insert(0, Blocked())
from anomalib_resad.cli import main
main()
"""
    command = [sys.executable, "-c", code, "bake", "--bundle", enrolled.bundle, "--banks", enrolled.banks]
    command += ["--product", "tiles", "--output", tmp_path / "models" / "tiles", "--color", "bgr"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'models' / 'tiles' / '1'}: tiles, " in done.stdout
    assert (tmp_path / "models" / "tiles" / "1" / "model.bin").is_file()
