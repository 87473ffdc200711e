"""Small blocking collectives for agreement and bookkeeping, on a channel of the engine.

Every function is collective over the ranks of its channel. Objects travel pickled: they come
from this job's own ranks.
"""

from __future__ import annotations

import pickle
from typing import Any, cast

import numpy as np
import torch
from mpi4py import MPI

from hpctrain.comm.channel import Channel, Operation, Steps, barrier
from hpctrain.comm.memory import buffer_of

__all__ = ["all_gather", "all_sum", "barrier_on", "broadcast", "broadcast_tensor", "figures_of_all"]


def barrier_on(channel: Channel, label: str = "barrier") -> None:
    """Return once all ranks are here."""
    channel.run(barrier, label)


def broadcast(channel: Channel, value: Any, root: int = 0, label: str = "broadcast") -> Any:
    """The root's `value`, on all ranks."""

    def steps(comm: MPI.Intracomm, tag: int) -> Steps:
        data = pickle.dumps(value) if comm.Get_rank() == root else b""
        length = np.array([len(data)])
        yield [comm.Ibcast(length, root)]
        received = np.frombuffer(data, np.uint8) if data else np.empty(length[0], np.uint8)
        yield [comm.Ibcast([received, MPI.BYTE], root)]
        return value if comm.Get_rank() == root else pickle.loads(received.tobytes())

    return channel.run(steps, label)


def all_gather(channel: Channel, value: Any, label: str = "all-gather") -> list[Any]:
    """The `value` of every rank, in rank order, on all ranks."""

    def steps(comm: MPI.Intracomm, tag: int) -> Steps:
        data = np.frombuffer(pickle.dumps(value), np.uint8)
        lengths = np.empty(comm.Get_size(), np.int64)
        yield [comm.Iallgather(np.array([data.size], np.int64), lengths)]
        gathered = np.empty(lengths.sum(), np.uint8)
        yield [comm.Iallgatherv(data, [gathered, lengths.tolist(), MPI.BYTE])]
        pieces = np.split(gathered, np.cumsum(lengths)[:-1])
        return [pickle.loads(piece.tobytes()) for piece in pieces]

    return cast(list[Any], channel.run(steps, label))


def all_sum(channel: Channel, values: np.ndarray, label: str = "sum") -> np.ndarray:
    """Element-wise sum over ranks, taken in rank order: the same bits on all ranks."""

    def steps(comm: MPI.Intracomm, tag: int) -> Steps:
        mine = np.asarray(values, np.float64, order="C")
        gathered = np.empty((comm.Get_size(), *mine.shape))
        yield [comm.Iallgather(mine, gathered)]
        total = gathered[0]
        for part in gathered[1:]:
            total = total + part
        return total

    return cast(np.ndarray, channel.run(steps, label))


def figures_of_all(*figures: float) -> Operation:
    """Operation: so many figures of every rank, one row a rank."""

    def steps(comm: MPI.Intracomm, tag: int) -> Steps:
        rows = np.empty((comm.Get_size(), len(figures)))
        yield [comm.Iallgather(np.array(figures, np.float64), rows)]
        return rows

    return steps


def broadcast_tensor(tensor: torch.Tensor, root: int = 0) -> Operation:
    """Operation: overwrite a contiguous host tensor with the root's, same shape on all ranks."""

    def steps(comm: MPI.Intracomm, tag: int) -> Steps:
        if tensor.numel():
            yield [comm.Ibcast([buffer_of(tensor), MPI.BYTE], root)]

    return steps
