from itertools import groupby

from hpctrain.grad.trial import MODES, ROUNDS, WARM_UP_STEPS, Trial, chosen, medians


def turns_of(trial: Trial) -> list[str]:
    turns = []
    while not trial.is_over:
        turns.append(trial.mode)
        trial.record(len(turns))
    return turns


def test_every_mode_has_the_same_number_of_turns_after_the_warm_up() -> None:
    trial = Trial()
    turns = turns_of(trial)
    assert turns[WARM_UP_STEPS:] == list(MODES) * ROUNDS
    first = WARM_UP_STEPS + 1
    assert trial.times_s == {
        mode: list(range(first + place, len(turns) + 1, len(MODES)))
        for place, mode in enumerate(MODES)
    }


def test_steps_that_overlap_keep_their_mode_and_count_when_it_has_settled() -> None:
    trial = Trial(chained=True)
    turns = turns_of(trial)
    each = WARM_UP_STEPS + ROUNDS
    assert [(mode, len(list(run))) for mode, run in groupby(turns)] == [
        ("thread", each),
        ("hooks", each),
    ]
    assert trial.times_s == {
        "thread": list(range(WARM_UP_STEPS + 1, each + 1)),
        "hooks": list(range(each + WARM_UP_STEPS + 1, 2 * each + 1)),
    }


def test_median_is_over_the_slowest_rank_of_each_step() -> None:
    fast, slow = 1.0, 5.0
    first = {"thread": [fast] * ROUNDS, "hooks": [slow] * ROUNDS, "after": [3.0] * ROUNDS}
    second = {"thread": [4.0] * ROUNDS, "hooks": [fast] * ROUNDS, "after": [3.5] * ROUNDS}
    second["thread"][0] = 100.0  # one outlier
    assert medians([first, second]) == {"thread": 4.0, "hooks": 5.0, "after": 3.5}


def test_overlap_must_be_worth_it() -> None:
    assert chosen({"after": 1.0, "thread": 0.97, "hooks": 0.96}) == "after"
    assert chosen({"after": 1.0, "thread": 0.8, "hooks": 0.79}) == "hooks"
    assert chosen({"thread": 1.0, "hooks": 0.97}) == "thread"
