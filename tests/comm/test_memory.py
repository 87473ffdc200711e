import pytest
import torch

from hpctrain.comm.memory import Scratch, Slab, buffer_of


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("count", [0, 1, 1001])
def test_scratch_is_of_the_count_and_dtype_asked_for(count: int, dtype: torch.dtype) -> None:
    scratch = Scratch()
    scratch.give(scratch.take(4000, torch.uint8))
    taken = scratch.take(count, dtype)
    assert taken.shape == (count,) and taken.dtype == dtype and taken.is_contiguous()


def test_scratch_in_use_is_never_handed_out_again() -> None:
    scratch = Scratch()
    scratch.give(scratch.take(100, torch.float32))
    held = [scratch.take(10, torch.float32) for _ in range(4)]
    for number, tensor in enumerate(held):
        tensor.fill_(number)
    assert [tensor.unique().tolist() for tensor in held] == [[0], [1], [2], [3]]


def test_scratch_given_back_is_used_again_whole() -> None:
    scratch = Scratch()
    first = scratch.take(100, torch.float64)
    address = first.data_ptr()
    scratch.give(first)
    for count, dtype in [(3, torch.bfloat16), (200, torch.float32), (100, torch.float64)]:
        again = scratch.take(count, dtype)
        assert again.data_ptr() == address
        scratch.give(again)


@pytest.mark.parametrize("kept", [0, 100])
def test_empty_scratch_can_be_given_back_in_any_order(kept: int) -> None:
    """A rank's slice of a slab is empty where there are more ranks than elements."""
    scratch = Scratch()
    scratch.give(scratch.take(kept, torch.float32))
    taken = [scratch.take(count, torch.float32) for count in (0, 0, 3)]
    for tensor in taken:
        scratch.give(tensor)


@pytest.mark.parametrize("given", [(10, 100), (100, 10)])
def test_scratch_hands_out_the_smallest_buffer_that_fits(given: tuple[int, int]) -> None:
    scratch = Scratch()
    taken = {count: scratch.take(count, torch.float32) for count in given}
    addresses = {count: tensor.data_ptr() for count, tensor in taken.items()}
    for count in given:
        scratch.give(taken[count])
    assert scratch.take(5, torch.float32).data_ptr() == addresses[10]
    assert scratch.take(50, torch.float32).data_ptr() == addresses[100]


def test_scratch_replaces_a_buffer_that_is_too_small() -> None:
    scratch = Scratch()
    for count in (10, 20, 30):
        scratch.give(scratch.take(count, torch.float32))
    kept = [scratch.take(1, torch.float32) for _ in range(2)]
    assert [tensor.untyped_storage().nbytes() for tensor in kept] == [120, 4]


def test_scratch_works_in_inference_mode() -> None:
    """Evaluation may reduce too, and views made there do not know their base."""
    with torch.inference_mode():
        scratch = Scratch()
        scratch.give(scratch.take(16, torch.float32))
        assert scratch.take(2, torch.float32).shape == (2,)
