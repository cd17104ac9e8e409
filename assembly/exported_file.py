"""Puts a file of export.py in the place of a checkpoint, for `main.py -e --resume FILE.onnx`."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.inspection import exported_network
from utils.inspection.exported_network import ExportedNetwork
from utils.options.refusals import refuse_for_exported
from utils.runs import resume
from utils.runs.saved_run import Checkpoint
from utils.system.distributed import Context
from utils.system.errors import UserError
from utils.training.device_report import device_lines


@dataclass(frozen=True)
class ExportedFile(Checkpoint):
    """Holds a file of export.py, as a checkpoint without a run whose network is made already.

    Args:
        network: runs the file by its engine.
    """

    network: ExportedNetwork

    @classmethod
    def load(cls, file: Path) -> "ExportedFile":
        """Reads a file; see `exported_network.load` for what it refuses."""
        network = exported_network.load(file)
        held: dict[str, Any] = network.metadata
        return cls(
            file=file,
            # What `models.start.refuse_another` compares the flags with.
            contents={"format": 1, "ksize": None, "attention": None, **held},
            classes=tuple(held["classes"]) or None,
            img_size=held["img_size"],
            crop_pct=held["crop_pct"],
            is_detector=False,
            run=None,
            network=network,
        )

    def how_it_runs(self, context: Context) -> list[str]:
        """Says on which device the file runs, and in which precision."""
        precision = str(self.contents.get("precision", "float32"))
        amp = "off" if precision == "float32" else precision
        return device_lines(context, amp, channels_last=False, compiled=False)


def read_saved(
    args: Namespace, given: set[str], name: str | None
) -> tuple[Checkpoint | None, Path | None]:
    """Finds the checkpoint that a run goes on from, or the file that is to be evaluated.

    Args:
        args: the flags.
        given: names of those that were typed.
        name: of the run, as in `resume.read`.

    Returns:
        It and the run folder to go on in; each may be None.

    Raises:
        UserError: as in `resume.read` and `exported_network.load`; or flags that an exported file
            has no use for.
    """
    files = [file for file in (args.resume, args.pretrained) if file is not None]
    exported = [file for file in files if exported_network.is_exported(file)]
    if not exported:
        places = (args.resume, args.pretrained, name, args.output)
        return resume.read(*places, args.evaluate, args.start_epoch)
    refuse_for_exported(args, given, exported[0])
    if len(files) > 1:
        raise UserError(
            f"--resume {args.resume} has weights of its own: leave --pretrained {args.pretrained} "
            "out"
        )
    resume.check_output(args.output, None, args.evaluate, exported[0])
    found = ExportedFile.load(Path(exported[0]))
    side = args.img_size or found.contents["img_size"]
    found.network.check_size(side, side)
    return found, None


def own_defaults(saved: Checkpoint) -> dict[str, Any]:
    """Returns the flags that a file of export.py decides where they are not typed; else none."""
    if not isinstance(saved, ExportedFile):
        return {}
    # torchvision and simplejpeg read the same pixels, and "cuda" needs the run's GPU.
    decoder = "pil" if saved.contents.get("decoder") == "pil" else "torchvision"
    return {"decoder": decoder, "device": "cpu"}
