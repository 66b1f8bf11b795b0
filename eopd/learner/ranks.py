"""The learner's ranks as a process group of torch.distributed; no backend is used here."""

import os
from itertools import chain
from typing import TypeVar

import torch
from torch import distributed as dist

T = TypeVar("T")


def join(*, rank: int, world_size: int, master_address: str, master_port: int) -> torch.device:
    """Join the gang's process group (gloo on CPU, nccl on GPU), once in a process.

    Returns:
        This rank's device: the only one it sees.
    """
    environment = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": master_address,
        "MASTER_PORT": master_port,
    }
    os.environ.update({name: str(value) for name, value in environment.items()})
    on_gpu = torch.cuda.is_available()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")

    return torch.device("cuda:0" if on_gpu else "cpu")


def gather_all(items: list[T]) -> list[T]:
    """Returns the items of all ranks, in the order of the ranks; collective."""
    items_of_ranks: list[list[T]] = [[]] * dist.get_world_size()
    dist.all_gather_object(items_of_ranks, items)
    return list(chain.from_iterable(items_of_ranks))
