import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, Subset, TensorDataset

from hpctrain.data.batches import Batches, split_evenly, subset_sizes
from hpctrain.data.generators import generator_state, restore_generators, seed_generators
from hpctrain.errors import JobError, TrainingError


class Stream:
    """An iterable of samples that can be iterated again."""

    def __init__(self, samples: Iterable[Any]) -> None:
        self.samples = list(samples)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


class Recorded(list[int]):
    """A map-style data set that knows which samples were read."""

    def __init__(self, samples: Iterable[int]) -> None:
        super().__init__(samples)
        self.read: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.read.append(index)
        return super().__getitem__(index)


KINDS: list[Callable[[Sequence[int]], Any]] = [list, Stream]
kinds = pytest.mark.parametrize("kind", KINDS, ids=["map-style", "iterable"])


def batches_of(data: Any, **options: Any) -> Batches:
    return Batches(data, **({"collate": list} | options))


def samples_of(batches: Batches, steps: Iterable[int]) -> list[Any]:
    return [x for step in steps for subset in batches.share(step).subsets for x in subset]


# ---------------------------------------------------------------------- who computes what


@kinds
@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("batch", [1, 4, 6, 23])
@pytest.mark.parametrize("micro_batch", [0, 1, 3])
def test_shares_of_all_ranks_join_to_the_batches_of_one(
    kind: Callable[[Sequence[int]], Any], size: int, batch: int, micro_batch: int
) -> None:
    options = {"batch": batch, "micro_batch": micro_batch, "seed": 3, "size": size}
    alone = batches_of(kind(range(10)), batch=batch, seed=3)
    ranks = [batches_of(kind(range(10)), rank=rank, **options) for rank in range(size)]
    for step in range(6):
        joined = [x for rank in ranks for x in samples_of(rank, [step])]
        assert joined == samples_of(alone, [step])


