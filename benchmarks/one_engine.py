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
    core = _core(openvino)
    request = core.compile_model(core.read_model(file), "CPU", settings).create_infer_request()
    return lambda images: request.infer([images])[0].copy()


def _core(openvino):
    """In the process of all engines the one that exported_network holds, see there."""
    if "utils.inspection.exported_network" in sys.modules:
        return sys.modules["utils.inspection.exported_network"].openvino_core()
    return openvino.Core()


def by_textbook(file: str, threads: int) -> Run:
    """The textbook form, eager, float32, NCHW; its allocator is left as it is."""
    import textbook
    import torch

    torch.set_num_threads(threads)
    held = torch.load(file, weights_only=True)
    network = textbook.OF_OURS[held["arch"]](num_classes=held["num_classes"])
    # The same layers in the same order, under torchvision's names.
    ours = list(held["state_dict"].values())
    network.load_state_dict(dict(zip(network.state_dict(), ours, strict=True)))
    return _by_torch(network.eval())


def by_fast(file: str, threads: int, compiled: bool = False) -> Run:
    """What --fast makes of a network: BatchNorm folded, channels_last, float32."""
    import torch

    from models.inference import optimise_for_inference

    network = _ours(file, threads)
    return _by_torch(optimise_for_inference(network, torch.float32, compiled))


def by_compiled(file: str, threads: int) -> Run:
    return by_fast(file, threads, compiled=True)


def by_eager(file: str, threads: int) -> Run:
    """Our network as it is, module by module; for those that have no textbook form here."""
    import models

    network = _ours(file, threads)
    models.set_fused(network, False)
    return _by_torch(network)


def _ours(file: str, threads: int):
    import torch

    from models.weights import network_from_checkpoint
    from utils.system.backends import configure

    torch.set_num_threads(threads)
    configure(False, torch.device("cpu"))  # keeps freed memory, as our scripts do
    return network_from_checkpoint(torch.load(file, weights_only=True)).eval()


def _by_torch(network) -> Run:
    import torch

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(images)).numpy()

    return run


ENGINES: dict[str, Callable[[str, int], Run]] = {
    "textbook": by_textbook,
    "eager": by_eager,
    "fast": by_fast,
    "compiled": by_compiled,
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
    given = parser.parse_args()
    run = ENGINES[given.engine](given.file, given.threads)
    run(np.zeros((1, 3, given.img_size, given.img_size), np.float32))
    found = {"startup_seconds": time.time() - given.began, "peak_mebibytes": {}}
    for batch in sorted(given.batches):
        images = np.zeros((batch, 3, given.img_size, given.img_size), np.float32)
        for _ in range(3):
            run(images)
        found["peak_mebibytes"][batch] = peak_memory()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
