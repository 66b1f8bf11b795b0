"""What the learner asks a GPU about itself; None for any other device."""

import torch


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Returns for example (9, 0) for an H100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def total_memory(device: torch.device) -> int | None:
    """Returns all its memory, in bytes."""
    if device.type != "cuda":
        return None

    return int(torch.cuda.get_device_properties(device).total_memory)
