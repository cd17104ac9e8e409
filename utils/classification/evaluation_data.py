"""Opens the images on which a classifier is evaluated, and says which of its outputs compete."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from utils.classification import real_labels
from utils.classification.real_labels import RealLabels, RealMeter
from utils.data import class_order, splits
from utils.data.image_folder import ImageFolder, describe
from utils.runs.saved_run import Checkpoint
from utils.system import distributed
from utils.system.errors import UserError


class ChosenOutputs(nn.Module):
    """Gives some of a network's outputs: (N, 3, S, S) → (N, k)."""

    outputs: torch.Tensor

    def __init__(self, network: nn.Module, outputs: np.ndarray, device: torch.device):
        super().__init__()
        self.network = network
        self.register_buffer("outputs", torch.from_numpy(outputs).to(device), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images).index_select(1, self.outputs)


@dataclass(frozen=True)
class EvaluationData:
    """Holds images with labels, and how a network's outputs are compared with them.

    Args:
        images: `labels` count the outputs that are compared, `classes` are their names.
        outputs: (k,) int64 those of the network that are compared; None for all.
        real: the labels of the images anew, or None.
        notes: lines on how folders and outputs were matched.
    """

    images: ImageFolder
    outputs: np.ndarray | None = None
    real: RealLabels | None = None
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Returns lines on the images, and on all that a reader of the figures must know."""
        return [*describe(self.images, "val"), *(f"  {note}" for note in self.notes)]

    def compared(self, network: nn.Module, device: torch.device) -> nn.Module:
        """Returns the network with the outputs alone that are compared."""
        return network if self.outputs is None else ChosenOutputs(network, self.outputs, device)

    def meter(self, device: torch.device) -> RealMeter | None:
        """Returns what counts by the labels anew, or None."""
        return None if self.real is None else RealMeter(self.real, self.images.labels, device)

    def as_read(self) -> ImageFolder:
        """Returns the images as a loader takes them: for `meter`, labels are images' numbers."""
        if self.real is None:
            return self.images
        return replace(self.images, labels=np.arange(len(self.images)))


def open_evaluation_data(
    data: str,
    saved: Checkpoint,
    outputs: int,
    class_names: str | None = None,
    present_classes: bool = False,
    real: str | None = None,
) -> EvaluationData:
    """Opens the images on which a checkpoint is evaluated.

    Args:
        data: a folder with val/, or the folder of class folders or shards itself.
        saved: the checkpoint; the images are labelled by its class names.
        outputs: of its network.
        class_names: file or folder with the names of the outputs of weights without names.
        present_classes: compare only the outputs of classes that the data has images of.
        real: file of `real_labels`.

    Raises:
        UserError: one line; see `splits.open_images`, `class_order` and `real_labels`; or an
            argument that does nothing with this checkpoint and these data.
    """
    names = saved.classes
    if class_names is not None:
        if names is not None:
            raise UserError(
                f"--class-names is for weights without class names, and {saved.file} has its own: "
                "leave it out"
            )
        names = class_order.read_names(class_names, outputs)
    root = class_order.evaluation_folder(data)
    order = class_order.match(root, names, outputs, str(saved.file))
    images = replace(splits.open_images(root, order.folders), classes=order.names)
    distributed.refuse_differences(validation_images=len(images))
    labels = None if real is None else real_labels.read(real, images, order.names)
    found = EvaluationData(images, None, labels, order.notes)
    return _restricted(found, present_classes)


def _restricted(data: EvaluationData, present_classes: bool) -> EvaluationData:
    """Leaves out, if asked to, the classes that the data has no image of; says what is compared."""
    images, notes = data.images, data.notes
    present, labels = np.unique(images.labels, return_inverse=True)
    here, known = len(present), len(images.classes)
    if present_classes and here == known:
        raise UserError(
            f"--present-classes does nothing here: {images.where} has images of all {known:,} "
            "classes; leave it out"
        )
    if present_classes and here == 1:
        raise UserError(f"--present-classes: {images.where} has one class, nothing to compare")
    if present_classes:
        classes = tuple(images.classes[number] for number in present)
        chosen = replace(images, labels=labels.astype(np.int64), classes=classes)
        note = f"{here:,} of the network's {known:,} classes: only their outputs are compared"
        return replace(data, images=chosen, outputs=present, notes=(*notes, note))
    if here < known:
        note = (
            f"all {known:,} outputs are compared; --present-classes compares those of the {here:,} "
            "classes alone, as published for ImageNet-A and ImageNet-R"
        )
        return replace(data, notes=(*notes, note))
    return data
