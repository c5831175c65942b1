# SPDX-License-Identifier: Apache-2.0

"""A bundle as one file: the same in every command, and refused unless it is what was packed."""

import shutil
import stat
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from anomalib_resad.commands.bundle import info, pack, verify
from anomalib_resad.deploy import BundleError, ResADInferencer
from anomalib_resad.deploy.bundle import FILES, read_bundle
from anomalib_resad.deploy.packed import packed
from anomalib_resad.enrollment.files import content_hash
from tests.test_edge_commands import resad


def test_a_packed_bundle_is_the_bundle(
    bundle: Path, good: list[Path], new: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same scores; equal bundles are equal files, and any program unpacks them to a bundle."""
    file, again = tmp_path / "model.resad", tmp_path / "new" / "again.resad"
    pack(bundle, file)
    pack(bundle, again)
    assert file.read_bytes() == again.read_bytes()
    assert content_hash(file) in (said := " ".join(capsys.readouterr().out.split()))
    verify(file)
    info(file)
    told = " ".join(capsys.readouterr().out.split())
    assert content_hash(file) in told
    assert "resnet18" in told
    assert "SHA-256" in said
    with pytest.raises(FileExistsError, match="nothing was changed"):
        pack(bundle, file)
    of_file, of_folder = ResADInferencer(file), ResADInferencer(bundle, banks=tmp_path / "banks")
    assert of_file.manifest == of_folder.manifest
    for each in (of_file, of_folder):
        each.enroll("tiles", good[:2], rotations=1)
    assert (tmp_path / "model.resad.banks" / "tiles.safetensors").is_file(), "beside the file"
    assert of_file.predict(new[0], "tiles").raw_score == of_folder.predict(new[0], "tiles").raw_score
    with zipfile.ZipFile(file) as archive:
        assert {each.date_time[0] for each in archive.infolist()} == {1980}, "no date of its own"
        archive.extractall(tmp_path / "unpacked")  # what this test packed
    assert read_bundle(tmp_path / "unpacked") == read_bundle(bundle)


def test_as_a_command(bundle: Path, tmp_path: Path) -> None:
    """Without PyTorch; a bundle that replaced another has its files in a folder."""
    folder, file = tmp_path / "replaced", tmp_path / "model.resad"
    manifest, _ = read_bundle(bundle)
    inner = f"model-{32 * '0'}"
    (folder / inner).mkdir(parents=True)
    for name in FILES:
        shutil.copy(bundle / name, folder / inner)
    replace(manifest, folder=inner).write(folder)
    assert "MB, SHA-256" in resad("bundle", "pack", "--bundle", folder, "--output", file)
    assert "model.resad is whole: 5 files" in resad("bundle", "verify", "--bundle", file)
    assert "product" in resad("products", "--bundle", file)
    assert "README.md is damaged, or no packed bundle" in resad(
        "bundle", "verify", "--bundle", Path(__file__).parent / "README.md", status=2
    )


def test_a_packed_bundle_that_is_replaced_is_noticed(bundle: Path, good: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "model.resad"
    pack(bundle, file)
    inferencer = ResADInferencer(file)
    inferencer.enroll("tiles", good[:1], rotations=1)
    manifest, contents = read_bundle(bundle)
    replace(manifest, label_above=0.6).write(tmp_path)
    file.write_bytes(packed(contents | {"manifest.json": (tmp_path / "manifest.json").read_bytes()}))
    with pytest.raises(BundleError, match="was replaced after it was opened"):
        inferencer.predict(good[0], "tiles")
    file.unlink()  # moved away: what was checked goes on
    assert ResADInferencer(bundle, banks=tmp_path / "model.resad.banks").predict(good[0], "tiles").score < 1


def twice(archive: zipfile.ZipFile) -> None:
    archive.writestr("encoder.xml", b"other")


def outside(archive: zipfile.ZipFile) -> None:
    archive.writestr("../encoder.xml", b"other")


def link(archive: zipfile.ZipFile) -> None:
    made = zipfile.ZipInfo("link.bin")
    made.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(made, b"/etc/passwd")


def small(archive: zipfile.ZipFile) -> None:
    archive.writestr("bomb.bin", bytes(100_000), zipfile.ZIP_DEFLATED)


def larger(archive: zipfile.ZipFile) -> None:
    for each in archive.infolist():
        each.file_size *= 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (twice, "a file is there twice"),
        (outside, "it holds other files"),
        (link, "it holds a link"),
        (small, "its files are compressed or encrypted"),
        (larger, "its files are larger than itself"),
    ],
)
def test_what_pack_does_not_write_is_refused(
    bundle: Path, tmp_path: Path, change: Callable[[zipfile.ZipFile], None], said: str
) -> None:
    file = tmp_path / "model.resad"
    pack(bundle, file)
    with warnings.catch_warnings(), zipfile.ZipFile(file, "a") as archive:
        warnings.simplefilter("ignore")  # that a name is there twice
        change(archive)
        archive._didModify = True
    with pytest.raises(BundleError, match=said):
        read_bundle(file)


def test_damaged_bytes_are_refused(bundle: Path, tmp_path: Path) -> None:
    """Wherever they are: in a file, its header, or the directory; and a file that ends early."""
    file = tmp_path / "model.resad"
    pack(bundle, file)
    content = file.read_bytes()
    for place in (0, 20, 40, len(content) // 2, len(content) - 300, len(content) - 10):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        file.write_bytes(damaged)
        with suppress(BundleError):  # else it is in what nothing reads, such as a date
            assert read_bundle(file)[1] == read_bundle(bundle)[1], place
    for length in (0, 10, 1000, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(BundleError, match="again"):
            read_bundle(file)
    _, contents = read_bundle(bundle)
    for name in contents:
        file.write_bytes(packed({key: value for key, value in contents.items() if key != name}))
        with pytest.raises(BundleError, match=rf"holds no {name}|{name} is missing"):
            read_bundle(file)
        file.write_bytes(packed(contents | {name: contents[name][:-5] + b"other"}))
        with pytest.raises(BundleError, match=r"altered|cannot be read"):
            read_bundle(file)
