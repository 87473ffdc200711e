"""Slabs in device memory: read when they are ready, summed to the host's bits, seen when done.

A stand-in whose work happens late takes the place of a GPU, so that a wait that is missing shows as
a wrong sum on any machine. The same tests run on a GPU where there is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from devices import gpu
from late_device import LateDevice

from hpctrain import World
from hpctrain.comm import reduce
from hpctrain.comm.channel import Channel
from hpctrain.comm.device import DeviceSum, cuda
from hpctrain.comm.device_probe import messages_take_device_memory
from hpctrain.comm.engine import engine_of
from hpctrain.comm.reduce.sums import SumInOrder
from hpctrain.comm.reducer import OnDevice, Parts, ReduceOptions, Reducer
from hpctrain.errors import ExchangeError

mpi = pytest.mark.mpi
COUNTS = (0, 1, 7, 1000, 4099)


@pytest.fixture
def channel(world: World) -> Iterator[Channel]:
    engine = engine_of(world)
    engine.progress = "hooks"
    made = engine.channel("device test")
    yield made
    made.abandon()


def values(count: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * count + rank)
    return torch.randn(count, generator=generator).to(dtype)


def rounds(
    channel: Channel,
    reducer: Reducer,
    dtype: torch.dtype,
    queue: Callable[[Callable[[], object]], object],
    synchronize: Callable[[], object],
    steps: int = 3,
) -> list[torch.Tensor]:
    """What the program sees in its slabs after each of several steps."""
    slabs = reducer.allocate(COUNTS, [dtype] * len(COUNTS))
    reducer.plan(slabs)
    seen = []
    for step in range(steps):
        tickets = []
        for index, slab in enumerate(slabs):
            content = values(COUNTS[index], channel.rank + 10 * step, dtype)

            def write(slab: torch.Tensor = slab.tensor, content: torch.Tensor = content) -> None:
                slab.copy_(content)

            queue(write)
            slab.hand_over()
            tickets += reducer.post(Parts(index), f"slab {index}")
        for ticket in tickets:
            channel.engine.wait(ticket)
        for slab in slabs:
            slab.take_back()
        results: list[torch.Tensor] = []
        queue(lambda into=results: into.extend(slab.tensor.cpu().clone() for slab in slabs))
        synchronize()
        seen += results
    return seen


def on_host(channel: Channel, options: ReduceOptions, dtype: torch.dtype) -> list[torch.Tensor]:
    return rounds(channel, Reducer(channel, options), dtype, lambda work: work(), lambda: None)


def options(way: str, wire: str = "same") -> ReduceOptions:
    return ReduceOptions(way=way, wire=wire, chunk_bytes=2048)


CASES = [
    (way, wire, dtype)
    for way in ("direct", "ring", "shared", "two_level", *reduce.STAY_ON_DEVICE)
    for wire in ("same", "bfloat16")
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
] + [("auto", "same", torch.float32)]


@mpi
@pytest.mark.parametrize(("way", "wire", "dtype"), CASES, ids=str)
def test_late_device_gets_the_bits_of_the_host(
    world: World, channel: Channel, way: str, wire: str, dtype: torch.dtype
) -> None:
    if world.size == 1:
        return
    host_way = way.removeprefix("device_")
    expected = on_host(channel, options("direct" if way == "auto" else host_way, wire), dtype)
    device = LateDevice()
    there = OnDevice(torch.device("cpu"), device, stays=True)
    reducer = Reducer(channel, options(way, wire), there)
    seen = rounds(channel, reducer, dtype, device.program, device.synchronize)
    assert device.pinned_bytes >= sum(COUNTS) * dtype.itemsize
    if way == "auto" and len(world.nodes) > 1:  # any way may have been chosen
        return
    for found, wanted in zip(seen, expected, strict=True):
        assert torch.equal(found, wanted)


@gpu
@mpi
@pytest.mark.parametrize(("way", "wire", "dtype"), CASES, ids=str)
def test_gpu_gets_the_bits_of_the_host(
    world: World, channel: Channel, way: str, wire: str, dtype: torch.dtype
) -> None:
    where = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    if world.size == 1:
        return
    stays = messages_take_device_memory(channel.engine)
    if way in reduce.STAY_ON_DEVICE and not stays:
        pytest.skip(f"messages of {world.library} take no device memory")
    expected = on_host(
        channel, options("direct" if way == "auto" else way.removeprefix("device_"), wire), dtype
    )
    reducer = Reducer(channel, options(way, wire), OnDevice(where, cuda(where), stays))
    with torch.cuda.device(where):
        seen = rounds(channel, reducer, dtype, lambda work: work(), torch.cuda.synchronize)
    for found, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@mpi
def test_messages_of_device_memory_are_moved_by_a_thread_whose_device_it_is(
    world: World, channel: Channel
) -> None:
    device = LateDevice()
    Reducer(channel, options("direct"), OnDevice(torch.device("cpu"), device))
    assert not device.entered
    reducer = Reducer(
        channel, options("device_direct"), OnDevice(torch.device("cpu"), device, stays=True)
    )
    if world.size == 1:
        return
    channel.engine.progress = "thread"
    rounds(channel, reducer, torch.float32, device.program, device.synchronize)
    until_s = time.monotonic() + 30
    while not device.entered and time.monotonic() < until_s:  # this thread may have moved them all
        time.sleep(0.01)
    assert device.entered == ["hpctrain-engine"]


@mpi
def test_way_is_refused_where_it_cannot_be(channel: Channel) -> None:
    there = OnDevice(torch.device("cpu"), LateDevice())
    for way in reduce.STAY_ON_DEVICE:
        with pytest.raises(ExchangeError, match="gradients on the host"):
            Reducer(channel, options(way))
        with pytest.raises(ExchangeError, match="this library's do not"):
            Reducer(channel, options(way), there)
    with pytest.raises(ExchangeError, match="sums gradients on the host"):
        Reducer(channel, options("native"), there)


def test_ways_of_a_device_slab() -> None:
    def ways(nodes: list[list[int]], stays: bool) -> list[str]:
        return reduce.possible(
            nodes,
            torch.float32,
            in_shared_memory=False,
            ordered=False,
            narrow=False,
            on_device=True,
            stays=stays,
        )

    assert ways([[0, 1]], stays=False) == ["direct"]
    assert ways([[0, 1]], stays=True) == ["direct", "device_direct"]
    assert ways([[0], [1]], stays=True) == ["direct", "ring"], "not tried between nodes"
    assert ways([[0], [1]], stays=False) == ["direct", "ring"]


def kernels(where: str, dtype: torch.dtype) -> None:
    parts = [values(4099, rank, dtype).to(where) for rank in range(4)]
    expected = [torch.empty(4099, dtype=dtype) for _ in range(2)]
    found = [torch.empty(4099, dtype=dtype, device=where) for _ in range(2)]
    SumInOrder(expected, [part.cpu().clone() for part in parts], 0.25)()
    DeviceSum(found, parts, 0.25)()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.cpu(), b)


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_by_torch_has_the_bits_of_the_host(dtype: torch.dtype) -> None:
    kernels("cpu", dtype)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_by_a_gpu_has_the_bits_of_the_host(dtype: torch.dtype) -> None:
    kernels("cuda", dtype)


def test_late_device_shows_a_wait_that_is_missing() -> None:
    """The stand-in itself: what is read too early is old."""
    device, memory = LateDevice(), torch.zeros(1)
    device.program(lambda: memory.fill_(1))
    event = device.mark()
    assert memory.item() == 0
    copied = torch.zeros(1)
    device.run(lambda: copied.copy_(memory), "out").complete()
    assert copied.item() == 0, "no event: the copy was early"
    device.run(lambda: copied.copy_(memory), "out", [event]).complete()
    assert copied.item() == 1
