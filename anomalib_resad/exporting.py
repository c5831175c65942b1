# SPDX-License-Identifier: Apache-2.0

"""anomalib's exports of an enrolled ResAD: one product baked in, with numbers and thresholds that stay true."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib import TaskType
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import LabelName
from anomalib.deploy import CompressionType
from torchmetrics import Metric

from anomalib_resad.leave_one_out import reference_scores
from anomalib_resad.photos import read_photo
from anomalib_resad.post_processor import RankKeepingPostProcessor
from anomalib_resad.torch_model import ResADModel

# For the type checker only: anomalib lists the direct subclasses of AnomalibModule as models, and this is none.
if TYPE_CHECKING:
    from anomalib.models import AnomalibModule as _Module
else:
    _Module = object


class ExportMixin(_Module):
    """Exports with anomalib's own verbs; `deploy` has the export that enrolls products on the device."""

    model: ResADModel

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: TaskType | None = None,
        max_drop: float = 0.01,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Export to OpenVINO as anomalib does, in a form that every device computes in float32.

        Where OpenVINO chooses bfloat16 by itself, a plain export finds other references and other maps. ``INT8_PTQ``
        quantizes the backbone's convolutions alone. The thresholds are written beside the model. See anomalib's method
        for the arguments.

        Raises:
            ValueError: If ``compression_type`` is ``INT8`` or ``INT8_ACQ``, or ``INT8_PTQ`` finds nothing to quantize.
        """
        if compression_type in (CompressionType.INT8, CompressionType.INT8_ACQ):
            msg = (
                f"{compression_type} is not offered: it would quantize the reference bank and the head too, which "
                "destroys the maps. Use INT8_PTQ, which quantizes the backbone alone, or FP16."
            )
            raise ValueError(msg)
        onnx = {"opset_version": 18} | (onnx_kwargs or {})  # anomalib's 14 fails and falls back to 18, with a traceback
        path = super().to_openvino(
            export_root, model_file_name, input_size, compression_type, datamodule, metric, task, max_drop,
            ov_kwargs, onnx,
        )  # fmt: skip
        from anomalib_resad.precision import rewrite_in_float32  # noqa: PLC0415  # OpenVINO is an extra

        rewrite_in_float32(path)
        self._write_thresholds(path)
        return path

    @staticmethod
    def _post_training_quantization_ov(model: Any, datamodule: AnomalibDataModule | None = None) -> Any:  # noqa: ANN401
        """Quantize the backbone alone, on the datamodule's good training photos.

        Raises:
            ValueError: If there is no datamodule.
        """
        if datamodule is None:
            msg = "INT8_PTQ needs photos to calibrate with: pass `datamodule` (on the command line, --data)."
            raise ValueError(msg)
        datamodule.setup("fit")
        samples = datamodule.train_data.samples
        good = sorted(samples.image_path[samples.label_index == LabelName.NORMAL])[:300]
        from anomalib_resad.precision import quantize_backbone  # noqa: PLC0415  # OpenVINO is an extra

        return quantize_backbone(model, (read_photo(path)[None].numpy() for path in good))

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # type: ignore[override]  # noqa: ANN401
        """Export to ONNX as anomalib does, with the thresholds beside it."""
        path = super().to_onnx(*args, **kwargs)
        self._write_thresholds(path)
        return path

    def _write_thresholds(self, path: Path) -> None:
        """Write what changes the threshold of an exported model, ``model.thresholds.json`` beside ``model.xml``."""
        if isinstance(self.post_processor, RankKeepingPostProcessor):
            known = "leave_one_out" in self.model.bank.record
            scores = (
                self.model.bank.record["leave_one_out"] if known else reference_scores(self.model, self.pre_processor)
            )
            self.post_processor.thresholds(scores).write(path.with_suffix(".thresholds.json"))
