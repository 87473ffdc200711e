from hpctrain.grad.trial import MODES, ROUNDS, WARM_UP_STEPS, Trial, medians


def test_every_mode_has_the_same_number_of_turns_after_the_warm_up() -> None:
    trial = Trial()
    turns = []
    while not trial.is_over:
        turns.append(trial.mode)
        trial.record(len(turns))
    counted = turns[WARM_UP_STEPS:]
    assert counted == list(MODES) * ROUNDS
    assert trial.times_s == list(range(WARM_UP_STEPS + 1, len(turns) + 1))


def test_median_is_over_the_slowest_rank_of_each_step() -> None:
    fast, slow = 1.0, 5.0
    first = [fast, slow, 3.0] * ROUNDS
    second = [4.0, fast, 3.5] * ROUNDS
    second[0] = 100.0  # one outlier
    assert medians([first, second]) == dict(zip(MODES, (4.0, 5.0, 3.5), strict=True))
