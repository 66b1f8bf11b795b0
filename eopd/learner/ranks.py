"""The learner's ranks as a process group of torch.distributed; no backend is used here."""

import os
from datetime import timedelta
from itertools import chain
from typing import TypeVar

import psutil
import torch
from torch import distributed as dist

from eopd.network import address_towards

T = TypeVar("T")


def join(
    *, rank: int, world_size: int, master_address: str, master_port: int, timeout_s: float
) -> torch.device:
    """Join the gang's process group (gloo on CPU, nccl on GPU), once in a process.

    A rank waits at most ``timeout_s`` for the others at the barriers of this group. torch's own ten
    minutes of nccl may be short where rank 0 writes a checkpoint, or turns one into that of another
    number of ranks. (ZeRO's collectives have a group of their own, with torch's limits.)

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
        _listen_towards(master_address, master_port)
        limit = timedelta(seconds=timeout_s)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=limit)

    return torch.device("cuda:0" if on_gpu else "cpu")


def _listen_towards(address: str, port: int) -> None:
    """Lets gloo listen where the machine of rank 0 can reach this one, unless the user has said where.

    By itself it listens where the name of this machine leads (torch 2.13, ``ProcessGroupGloo``): on a
    Debian machine to 127.0.1.1, which no other one reaches.
    """
    own = address_towards(address, port)
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == own for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def gather_all(items: list[T]) -> list[T]:
    """Returns the items of all ranks, in the order of the ranks; collective."""
    items_of_ranks: list[list[T]] = [[]] * dist.get_world_size()
    dist.all_gather_object(items_of_ranks, items)
    return list(chain.from_iterable(items_of_ranks))
