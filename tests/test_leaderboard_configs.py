# SPDX-License-Identifier: Apache-2.0

"""Each leaderboard config of the paper's data sets runs on a tiny tree in its data sets' real layouts."""

import json
from importlib import import_module
from math import isfinite
from pathlib import Path

import pytest
import yaml
from anomalib.data import AnomalibDataModule, ImageBatch, MVTec3D
from anomalib.data.datasets.depth.mvtec_3d import CATEGORIES as MVTEC3D
from anomalib.data.datasets.image.btech import CATEGORIES as BTECH
from anomalib.data.datasets.image.mvtecad import CATEGORIES as MVTECAD
from anomalib.data.datasets.image.visa import CATEGORIES as VISA

from anomalib_resad import CrossCategory
from anomalib_resad.data.cross_category import category_name, split_categories
from anomalib_resad.method.presets import resolve
from benchmarks.adapters import MVTec3DColor, ShanghaiTechFrames
from benchmarks.cells import read_cells
from benchmarks.measure import QUALITY
from benchmarks.methods import Method
from tests import datasets_layouts
from tests.datasets_layouts import Photos, draw_photos
from tests.test_leaderboard_runs import SMALL, start

CONFIGS = Path(__file__).resolve().parents[1] / "benchmarks" / "configs"
CATEGORIES = {
    "mvtecad": MVTECAD,
    "visa": VISA,
    "btech": BTECH,
    "mvtec3d": MVTEC3D,
    "brats": ("Brain",),
    "shanghaitech": tuple(f"{scene:02d}" for scene in range(1, 13)),
}
LAYOUTS = {
    "datasets/MVTecAD": datasets_layouts.mvtecad,
    "datasets/visa": datasets_layouts.visa,
    "datasets/BTech": datasets_layouts.btech,
    "datasets/MVTec3D": datasets_layouts.mvtec3d,
    "datasets/BMAD": datasets_layouts.bmad,
    "datasets/shanghaitech": datasets_layouts.shanghaitech,
}


def load(name: str) -> dict:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def make(spec: dict) -> list[AnomalibDataModule]:
    """One datamodule for each category that a config names."""
    module, _, name = spec["class_path"].rpartition(".")
    return split_categories(getattr(import_module(module), name)(**spec["init_args"]))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    return draw_photos(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, photos: Photos) -> Path:
    """Two categories of each data set, where the configs look for them."""
    folder = tmp_path_factory.mktemp("workplace")
    for name, categories in CATEGORIES.items():
        root = load(name)["target"]["init_args"]["root"]
        LAYOUTS[root](folder / root, categories[:2], photos)
    return folder


def shrink(name: str) -> list[str]:
    """Arguments that make a config tiny: two categories and methods, a photo, an epoch, a small untrained backbone."""
    config = load(name)
    for entry in (config["target"], *config["source"]):
        entry["init_args"]["category"] = ", ".join(entry["init_args"]["category"].split(", ")[:2])
    for entry in config["source"]:
        entry["init_args"]["num_workers"] = 0
    methods = {method: config["methods"][method] for method in ("ResAD", "Patchcore")}
    methods["ResAD"]["source_epochs"] = 1
    methods["ResAD"]["init_args"] = {"k_shot": 1}
    arguments = {
        "target.init_args.category": config["target"]["init_args"]["category"],
        "target.init_args.num_workers": 0,
        "source": config["source"],
        "methods": methods,
        "shots": [1],
        "draws": 1,
        "backbone": SMALL,
        "pre_trained": False,
        "image_size": [64, 64],
        "source_batch_size": 16,
        "gallery_shots": 1,
    }
    if name == "shanghaitech":
        arguments |= {"target.init_args.frame_step": 1, "target.init_args.reference_step": 2}
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    return ["--config", str(CONFIGS / f"{name}.yaml"), *(f"--{key}={value}" for key, value in values.items())]


def check_cells(folder: Path, name: str) -> None:
    config = load(name)
    cells = read_cells(folder / config["output"] / "cells.jsonl")
    assert [(cell["status"], cell["error"]) for cell in cells] == [("ok", None)] * len(cells)
    assert len(cells) == 2 * len(CATEGORIES[name][:2])
    for cell in cells:
        assert all(isfinite(cell[figure]) for figure in QUALITY), cell
        assert cell["test_images"] == 4
        assert len(cell["references"]) == 1


@pytest.fixture(scope="module")
def log(workplace: Path) -> Path:
    """Run all configs, in one process beside this: trained here, they took the test process down."""
    path = workplace / "log.txt"
    process = start([shrink(name) for name in CATEGORIES], workplace, path)
    assert process.wait(timeout=900) == 0, path.read_text()[-4000:]
    return path


