"""Every benchmark of this folder, one after the other, with a JSON file for each.

    python benchmarks/all.py --out DIR [--smoke]

Each runs in a process of its own; one that fails is named at the end, and the others still run.
Images are read on the CPU; where there is a GPU, once more with it.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
BENCHMARKS = ("memory", "tail", "train_step", "inference", "deployment", "data_loading")
ON_GPU = "data_loading_cuda"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--smoke", action="store_true", help="tiny and short: does it run?")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}; give another folder")
    failed = []
    for name in (*BENCHMARKS, *[ON_GPU] * torch.cuda.is_available()):
        script = HERE / f"{name.removesuffix('_cuda')}.py"
        command = [sys.executable, str(script), "--json", str(args.out / f"{name}.json")]
        command += ["--device", "cuda"] * (name == ON_GPU) + ["--smoke"] * args.smoke
        print(f"\n== {name}", flush=True)
        began = time.perf_counter()
        if subprocess.run(command).returncode:
            failed.append(name)
        print(f"== {name}: {time.perf_counter() - began:.0f} s", flush=True)
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
