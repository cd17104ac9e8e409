"""Makes the line on where a run takes place and how."""

import torch

from utils.system.distributed import Context


def device_lines(
    context: Context, amp: str, channels_last: bool, compiled: bool, tails: str = ""
) -> list[str]:
    """Returns where the run takes place and how; `tails` says how the ends of blocks run."""
    name = str(context.device)
    if context.device.type == "cuda":
        name = torch.cuda.get_device_name(context.device)
    elif context.device.type == "cpu":
        name = f"CPU, {torch.get_num_threads()} threads"
    if context.world_size > 1:
        name += f", {context.world_size} processes (DistributedDataParallel)"
    elif len(context.data_parallel) > 1:
        name += f" x {len(context.data_parallel)} (DataParallel)"
    traits = ["float32" if amp == "off" else amp]
    traits += ["channels_last"] * channels_last + ["compiled"] * compiled
    traits += [tails] if tails else []
    lines = [f"device: {name}; {', '.join(traits)}"]
    if len(context.data_parallel) > 1:
        lines.append(f"  torchrun --nproc-per-node={len(context.data_parallel)} is faster")
    return lines
