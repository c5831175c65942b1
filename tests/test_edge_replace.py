# SPDX-License-Identifier: Apache-2.0

"""A bundle is replaced in one step: it is the former one or the new one, whatever happens, and its products stay."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from anomalib_resad.deploy import BundleError, ResADInferencer, read_manifest
from anomalib_resad.deploy.bundle import FILES
from anomalib_resad.export import edge_bundle, replacing
from anomalib_resad.export.edge_bundle import export_bundle, load_model, write_bundle
from tests.conftest import converted


@pytest.fixture
def former(bundle: Path, tmp_path: Path, good: list[Path]) -> Path:
    """A bundle with a product."""
    shutil.copytree(bundle, tmp_path / "bundle")
    ResADInferencer(tmp_path / "bundle").enroll("tiles", good[:2], rotations=1)
    return tmp_path / "bundle"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != replacing.LOCK)


def test_a_bundle_is_replaced(former: Path, trained: Path, good: list[Path]) -> None:
    """Twice; what exports left that were killed goes, and a running process notices."""
    (former / f"model-{'0' * 32}").mkdir()
    (former / f".model-{'0' * 32}.part").mkdir()
    model, parts = load_model(trained), converted(former)
    score = ResADInferencer(former).predict(good[3], "tiles").score
    for precision in ("fp16", "fp32"):
        running = ResADInferencer(former)
        write_bundle(model, parts, former, precision, replace=True)
        with pytest.raises(BundleError, match="was replaced after it was opened"):
            running.predict(good[3], "tiles")
        manifest = read_manifest(former)
        assert manifest.precision == precision
        assert names(former) == ["banks", "manifest.json", manifest.folder]
        assert names(former / manifest.folder) == sorted(FILES)
        assert ResADInferencer(former).predict(good[3], "tiles").score == pytest.approx(score, abs=0.02)
    assert ResADInferencer(former).predict(good[3], "tiles").score == score


@pytest.mark.parametrize("step", ["encoder", "detector", "manifest"])
def test_an_export_that_fails_leaves_the_former_bundle_whole(
    former: Path, trained: Path, good: list[Path], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    model, parts, before = load_model(trained), converted(former), names(former)
    score = ResADInferencer(former).predict(good[3], "tiles").score
    save = edge_bundle.ov.save_model

    def full(model: object, path: Path, **settings: object) -> None:
        save(model, path, **settings)
        if path.stem == step:
            path.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes()[:1000])

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(edge_bundle.ov, "save_model", full)
    if step == "manifest":
        monkeypatch.setattr("anomalib_resad.deploy.bundle.write_whole", no_room)
    told = (
        rf"(bundle|new): {step}.xml cannot be written whole \(the disk is full, or fails; [\d.]+ MB are free\)\. Free"
    )
    problem = "No space left" if step == "manifest" else told
    with pytest.raises(OSError, match=problem):
        write_bundle(model, parts, former, "fp16", replace=True)
    assert names(former) == before
    assert ResADInferencer(former).predict(good[3], "tiles").score == score
    with pytest.raises(OSError, match=problem):
        write_bundle(model, parts, former.parent / "new", "fp16")
    assert names(former.parent) == ["bundle"]


def test_an_export_that_is_killed_leaves_the_former_bundle(
    former: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right before the manifest is replaced, and right after it, when something may still be tidied up."""
    model, parts = load_model(trained), converted(former)
    before = read_manifest(former)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for moment, expected in (("before", "fp32"), ("after", "fp16")):
        with monkeypatch.context() as patch:
            if moment == "before":
                patch.setattr(replacing, "rmtree", lambda *_: None)  # nothing is tidied up
                patch.setattr(replacing.Manifest, "write", killed)
            else:
                patch.setattr(Path, "unlink", killed)
            with pytest.raises(KeyboardInterrupt):
                write_bundle(model, parts, former, "fp16", replace=True)
        manifest = read_manifest(former)
        assert manifest.precision == expected
        assert ResADInferencer(former).products == ["tiles"]
    assert manifest != before
    write_bundle(model, parts, former, "fp32", replace=True)
    assert names(former) == ["banks", "manifest.json", read_manifest(former).folder]


def test_opening_while_it_is_replaced(former: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest was read, and its files are gone: those of the new one are read."""
    text, read = (former / "manifest.json").read_text(), Path.read_bytes
    manifest = replace(read_manifest(former), folder=f"model-{'1' * 32}")

    def swapped(path: Path) -> bytes:
        content = read(path)
        if path.name == "manifest.json" and not (former / manifest.folder).exists():
            shutil.copytree(bundle, former / manifest.folder)
            manifest.write(former)
            (former / FILES[0]).unlink()
        return content

    monkeypatch.setattr(Path, "read_bytes", swapped)
    assert read_manifest(former) == manifest
    (former / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match="missing"):
        read_manifest(former)


def test_what_is_in_the_way_is_refused(former: Path, trained: Path, tmp_path: Path) -> None:
    """Before anything is computed."""
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileExistsError, match="nothing was changed"):
        export_bundle(tmp_path / "none.ckpt", former)
    with pytest.raises(FileExistsError, match=r"is no bundle .* so it is not replaced"):
        export_bundle(tmp_path / "none.ckpt", tmp_path / "photos", replace=True)
    model, parts = load_model(trained), converted(former)
    with FileLock(former / replacing.LOCK), pytest.raises(FileExistsError, match="is being replaced by another export"):
        write_bundle(model, parts, former, "fp16", replace=True)
    for folder in ("../bundle", "/tmp", "model-1"):  # noqa: S108  # no path leaves the bundle
        with pytest.raises(ValueError, match="folder"):
            replace(read_manifest(former), folder=folder)
