"""Runs that earlier versions of the scripts left, kept as checkpoints of a few kilobytes.

In tests/old_runs each tensor is an expanded view of one element: its shape and type are those of
the run, its values are not. `inflate` fills them from a seeded generator.
"""

import gzip
import io
import math
from pathlib import Path

import torch

from utils.runs import checkpoint

OLD_RUNS = Path(__file__).resolve().parents[1] / "old_runs"


def inflate(name: str, path: Path) -> dict:
    """Writes the old run `name` with seeded values to `path` and returns its contents."""
    data = gzip.decompress((OLD_RUNS / f"{name}.pth.gz").read_bytes())
    contents = torch.load(io.BytesIO(data), weights_only=True)
    filled = _filled(contents, "", torch.Generator().manual_seed(0))
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, filled)
    return filled


def _filled(value, key: str, chance: torch.Generator):
    if isinstance(value, dict):
        return type(value)((name, _filled(part, name, chance)) for name, part in value.items())
    if isinstance(value, list):
        return [_filled(part, key, chance) for part in value]
    if not isinstance(value, torch.Tensor) or value.numel() <= 1 or key == "sums":
        return value
    noise = torch.randn(value.shape, generator=chance, dtype=value.dtype)
    if key == "momentum_buffer":
        return 1e-3 * noise
    if value.ndim > 1:
        return noise * math.sqrt(2 / value[0].numel())
    centre = 1.0 if key.endswith(("running_var", "weight")) else 0.0
    return centre + 0.05 * noise
