import threading

import pytest

from hpctrain.comm.watch import Pending, Status, describe, main_thread_place, sort_ranks

PENDING = Pending(channel="gradients", number=5, label="block 5", age_s=12.4)
NAMES = ["rank 0 (a)", "rank 1 (a)", "rank 2 (b)"]


def status(rank: int, posted: int, *, left: bool = False) -> Status:
    counts = {"gradients": posted, "control": 99}
    return Status(rank, f"step {rank}, forward", f"train.py:{rank} in run", counts, left)


def statuses(*posted: int | None) -> dict[int, Status]:
    """Answers of ranks that posted so many operations; None does not answer."""
    return {rank: status(rank, n) for rank, n in enumerate(posted) if n is not None}


@pytest.mark.parametrize(
    ("posted", "missing", "there", "silent"),
    [
        ((6, 6, 6), [], [0, 1, 2], []),
        ((6, 5, 9), [1], [0, 2], []),
        ((6, None, 0), [2], [0], [1]),
        ((None, None, None), [], [], [0, 1, 2]),
    ],
)
def test_every_rank_is_missing_there_or_silent(
    posted: tuple[int | None, ...], missing: list[int], there: list[int], silent: list[int]
) -> None:
    assert sort_ranks(PENDING, statuses(*posted), 3) == (missing, there, silent)


def test_a_rank_that_does_not_know_the_channel_is_missing() -> None:
    answers = {0: Status(0, "setting up", "train.py:1 in run", {}, left=False)}
    assert sort_ranks(PENDING, answers, 1) == ([0], [], [])


def test_first_operation_of_a_channel_is_missing_until_posted() -> None:
    first = Pending("gradients", 0, "block 0", 1.0)
    assert sort_ranks(first, statuses(0, 1), 2) == ([0], [1], [])


def test_report_says_who_is_missing_where_and_who_waits() -> None:
    assert describe(PENDING, statuses(6, 5, None), NAMES).splitlines() == [
        "block 5 has not finished for 12 s",
        "  missing: rank 1 (a): step 1, forward, at train.py:1 in run",
        "  no answer: rank 2 (b): stopped, dead or cut off",
        "  waiting in it: rank 0 (a)",
    ]


def test_report_names_a_rank_that_left_the_program() -> None:
    answers = statuses(6, 6) | {2: status(2, 5, left=True)}
    assert describe(PENDING, answers, NAMES).splitlines()[1:] == [
        f"  gone: rank 2 (b) has left the program ({answers[2].position})",
        "  do all ranks take the same number of steps?",
        "  waiting in it: rank 0 (a), rank 1 (a)",
    ]


def test_report_names_a_rank_that_alone_does_not_answer() -> None:
    assert describe(PENDING, statuses(6, None, 6), NAMES).splitlines()[1:] == [
        "  no answer: rank 1 (a): stopped, dead or cut off",
        "  waiting in it: rank 0 (a), rank 2 (b)",
    ]


def test_report_blames_the_network_when_all_ranks_are_in_it() -> None:
    assert describe(PENDING, statuses(6, 6, 7), NAMES).splitlines()[1:] == [
        "  all ranks are in it: the network or the MPI library does not move it",
        "    rank 0 (a): step 0, forward",
        "    rank 1 (a): step 1, forward",
        "    rank 2 (b): step 2, forward",
    ]


def test_report_without_any_answer_blames_nobody() -> None:
    assert describe(PENDING, {}, NAMES) == "block 5 has not finished for 12 s"


def test_place_of_the_main_thread_is_in_the_code_that_waits_not_in_the_library() -> None:
    places: list[str] = []
    asker = threading.Thread(target=lambda: places.append(main_thread_place()))
    asker.start()
    asker.join()
    [place] = places
    assert "test_watch.py:" in place
    assert place.endswith(
        " in test_place_of_the_main_thread_is_in_the_code_that_waits_not_in_the_library"
    )


def test_place_of_the_main_thread_is_its_innermost_line() -> None:
    def inner() -> str:
        return main_thread_place()

    assert inner().endswith(" in inner")
