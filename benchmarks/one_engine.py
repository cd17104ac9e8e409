"""Runs one network by one engine; as a program of its own, also measures start-up and memory.

deployment.py starts it once for each engine:

    python benchmarks/one_engine.py ENGINE FILE --batches 1 16 --img-size 224 --threads 2 --began T

It imports what that engine needs and no more, as a user's program would, and prints JSON: the
seconds from --began, when the process was started, to the first logits of one image, and the peak
memory in MiB after three calls of each batch.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

Run = Callable[[np.ndarray], np.ndarray]  # images (N, 3, S, S) float32 → logits (N, C)


def by_onnxruntime(file: str, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def by_openvino(file: str, threads: int) -> Run:
    """float32 in float32: OpenVINO would take bfloat16 where the processor has it."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
    }
    # In the process of all engines the one that exported_network holds, see there.
    shared = sys.modules.get("utils.inspection.exported_network")
    core = shared.openvino_core() if shared else openvino.Core()
    request = core.compile_model(core.read_model(file), "CPU", settings).create_infer_request()
    return lambda images: request.infer([images])[0].copy()


def by_torch(form: str, file: str, threads: int) -> Run:
    """A checkpoint of ours by PyTorch.

    Args:
        form: textbook: as commonly written, eager, float32, NCHW, its allocator left as it is;
            eager: our network module by module, for those that have no textbook form; fast: what
            --fast makes of it (BatchNorm folded, channels_last, float32); compiled: the same.
    """
    import torch

    torch.set_num_threads(threads)
    saved = torch.load(file, weights_only=True)
    if form == "textbook":
        import textbook

        network = textbook.OF_OURS[saved["arch"]](num_classes=saved["num_classes"])
        # The same layers in the same order, under torchvision's names.
        values = list(saved["state_dict"].values())
        network.load_state_dict(dict(zip(network.state_dict(), values, strict=True)))
        network.eval()
    else:
        import models
        from models.weights import network_from_checkpoint
        from utils.system.backends import configure

        configure(False, torch.device("cpu"))  # keeps freed memory, as our scripts do
        network = network_from_checkpoint(saved).eval()
        if form == "eager":
            models.set_fused(network, False)
        else:
            network = models.optimise_for_inference(network, torch.float32, form == "compiled")

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(images)).numpy()

    return run


ENGINES: dict[str, Callable[[str, int], Run]] = {
    **{form: partial(by_torch, form) for form in ("textbook", "eager", "fast", "compiled")},
    "onnxruntime": by_onnxruntime,
    "openvino": by_openvino,
}


def peak_memory() -> float:
    """MiB. Not getrusage: its figure begins with that of the process which started this one."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 1024
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("file")
    parser.add_argument("--batches", type=int, nargs="+", required=True)
    parser.add_argument("--img-size", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--began", type=float, required=True)
    args = parser.parse_args()
    run = ENGINES[args.engine](args.file, args.threads)
    run(np.zeros((1, 3, args.img_size, args.img_size), np.float32))
    result = {"startup_seconds": time.time() - args.began, "peak_mebibytes": {}}
    for batch in sorted(args.batches):
        images = np.zeros((batch, 3, args.img_size, args.img_size), np.float32)
        for _ in range(3):
            run(images)
        result["peak_mebibytes"][batch] = peak_memory()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
