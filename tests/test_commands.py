# SPDX-License-Identifier: Apache-2.0

"""The documented commands, word by word, on tiny data in the real layouts.

anomalib's command line runs in this process, because importing it takes most of the time of a command; the first one
and that of the demo run in processes of their own.
"""

import io
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml

from anomalib_resad.ready_heads import head_file
from benchmarks.products import make_product
from tests import datasets_layouts
from tests.conftest import installed
from tests.datasets_layouts import draw_photos

ROOT = Path(__file__).resolve().parents[1]
ANOMALIB = Path(sys.executable).with_name("anomalib")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for path in DOCUMENTS for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)]
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines()]
# What makes the documented commands small: an untrained ResNet-18, one epoch, no worker processes.
SMALL_MODEL = [
    "--model.backbone",
    "resnet18",
    "--model.pre_trained",
    "false",
    "--model.k_shot",
    "2",
    "--model.image_size",
    "[64,64]",
]
SMALL_TRAINER = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]


def run(command: str, cwd: Path, *extra: str) -> str:
    """Run a command of anomalib in this process; what it prints and logs."""
    from anomalib.cli.cli import main  # noqa: PLC0415  # here, as a user's command imports it

    words, before = shlex.split(command), Path.cwd()
    assert words[0] == "anomalib"
    os.chdir(cwd)
    try:
        with printed() as output, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [*words, *extra])
            patch.setenv("COLUMNS", "200")
            main()
    except SystemExit as stop:
        if stop.code:
            pytest.fail(f"{command}\n{output.getvalue()[-4000:]}")
    finally:
        os.chdir(before)
    return output.getvalue()


@contextmanager
def printed() -> Iterator[io.StringIO]:
    """What is printed, and logged from INFO on; anomalib's handlers are taken away again."""
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    named = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]
    loggers = [logging.getLogger(), *(each for each in named if not each.propagate or each.name == "lightning.pytorch")]
    kept = [(each, each.handlers[:], each.level) for each in loggers]
    for each in loggers:
        each.addHandler(handler)
        each.setLevel(logging.INFO)
    try:
        with redirect_stdout(output), redirect_stderr(output):
            yield output
    finally:
        for each, handlers, level in kept:
            each.handlers[:] = handlers
            each.setLevel(level)


