"""Loads a detector's ONNX file of export.py, for predict.py, in the place of its checkpoint."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from utils.inspection import detector_export, exported_network
from utils.inspection.detector_export import Finder
from utils.inspection.exported_network import ExportedNetwork
from utils.inspection.object_agreement import Objects
from utils.system.errors import UserError

NEEDED = ("arch", "backbone", "num_classes", "classes", "category_ids", "first_label", "max_size")


class ExportedDetector(nn.Module):
    """Runs a list of (3, H, W) images from 0 to 1 → a dict of objects each, by onnxruntime.

    Attributes:
        metadata: what the file says of itself; has the keys of a checkpoint that name the network
            and its classes.
        transform: has `max_size`, the longer side to which the file reduces an image.
        first_label: the label of the first class.
    """

    def __init__(self, find: Finder, path: Path, metadata: dict):
        super().__init__()
        self.find, self.path, self.metadata = find, path, metadata
        self.arch, self.backbone_arch = str(metadata["arch"]), str(metadata["backbone"])
        self.num_classes, self.first_label = metadata["num_classes"], metadata["first_label"]
        self.transform = SimpleNamespace(max_size=metadata["max_size"])

    @torch.no_grad()
    def forward(self, images: list[Tensor]) -> list[Objects]:
        """Finds the objects of each image.

        Raises:
            UserError: onnxruntime fails.
        """
        try:
            return [self.find(image.to("cpu", torch.float32).contiguous()) for image in images]
        except Exception as error:  # what onnxruntime raises is open-ended
            reason = exported_network.first_line(error)
            raise UserError(f"{self.path}: onnxruntime fails: {reason}") from None


def load(path: str | Path) -> ExportedNetwork | ExportedDetector:
    """Reads a file of export.py, of a classifier or of a detector.

    Raises:
        UserError: see `exported_network.load`; or a detector's file whose metadata are not those
            of export.py.
    """
    path = Path(path)
    if path.suffix != ".onnx" or not path.is_file():
        return exported_network.load(path)
    with exported_network.damage_in_one_line(path):
        session, metadata = exported_network.open_onnx(path)
    if not exported_network.describes_detector(metadata):
        return exported_network.load(path)
    lacking = [key for key in NEEDED if key not in metadata]
    numbers = [metadata.get(key) for key in ("num_classes", "first_label", "max_size")]
    lists = [metadata.get(key) for key in ("classes", "category_ids")]
    fits = all(isinstance(value, int) for value in numbers)
    fits = fits and all(isinstance(value, list) for value in lists)
    outputs = {output.name for output in session.get_outputs()}
    if lacking or not fits or not {"boxes", "labels", "scores"} <= outputs:
        raise UserError(f"{path}: its metadata are not those of export.py; make it again")
    return ExportedDetector(detector_export.by_onnxruntime(session), path, metadata)