@pytest.mark.parametrize("batch", [1, 3, 7, 10, 35])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_sample_comes_once_an_epoch(batch: int, seed: int) -> None:
    run = samples_of(batches_of(range(7), batch=batch, seed=seed), range(210 // batch))
    epochs = [run[start : start + 7] for start in range(0, len(run), 7)]
    assert len(epochs) >= 5
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(
    ("data", "shuffle"), [(list(range(5)), False), (Stream(range(5)), True)], ids=["list", "stream"]
)
def test_an_order_that_is_not_shuffled_is_that_of_the_data(data: Any, shuffle: bool) -> None:
    run = samples_of(batches_of(data, batch=4, shuffle=shuffle), range(3))
    assert run == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_the_seed_alone_decides_the_order() -> None:
    torch.manual_seed(1)
    first = samples_of(batches_of(range(50), batch=50, seed=8), range(2))
    torch.manual_seed(2)
    assert samples_of(batches_of(range(50), batch=50, seed=8), range(2)) == first
    assert samples_of(batches_of(range(50), batch=50, seed=9), range(2)) != first


def test_the_order_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    samples_of(batches_of(range(50), batch=5), range(20))
    assert torch.equal(torch.rand(1), expected)


def test_a_date_and_time_is_a_fine_seed() -> None:
    assert len(samples_of(batches_of(range(5), batch=5, seed=20260131_235959), [0])) == 5


@kinds
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_resumed_run_continues_with_the_right_sample(
    kind: Callable[[Sequence[int]], Any], size: int
) -> None:
    whole = samples_of(batches_of(kind(range(10)), batch=6), range(9))
    resumed = [batches_of(kind(range(10)), batch=6, rank=r, size=size) for r in range(size)]
    joined = [x for step in range(4, 9) for rank in resumed for x in samples_of(rank, [step])]
    assert joined == whole[4 * 6 :]


@kinds
def test_a_position_is_counted_over_the_whole_run(kind: Callable[[Sequence[int]], Any]) -> None:
    batches = batches_of(kind(range(5)), batch=2, shuffle=False)
    assert batches.read(3, 4) == [3, 4, 0, 1]
    assert batches.read(11, 2) == [1, 2]


@kinds
def test_reading_back_never_gives_the_wrong_samples(kind: Callable[[Sequence[int]], Any]) -> None:
    batches = batches_of(kind(range(10)), batch=2, shuffle=False)
    assert batches.read(6, 2) == [6, 7]
    with suppress(TrainingError):
        assert batches.read(2, 2) == [2, 3]


# ---------------------------------------------------------------------- shares and subsets


@pytest.mark.parametrize(
    ("count", "parts", "sizes"),
    [(0, 2, [0, 0]), (5, 1, [5]), (7, 3, [3, 2, 2]), (6, 3, [2, 2, 2]), (2, 4, [1, 1, 0, 0])],
)
def test_parts_differ_by_at_most_one(count: int, parts: int, sizes: list[int]) -> None:
    assert split_evenly(count, parts) == sizes


@pytest.mark.parametrize(
    ("samples", "micro_batch", "sizes"),
    [
        (0, 0, ()),
        (0, 4, ()),
        (9, 0, (9,)),
        (9, 9, (9,)),
        (9, 100, (9,)),
        (9, 8, (5, 4)),
        (9, 4, (3, 3, 3)),
        (3, 1, (1, 1, 1)),
    ],
)
def test_subsets_are_even_and_no_larger_than_a_micro_batch(
    samples: int, micro_batch: int, sizes: tuple[int, ...]
) -> None:
    assert subset_sizes(samples, micro_batch) == sizes


@pytest.mark.parametrize("batch", [1, 2, 7, 12])
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("micro_batch", [0, 2])
def test_a_share_tells_what_its_subsets_hold(batch: int, size: int, micro_batch: int) -> None:
    options = {"batch": batch, "size": size, "micro_batch": micro_batch}
    shares = [batches_of(range(9), rank=rank, **options).share(4) for rank in range(size)]
    for share in shares:
        assert tuple(len(subset) for subset in share.subsets) == share.sizes
        assert sum(share.sizes) == share.samples
        assert share.total == batch
    assert sum(share.samples for share in shares) == batch
    assert sum(share.weight for share in shares) == pytest.approx(1)


def test_a_rank_without_samples_reads_nothing() -> None:
    data = Recorded(range(9))
    share = batches_of(data, batch=2, rank=2, size=3).share(0)
    assert (share.samples, share.weight, share.sizes) == (0, 0, ())
    assert list(share.subsets) == []
    assert data.read == []


def test_subsets_are_read_when_they_are_asked_for() -> None:
    data = Recorded(range(9))
    share = batches_of(data, batch=5, micro_batch=2, shuffle=False).share(0)
    assert data.read == []
    assert next(share.subsets) == [0, 1]
    assert data.read == [0, 1]
    assert list(share.subsets) == [[2, 3], [4]]


# ---------------------------------------------------------------------- kinds of data


def test_samples_are_collated_as_torch_does_unless_told_otherwise() -> None:
    data = TensorDataset(torch.arange(6).view(6, 1), torch.arange(6) * 10)
    x, y = Batches(data, batch=3, shuffle=False).read(2, 3)
    assert torch.equal(x, torch.tensor([[2], [3], [4]]))
    assert torch.equal(y, torch.tensor([20, 30, 40]))
    assert Batches(data, batch=3, collate=len).read(0, 3) == 3


def test_a_data_set_that_reads_whole_batches_is_asked_for_them() -> None:
    class Whole(list[int]):
        def __getitems__(self, indices: list[int]) -> list[int]:
            return [-index for index in indices]

    assert batches_of(Whole(range(5)), batch=3, shuffle=False).read(1, 3) == [-1, -2, -3]
    subset: Any = Subset(cast(Any, range(100, 105)), [4, 2, 0])
    assert batches_of(subset, batch=3, shuffle=False).read(0, 3) == [104, 102, 100]


def test_an_iterable_data_set_that_tells_its_length_is_iterated() -> None:
    """torch gives every data set a __getitem__, which in these raises NotImplementedError."""

    class Counted(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(5))

        def __len__(self) -> int:
            return 5

    assert samples_of(batches_of(Counted(), batch=4), range(2)) == [0, 1, 2, 3, 4, 0, 1, 2]


@pytest.mark.parametrize("size", [1, 3])
def test_an_iterator_that_ends_is_an_error_that_says_where(size: int) -> None:
    batches = batches_of(iter(range(7)), batch=3, size=size, rank=size - 1)
    first = batches.share(0).samples
    assert len(samples_of(batches, range(2))) == 2 * first
    with pytest.raises(JobError, match="ended after 7 samples") as caught:
        samples_of(batches, [2])
    assert caught.value.fix


def test_an_iterable_that_gives_samples_only_once_is_an_error() -> None:
    class Once(Stream):
        def __iter__(self) -> Iterator[Any]:
            samples, self.samples = self.samples, []
            return iter(samples)

    with pytest.raises(JobError, match="ended after 7 samples"):
        samples_of(batches_of(Once(range(7)), batch=3), range(3))


@pytest.mark.parametrize("data", [[], torch.zeros(0, 3)], ids=["list", "tensor"])
def test_an_empty_data_set_is_refused_at_once(data: Any) -> None:
    with pytest.raises(JobError, match="empty") as caught:
        Batches(data, batch=1)
    assert caught.value.everywhere
    assert caught.value.where and caught.value.fix


@pytest.mark.parametrize("data", [Stream([]), iter([])], ids=["iterable", "iterator"])
def test_an_iterable_without_samples_is_an_error(data: Any) -> None:
    with pytest.raises(JobError, match="empty") as caught:
        Batches(data, batch=1).read(0, 1)
    assert not caught.value.everywhere  # ranks without a sample do not raise it


def test_what_is_no_data_is_refused() -> None:
    with pytest.raises(JobError, match="neither indexed nor iterated: got 'int'"):
        Batches(5, batch=1)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- samples that are none


class Shrinking(list[int]):
    """Loses its last samples after so many were read."""

    after = 3

    def __getitem__(self, index: Any) -> Any:
        self.after -= 1
        if self.after == 0:
            del self[4:]
        return super().__getitem__(index)


def test_data_that_shrinks_is_told_with_the_sample() -> None:
    batches = batches_of(Shrinking(range(8)), batch=8, shuffle=False)
    with pytest.raises(JobError, match=r"sample 4 .* had 8 samples at the start, and has 4 now"):
        batches.read(0, 8)


@pytest.mark.parametrize("is_batched", [False, True])
def test_sample_that_is_missing_is_told_with_its_place(is_batched: bool) -> None:
    class Short:
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> int:
            return list(range(4))[index]

    class Batched(Short):
        def __getitems__(self, indices: list[int]) -> list[int]:
            return [self[i] for i in indices]

    data = Batched() if is_batched else Short()
    with pytest.raises(JobError, match="missing, though its length is 8: IndexError") as caught:
        batches_of(data, batch=8, shuffle=False).read(2, 4)
    assert "samples 2, 3, 4, 5" in str(caught.value) if is_batched else "sample 4 of"
    assert f"{__file__}:" in str(caught.value.where) and "__getitem__" in str(caught.value.where)


def test_sample_that_fails_is_named_and_keeps_its_traceback() -> None:
    class Failing(list[int]):
        def __getitem__(self, index: Any) -> Any:
            raise OSError("stale file handle")

    with pytest.raises(TrainingError, match=r"sample 0 .*: OSError: stale file handle") as caught:
        batches_of(Failing(range(3)), batch=1, shuffle=False).read(0, 1)
    assert isinstance(caught.value.__cause__, OSError)


def test_stream_that_fails_is_told_with_its_place() -> None:
    def samples() -> Iterator[int]:
        yield from range(3)
        raise ValueError("bad record")

    with pytest.raises(TrainingError, match="failed after 3 samples: ValueError: bad record"):
        batches_of(samples(), batch=4).read(0, 4)


MISFITS: dict[str, tuple[Any, Any, str]] = {
    "shape": (
        torch.zeros(3),
        torch.zeros(4),
        r"sample 0 is Tensor of shape \(3,\), sample 2 Tensor of shape \(4,\)",
    ),
    "nested": (
        {"x": (torch.zeros(2), 1)},
        {"x": (torch.zeros(2, 2), 1)},
        r"sample 2 {'x': \(Tensor of shape \(2, 2\), int\)}",
    ),
    "keys": ({"x": 1}, {"y": 1}, r"sample 0 is {'x': int}, sample 2 {'y': int}"),
    "length": ((1, 2), (1,), r"sample 0 is \(int, int\), sample 2 \(int\)"),
    "type": (1, "a", "sample 0 is int, sample 2 str"),
    "unknown": (object(), object(), "found <class 'object'>"),
    "None": (None, None, "found <class 'NoneType'>"),
}


@pytest.mark.parametrize("kind", [list, Stream])
@pytest.mark.parametrize(("usual", "odd", "expected"), MISFITS.values(), ids=MISFITS)
def test_samples_that_make_no_batch_are_told(
    kind: Callable[[Any], Any], usual: Any, odd: Any, expected: str
) -> None:
    batches = Batches(kind([usual, usual, odd]), batch=3, shuffle=False)
    with pytest.raises(JobError, match=f"samples 0, 1, 2 .*make no batch: .*{expected}") as caught:
        batches.read(0, 3)
    assert "collate" in str(caught.value.fix)


def test_samples_inside_themselves_are_told() -> None:
    sample: list[Any] = []
    sample.append(sample)
    with pytest.raises(JobError, match="make no batch: RecursionError"):
        Batches([sample, sample], batch=2).read(0, 2)


def test_collate_that_fails_names_the_samples_and_keeps_its_traceback() -> None:
    def collate(samples: list[Any]) -> Any:
        raise KeyError("label")

    with pytest.raises(TrainingError, match="failed on samples 0, 1: KeyError") as caught:
        batches_of(range(2), batch=2, shuffle=False, collate=collate).read(0, 2)
    assert isinstance(caught.value.__cause__, KeyError)


def test_batch_that_does_not_fit_in_memory_is_told() -> None:
    data = [torch.zeros(()).expand(1 << 44)] * 2
    with pytest.raises(JobError, match="2 samples do not fit in memory at a time") as caught:
        Batches(data, batch=2).read(0, 2)
    assert "train.micro_batch" in str(caught.value.fix)


def test_order_that_does_not_fit_in_memory_is_told() -> None:
    with pytest.raises(JobError, match="does not fit in memory") as caught:
        batches_of(range(1 << 60), batch=1).read(0, 1)
    assert "train.shuffle = false" in str(caught.value.fix)
    assert batches_of(range(1 << 60), batch=1, shuffle=False).read(1 << 59, 1) == [1 << 59]


# ---------------------------------------------------------------------- random streams


class Shuffled:
    """Shuffles anew in each pass and adds noise, from the generators of the whole process."""

    def __iter__(self) -> Iterator[float]:
        order = list(range(10))
        random.shuffle(order)
        for index in order:
            yield index + float(torch.rand(())) * 0.1 + float(np.random.rand()) * 0.1


def train(batches: Batches, steps: Iterable[int]) -> list[float]:
    """Reads as training does, which draws between reads: dropout, say."""
    found = []
    for step in steps:
        found += samples_of(batches, [step])
        random.random(), torch.rand(3), np.random.rand(2)
    return found


def test_stream_that_draws_gives_the_same_samples_when_resumed() -> None:
    seed_generators(1)
    whole = train(batches_of(Shuffled(), batch=4, seed=7), range(8))
    assert len({int(sample) for sample in whole[:10]}) == 10
    seed_generators(2)
    resumed = batches_of(Shuffled(), batch=4, seed=7)
    before = generator_state()
    assert train(resumed, range(5, 6)) == whole[20:24]
    assert train(resumed, range(6, 8)) == whole[24:]
    restore_generators(before)
    assert train(batches_of(Shuffled(), batch=4, seed=8), range(8)) != whole


def test_stream_that_draws_is_cut_into_shares_without_gaps() -> None:
    """The generators of the ranks differ, so that dropout does; the order must not."""
    whole = samples_of(batches_of(Shuffled(), batch=4, seed=7), range(6))
    ranks = []
    for rank in range(2):
        seed_generators(rank)
        ranks.append(batches_of(Shuffled(), batch=4, seed=7, rank=rank, size=2))
    assert [x for step in range(6) for r in ranks for x in samples_of(r, [step])] == whole


def test_reading_a_stream_leaves_the_generators_alone() -> None:
    draws = []
    for data in (range(10), Shuffled()):
        seed_generators(3)
        samples_of(batches_of(iter(data), batch=4), range(2))
        draws.append((random.random(), float(torch.rand(())), float(np.random.rand())))
    assert draws[0] == draws[1]


def test_the_last_step_can_be_read_again_on_other_ranks() -> None:
    """An iterator gives each sample once: those of one step are kept, and no more."""
    batches = Batches(iter(range(100)), batch=6, rank=2, size=3, may_repeat=True)
    assert [subset.tolist() for subset in batches.share(0).subsets] == [[4, 5]]
    assert [subset.tolist() for subset in batches.share(1).subsets] == [[10, 11]]
    batches.deal(0, 2)
    assert [subset.tolist() for subset in batches.share(1).subsets] == [[6, 7, 8]]
    batches.deal(1, 2)
    assert [subset.tolist() for subset in batches.share(1).subsets] == [[9, 10, 11]]
    assert [subset.tolist() for subset in batches.share(2).subsets] == [[15, 16, 17]]
    with pytest.raises(TrainingError, match="cannot be read back"):
        list(batches.share(0).subsets)