def run_alone(command: str, cwd: Path, *extra: str) -> str:
    """The same in a process of its own."""
    result = subprocess.run(
        [str(ANOMALIB), *shlex.split(command)[1:], *extra],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, f"{command}\n{output[-4000:]}"
    return output


def one(*words: str) -> str:
    """The only documented command with these words."""
    (command,) = [command for command in COMMANDS if all(word in command for word in words)]
    return command


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny trees in the real layouts of VisA and MVTecAD, photos, and the README's configs."""
    folder = tmp_path_factory.mktemp("workplace")
    counts = {"train": 4, "good": 2, "defective": 1, "size": 64}
    config = yaml.safe_load((ROOT / "configs" / "visa_to_mvtecad.yaml").read_text())
    categories = config["data"]["init_args"]["source"]["init_args"]["category"].split(", ")
    photos = draw_photos(folder / "drawn", defects=["spot"], **counts)
    datasets_layouts.visa(folder / "datasets" / "visa", categories, photos)
    for category, product in (("bottle", "washer"), ("cable", "weave")):
        make_product(folder / "drawn", product, **counts | {"train": 8})
        shutil.copytree(folder / "drawn" / product, folder / "datasets" / "MVTecAD" / category)
    for product in ("grain", "pill", "tiles"):
        make_product(folder / "datasets" / "products", product, **counts)
    shutil.copytree(folder / "drawn" / "weave" / "train" / "good", folder / "photos" / "good")
    shutil.copytree(folder / "drawn" / "weave" / "test" / "spot", folder / "photos" / "new")
    shutil.copytree(ROOT / "configs", folder / "configs")
    return folder


@pytest.fixture(scope="module")
def source(workplace: Path) -> Path:
    output = run_alone(one("train --config"), workplace, *SMALL_MODEL, *SMALL_TRAINER, "--data.num_workers", "0")
    assert "Source: 12 categories, 72 good and 12 defective images" in " ".join(output.split())
    checkpoint = workplace / "results/ResAD/CrossCategory/bottle/latest/weights/lightning/model.ckpt"
    assert checkpoint.is_file()
    return checkpoint


@pytest.fixture(scope="module")
def enrolled(source: Path, workplace: Path) -> Path:
    assert source.is_file()
    output = run(one("train --model ResAD", "--data.category cable"), workplace, "--data.num_workers", "0")
    assert "Enrolled 4 of 8 good photos of the train split of MVTecAD/cable (seed 0):" in output
    assert "image_AUROC" in output
    return workplace / "results/ResAD/MVTecAD/cable/latest/weights/lightning/model.ckpt"


def test_data_part_of_the_config_is_short() -> None:
    """VisA's twelve categories against MVTecAD's bottle in under 15 lines."""
    text = (ROOT / "configs" / "visa_to_mvtecad.yaml").read_text()
    data = text[text.index("data:") : text.index("trainer:")]
    assert len(data.splitlines()) < 15
    assert len(yaml.safe_load(data)["data"]["init_args"]["source"]["init_args"]["category"].split(",")) == 12


def test_train_own_products(workplace: Path) -> None:
    run(one("fit --config"), workplace, *SMALL_MODEL[2:], *SMALL_TRAINER, "--data.num_workers", "0")
    assert list(workplace.glob("results/ResAD/CrossCategory/**/model.ckpt"))


def test_predict_with_references(source: Path, workplace: Path) -> None:
    assert source.is_file()
    output = run(one("predict", "--model.checkpoint"), workplace)
    assert "Enrolled 8 of 8 good photos of photos/good: " in output
    assert "Enrolled 3 of 8 good photos of photos/good (seed 0): " in run(
        one("predict", "--model.checkpoint"), workplace, "--model.k_shot", "3"
    )
    assert list((workplace / "results/ResAD/latest/images").rglob("*.png"))


def test_predict_without_a_checkpoint(workplace: Path) -> None:
    """On random weights, which no head is for."""
    output = run(one("predict", "--model.weights pypi"), workplace, *SMALL_MODEL, "--model.weights", "null")
    assert "The plain distance to the good photos is used" in output
    assert "Enrolled 2 of 8 good photos of photos/good" in output


def test_test_and_predict_with_a_checkpoint(enrolled: Path, workplace: Path) -> None:
    assert enrolled.is_file()
    calibrated = ["--model.false_alarm_rate", "0.2"]
    output = run(one("anomalib test"), workplace, "--data.num_workers", "0", *calibrated)
    assert "at a target false-alarm rate of 0.2; the references score" in output
    assert "pixel_AUROC" in output
    assert "Enrolled" not in output, "the checkpoint's bank is kept"
    run(one("predict", "--ckpt_path"), workplace)


@pytest.mark.parametrize(("kind", "file"), [("torch", "torch/model.pt"), ("openvino", "openvino/model.bin")])
def test_export(enrolled: Path, workplace: Path, kind: str, file: str) -> None:
    assert enrolled.is_file()
    run(one(f"--export_type {kind}"), workplace, "--export_root", kind)
    assert (workplace / kind / "weights" / file).stat().st_size > 1_000_000


def test_class_path_and_single_category(workplace: Path) -> None:
    """One category with synthetic defects, the model by its class path."""
    output = run(
        "anomalib train --model anomalib_resad.ResAD --data MVTecAD --data.category cable",
        workplace,
        *SMALL_MODEL, *SMALL_TRAINER, "--data.num_workers", "0", "--data.val_split_mode", "synthetic",
    )  # fmt: skip
    assert "synthetic ones stand in" in " ".join(output.split())


def test_our_messages_end_the_command_in_one_sentence(workplace: Path) -> None:
    """In a process of its own, whose last words they are."""
    command = [ANOMALIB, "predict", "--model", "ResAD", "--model.k_shot", "0", "--data", "none"]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("Error: k_shot=0 ")


LOADING = """
import sys
from pathlib import Path
from anomalib.data.predict import PredictDataset
from torch.utils.data import DataLoader
from anomalib_resad.data.photo_check import PredictPhotos
from anomalib_resad.plugin import _own
if __name__ == "__main__":
    for kind in (PredictPhotos, PredictDataset):
        dataset = kind(Path(sys.argv[1]))
        try:
            list(DataLoader(dataset, num_workers=1, collate_fn=dataset.collate_fn))
        except (OSError, ValueError) as error:
            assert "worker process 0" in str(error)
            print(_own(error, error.__traceback__))
"""


def test_our_messages_from_processes_that_load_photos_are_one_sentence(tmp_path: Path) -> None:
    """PyTorch puts their frames into the text of the error; anomalib's errors stay as they are.

    In a process of its own: after a loading process has failed, PyTorch ends the one that started it.
    """
    photo = tmp_path / "a.png"
    photo.write_bytes(b"no photo")
    (tmp_path / "loading.py").write_text(LOADING)
    command = [sys.executable, tmp_path / "loading.py", photo]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    told = done.stdout.splitlines()
    assert len(told) == 2, done.stderr
    assert re.fullmatch(r"\S+/a\.png: unreadable \(none of the formats [A-Z, ]+\)\.", told[0])
    assert told[1] == "None"


def test_printed_settings_are_those_that_count(workplace: Path) -> None:
    printed = run("anomalib train --model ResAD --data MVTecAD --print_config=skip_null", workplace)
    settings = yaml.safe_load(printed)["model"]["init_args"]
    assert settings["variant"] == "fused"
    assert not {"coupling_layers", "efdm", "residual", "warmup"} & settings.keys()


def test_benchmark(source: Path, workplace: Path) -> None:
    config = {
        "accelerator": "cpu",
        "benchmark": {
            "seed": 1,
            "model": {"class_path": "ResAD", "init_args": {"checkpoint": str(source), "visualizer": False}},
            "data": {"class_path": "MVTecAD", "init_args": {"category": "cable", "num_workers": 0}},
        },
    }
    (workplace / "benchmark.yaml").write_text(yaml.safe_dump(config))
    run("anomalib benchmark --config benchmark.yaml", workplace)
    (results,) = (workplace / "runs" / "benchmark").rglob("results.csv")
    assert "image_AUROC" in results.read_text()


def test_demo(workplace: Path) -> None:
    """The demo on a folder of products, and its refusal of an unknown target."""
    arguments = ["--data", "datasets/products", "--epochs", "1", "--output", "demo"]
    command = [sys.executable, "-m", "benchmarks.demo", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    options = {"cwd": workplace, "env": environment, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    result = subprocess.run(command, check=False, timeout=600, **options)
    assert result.returncode == 0, result.stderr[-4000:]
    assert (
        "goes on with tf_efficientnet_lite0" if installed("tf_efficientnet_lite0") else "UNTRAINED"
    ) in result.stdout
    for method in ("ResAD", "its distance", "Patchcore"):
        assert method in result.stdout
    lines = (workplace / "demo" / "results.csv").read_text().splitlines()
    assert len(lines) == 4 + head_file("tf_efficientnet_lite0").is_file()
    assert "trained, without PyTorch" in result.stdout
    if installed("tf_efficientnet_lite0"):
        assert "at once, ready head" in result.stdout
        assert (workplace / "demo" / "day_one.png").stat().st_size > 5_000
    assert (workplace / "demo" / "gallery.png").stat().st_size > 5_000
    assert (workplace / "demo" / "leaderboard.html").stat().st_size > 10_000
    refused = subprocess.run([*command, "--target", "nothing"], check=False, timeout=600, **options)
    assert refused.returncode != 0
    assert "'grain', 'pill', 'tiles'" in refused.stderr


def test_every_documented_command_is_run_here() -> None:
    assert len(COMMANDS) == 9, "a command was added to README or docs: run it above"