@pytest.mark.parametrize("name", CATEGORIES)
def test_config_runs(name: str, log: Path) -> None:
    named = f"# python -m benchmarks.leaderboard --config benchmarks/configs/{name}.yaml\n"
    assert named in (CONFIGS / f"{name}.yaml").read_text(), "the command that was run"
    output = log.parent / load(name)["output"]
    assert (output / "leaderboard.md").is_file(), log.read_text()[-4000:]
    check_cells(log.parent, name)


@pytest.mark.parametrize("name", CATEGORIES)
def test_config_names_everything_and_keeps_source_and_target_apart(name: str) -> None:
    config = load(name)
    targets = make(config["target"])
    sources = [single for entry in config["source"] for single in make(entry)]
    assert tuple(target.category for target in targets) == CATEGORIES[name]
    assert tuple(source.category for source in sources) == (VISA if name == "mvtecad" else MVTECAD)
    assert not {category_name(target) for target in targets} & {category_name(source) for source in sources}
    assert not {Path(target.root).resolve() for target in targets} & {source.root.resolve() for source in sources}
    assert ("checkpoints" in config) == (name != "mvtecad"), "shared by those with the same source, and by no others"
    assert config["shots"] == [1, 2, 4, 8]
    assert config["draws"] == 3
    assert config["methods"] == load("mvtecad")["methods"], "the methods are the same for all data sets"
    assert config["baseline"] in config["methods"]
    for method in (Method(**spec) for spec in config["methods"].values()):
        assert all(method.takes(argument) for argument in method.init_args), method


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_configs_give_a_method_nothing_that_it_does_not_have(name: str) -> None:
    """Any leaderboard's; ResAD refuses such arguments, which would only show in its failed cells."""
    for spec in load(name).get("methods", {}).values():
        given = spec.get("init_args", {})
        if spec["class_path"] == "anomalib_resad.ResAD":
            settings = resolve(given.get("variant", "fused"), given)
            assert all(settings[argument] == given[argument] for argument in given.keys() & settings.keys())


def test_depth_data_set_as_images(photos: Photos, tmp_path: Path) -> None:
    """As target through the adapter; as source as it is."""
    datasets_layouts.mvtec3d(tmp_path, ["bagel", "rope"], photos)
    data = MVTec3DColor(tmp_path, "bagel", num_workers=0)
    data.setup()
    assert category_name(data) == "MVTec3D/bagel"
    for loader, count in ((data.train_dataloader(), 6), (data.test_dataloader(), 4)):
        (batch,) = loader
        assert type(batch) is ImageBatch
        assert batch.gt_mask.shape == (count, 64, 64)
        assert batch.gt_mask.flatten(1).any(dim=1).tolist() == batch.gt_label.tolist()
    source = CrossCategory(MVTec3D(tmp_path, "bagel, rope"), val_ratio=0, num_workers=0)
    source.setup()
    (batch,) = source.train_dataloader()
    assert batch.gt_mask.flatten(1).any(dim=1).tolist() == batch.gt_label.tolist()
    assert batch.gt_label.sum() == 4


def test_video_frames_as_images(photos: Photos, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"(?s)Scene 01 not found.*campus_dataset"):
        ShanghaiTechFrames(tmp_path).prepare_data()
    datasets_layouts.shanghaitech(tmp_path, ["01", "02"], photos)
    data = ShanghaiTechFrames(tmp_path, "01", frame_step=3, reference_step=2, num_workers=0)
    for _ in range(2):
        data.prepare_data()
    data.setup()
    assert category_name(data) == "ShanghaiTech/01"
    assert [Path(path).name for path in data.train_data.samples.image_path] == [
        "01_001_0000.jpg",
        "01_001_0002.jpg",
        "01_001_0004.jpg",
    ]
    (batch,) = data.test_dataloader()
    assert sorted(Path(path).name for path in batch.image_path) == ["01_0014_000.jpg", "01_0014_003.jpg"]
    assert batch.gt_mask.flatten(1).any(dim=1).tolist() == batch.gt_label.tolist() == [1, 0]
    (tmp_path / "testing" / "frames" / "02_0014" / "000.jpg").unlink()
    other = ShanghaiTechFrames(tmp_path, "02", frame_step=3, reference_step=2)
    with pytest.raises(ValueError, match=r"3 frames, but .* 4 masks"):
        other.prepare_data()
    assert [path.name for path in other.root.iterdir()] == ["01"], "nothing half-written is left behind"
