# SPDX-License-Identifier: Apache-2.0

"""The color images of data sets that anomalib reads as something else: as depth maps, or as clips of videos."""

import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np
from anomalib.data import MVTec3D
from anomalib.data.datamodules.video.shanghaitech import get_download_instructions
from anomalib.data.datasets.video.shanghaitech import make_shanghaitech_dataset
from anomalib.data.utils import Split

from anomalib_resad import ProductFolder
from anomalib_resad.data.product_folder import SamplesDataset


class MVTec3DColor(MVTec3D):
    """MVTec 3D-AD without its depth maps.

    anomalib's items carry the depth map unresized, which is 8 MB an image; and with pandas 3 it cannot read good
    training images at all: their missing mask is a NaN, which is no path.
    """

    @property
    def name(self) -> str:  # type: ignore[override]  # as anomalib's own datamodules do
        """The data set's name."""
        return MVTec3D.__name__

    def _setup(self, _stage: str | None = None) -> None:
        super()._setup(_stage)
        for attribute in ("train_data", "test_data"):
            samples = getattr(self, attribute).samples
            masks = samples.mask_path.where(samples.label_index == 1, "")
            setattr(self, attribute, SamplesDataset(samples.assign(mask_path=masks), "segmentation"))


class ShanghaiTechFrames(ProductFolder):
    """Frames of ShanghaiTech Campus as images; a category is a scene, ``"01"`` to ``"12"`` (scene 13 has no test).

    anomalib's own datamodule yields clips and needs PyAV and TorchCodec; its samples are videos, so that no reference
    can be drawn from them. Here ``prepare_data`` writes the frames of a scene once, to ``<root>/images_<steps>``, in
    MVTec AD's layout.

    Args:
        root (Path | str): The data set as downloaded: ``training/videos``, ``testing/frames`` and so on.
        category (str): Scene, two digits.
        frame_step (int): One test frame in so many is kept; 5 makes the mini ShanghaiTech of SPADE and PaDiM.
        reference_step (int): One training frame in so many can become a reference.
        eval_batch_size (int): Images per test batch.
        num_workers (int): Processes that load images.
    """

    def __init__(
        self,
        root: Path | str = "./datasets/shanghaitech",
        category: str = "01",
        frame_step: int = 5,
        reference_step: int = 100,
        eval_batch_size: int = 32,
        num_workers: int = 4,
    ) -> None:
        folder = Path(root) / f"images_{frame_step}_{reference_step}"
        super().__init__(folder, category, eval_batch_size=eval_batch_size, num_workers=num_workers)
        self.videos = Path(root)
        self.frame_step = frame_step
        self.reference_step = reference_step

    @property
    def name(self) -> str:  # type: ignore[override]  # as anomalib's own datamodules do
        """The data set's name."""
        return "ShanghaiTech"

    def prepare_data(self) -> None:
        """Write the scene's frames, unless they are there.

        Raises:
            FileNotFoundError: If the data set is not there; the message says how to get it.
            ValueError: If a video cannot be read, or its masks do not fit its frames.
        """
        target = self.root / self.category
        if target.is_dir():
            return
        videos = sorted((self.videos / "training" / "videos").glob(f"{self.category}_*.avi"))
        if not videos or not (self.videos / "testing" / "frames").is_dir():
            msg = f"Scene {self.category} not found. {get_download_instructions(self.videos)}"
            raise FileNotFoundError(msg)
        tests = make_shanghaitech_dataset(self.videos, int(self.category), Split.TEST)
        self.root.mkdir(exist_ok=True)
        # Whole or not at all: a folder that is there is taken for complete.
        with tempfile.TemporaryDirectory(dir=self.root) as temporary:
            scene = Path(temporary) / self.category
            for video in videos:
                write_video(video, scene / "train" / "good", self.reference_step)
            for frames, masks in zip(tests.image_path, tests.mask_path, strict=True):
                write_frames(Path(frames), Path(masks), scene, self.frame_step)
            scene.rename(target)


def write_video(video: Path, folder: Path, step: int) -> None:
    """Write frames of a video as images.

    Args:
        video (Path): The video; OpenCV reads those of ShanghaiTech as they are.
        folder (Path): Where to write.
        step (int): One frame in so many is written, from the first on.

    Raises:
        ValueError: If there is no frame that can be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    capture = cv2.VideoCapture(str(video))
    count = 0
    while capture.grab():
        if count % step == 0:
            cv2.imwrite(str(folder / f"{video.stem}_{count:04d}.jpg"), capture.retrieve()[1])
        count += 1
    capture.release()
    if count == 0:
        msg = f"{video} holds no frame that OpenCV can read."
        raise ValueError(msg)


def write_frames(frames: Path, masks: Path, scene: Path, step: int) -> None:
    """Copy test frames, and write the masks of the abnormal ones.

    A frame is abnormal if a pixel of its mask is, as in anomalib.

    Args:
        frames (Path): Folder of all frames of a test video.
        masks (Path): Array of its masks, shape ``(frames, height, width)``.
        scene (Path): Where to write ``test`` and ``ground_truth``.
        step (int): One frame in so many is copied, from the first on.

    Raises:
        ValueError: If there are not as many masks as frames.
    """
    paths = sorted(frames.glob("*.jpg"))
    array = np.load(masks, mmap_mode="r")
    if len(paths) != len(array):
        msg = f"{frames} holds {len(paths)} frames, but {masks} {len(array)} masks."
        raise ValueError(msg)
    for path, mask in zip(paths[::step], array[::step], strict=True):
        abnormal = bool(mask.any())
        copy = scene / "test" / ("abnormal" if abnormal else "good") / f"{frames.name}_{path.name}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        if abnormal:
            truth = scene / "ground_truth" / "abnormal" / f"{copy.stem}.png"
            truth.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(truth), (mask != 0).astype(np.uint8) * 255)
