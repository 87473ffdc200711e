import pytest
import torch

from hpctrain.comm.memory import ScratchRing, Slab, aligned, buffer_of


@pytest.mark.parametrize(
    ("count", "dtype", "nbytes"),
    [
        (0, torch.float32, 0),
        (3, torch.float32, 12),
        (3, torch.float64, 24),
        (5, torch.bfloat16, 10),
    ],
)
def test_a_slab_is_flat_and_begins_as_zeros(count: int, dtype: torch.dtype, nbytes: int) -> None:
    slab = Slab.allocate(count, dtype)
    assert torch.equal(slab.tensor, torch.zeros(count, dtype=dtype))
    assert slab.nbytes == nbytes


def test_a_buffer_is_the_tensors_own_memory() -> None:
    tensor = torch.arange(6, dtype=torch.float32)
    view = memoryview(buffer_of(tensor[2:4]))  # type: ignore[arg-type]
    assert bytes(view) == tensor[2:4].numpy().tobytes()
    view[:] = torch.tensor([-1.0, -2.0]).numpy().tobytes()
    assert tensor.tolist() == [0, 1, -1, -2, 4, 5]


def test_a_tensor_with_gaps_has_no_buffer() -> None:
    with pytest.raises(AssertionError):
        buffer_of(torch.zeros(4, 4)[:, 0])


def run_of_parts(sizes: list[int], nbytes: int, begin: int) -> list[torch.Tensor]:
    """Parts given out from number `begin` on, as long as they need no more than `nbytes`."""
    ring = ScratchRing(nbytes, max(sizes))
    parts = [ring.part(size) for size in sizes]
    chosen, used = [], 0
    for part in parts[begin:]:
        used += aligned(part.numel())
        if used > nbytes:
            break
        chosen.append(part)
    return chosen


@pytest.mark.parametrize("begin", range(12))
@pytest.mark.parametrize(
    "sizes", [[64] * 20, [1, 100, 3, 500, 64, 0, 7] * 4, [700] * 20, [900, 1] * 10], ids=str
)
def test_parts_in_use_together_do_not_overlap(sizes: list[int], begin: int) -> None:
    held = run_of_parts(sizes, 1000, begin)
    for number, part in enumerate(held):
        part.fill_(number)
    assert [part.unique().tolist() for part in held] == [
        [number] if part.numel() else [] for number, part in enumerate(held)
    ]


def test_parts_begin_on_cache_lines_and_stay_within_the_ring() -> None:
    ring = ScratchRing(1000, 300)
    base = ring.part(0).untyped_storage()
    for size in [1, 300, 64, 65, 0, 299] * 10:
        part = ring.part(size)
        assert part.numel() == size
        assert part.storage_offset() % 64 == 0
        assert part.untyped_storage().data_ptr() == base.data_ptr()
    assert base.nbytes() == 1300
