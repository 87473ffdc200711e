"""The root's rounds, with children and a clock that are pretended."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from hpctrain.errors import JobError, TrainingError
from hpctrain.grad.shared.config import SharedConfig
from hpctrain.grad.shared.packets import Kind, Packet
from hpctrain.grad.shared.rounds import Rounds

DEADLINE_S = 100.0


class Play:
    """A root, what it sends and says, and a clock."""

    def __init__(self, children: int = 3, rounds: int = 3, **config: Any) -> None:
        self.sent: list[tuple[int, Packet]] = []
        self.said: list[str] = []
        self.now_s = 0.0
        self.rounds = Rounds(
            SharedConfig(**config),
            [f"child {number}" for number in range(children)],
            torch.zeros(4),
            rounds,
            4,
            lambda child, packet: self.sent.append((child, packet)),
            self.said.append,
            DEADLINE_S,
        )
        self.rounds.instruct(0.0, kind={"width": 3})

    def confirm(self, *children: int, samples: int = 10) -> None:
        for child in children:
            self.came(child, Packet(Kind.CONFIRM, {"samples": samples * (1 + child)}))

    def answer(self, child: int, value: float, number: int | None = None) -> None:
        its = self.rounds.number if number is None else number
        body = torch.full((4,), value)
        self.came(child, Packet(Kind.ANSWER, {"round": its, "figures": {"loss": value}}, body))

    def came(self, child: int, packet: Packet) -> None:
        self.rounds.came(child, packet, self.now_s)

    def sent_to(self, kind: Kind) -> list[int]:
        return [child for child, packet in self.sent if packet.kind is kind]

    @property
    def is_complete(self) -> bool:
        return self.rounds.is_complete(self.now_s)

    @property
    def target(self) -> float:
        return float(self.rounds.server.target[0])


def test_a_round_is_the_mean_of_all_weighted_by_samples() -> None:
    play = Play(rounds=1)
    assert play.sent_to(Kind.INSTRUCT) == [0, 1, 2]
    play.confirm(0, 1)
    assert not play.rounds.may_begin(0.0)
    play.confirm(2)
    assert play.rounds.may_begin(0.0)
    play.rounds.begin(step=5)
    assert [(c, p.values) for c, p in play.sent[3:]] == [
        (child, {"round": 0, "step": 5}) for child in range(3)
    ]
    for child in (2, 0, 1):
        assert not play.is_complete
        play.answer(child, float(child))
    assert play.is_complete
    play.rounds.combine()
    assert play.target == pytest.approx((0 * 10 + 1 * 20 + 2 * 30) / 60)
    assert play.rounds.is_over and play.rounds.answered == [0, 1, 2]
    play.rounds.end(stops=False)
    assert play.sent_to(Kind.END) == [0, 1, 2] and not play.rounds.has_ended
    for child in range(3):
        play.came(child, Packet(Kind.BYE, {"figures": {}}))
    assert play.rounds.has_ended


@pytest.mark.parametrize("seed", range(10))
def test_the_order_of_answers_changes_no_bit(seed: int) -> None:
    targets = []
    for order in (list(range(5)), random.Random(seed).sample(range(5), 5)):
        play = Play(children=5)
        play.confirm(*order)
        play.rounds.begin()
        for child in order:
            row = torch.randn(4, generator=torch.Generator().manual_seed(child))
            play.came(child, Packet(Kind.ANSWER, {"round": 0, "figures": {}}, row))
        play.rounds.combine()
        targets.append(play.rounds.server.target)
    assert torch.equal(*targets)


def test_a_quorum_waits_for_its_time_of_grace() -> None:
    play = Play(quorum=2, grace_s=5.0)
    play.confirm(0, 1)
    assert not play.rounds.may_begin(0.0) and not play.rounds.may_begin(4.9)
    assert play.rounds.may_begin(5.0)
    play.rounds.begin()
    assert "child 2 has not confirmed" in play.said[-1]
    play.answer(0, 1.0)
    play.now_s = 50.0
    assert not play.is_complete
    play.answer(1, 1.0)
    assert play.is_complete  # all that take part have answered


@pytest.mark.parametrize(
    ("ranks", "values", "text"),
    [
        (3, {"tasks": ["a.py", "b.py", "c.py"]}, "more tasks than children"),
        (4, {"group": 2}, "children of shared.group ranks each"),
        (1, {}, "children of shared.group ranks each"),
        (3, {"quorum": 3}, "not so many children"),
    ],
)
def test_ranks_that_make_no_such_children(ranks: int, values: dict[str, Any], text: str) -> None:
    with pytest.raises(JobError, match=text):
        SharedConfig(**values).children(ranks)


def test_late_figures_are_not_those_of_a_round() -> None:
    play = Play(quorum=2, grace_s=0.0)
    play.confirm(0, 1, 2)
    for _ in range(2):
        play.rounds.begin()
        play.answer(0, 1.0)
        play.answer(1, 1.0)
        assert play.is_complete
        play.rounds.combine()
    play.answer(2, 7.0, number=0)
    assert play.rounds.children[2].figures == {}


def test_nobody_is_missed_once_the_run_is_ending() -> None:
    play = Play(children=2)
    play.confirm(0, 1)
    play.rounds.end(stops=True)
    play.came(
        0,
        Packet(Kind.REFUSE, {"reason": "its disk is full"}),
    )
    play.came(1, Packet(Kind.BYE, {"figures": {}}))
    play.rounds.look(1.0)
    assert play.rounds.has_ended


def test_who_is_late_joins_the_next_round() -> None:
    play = Play(quorum=2, grace_s=5.0)
    play.confirm(0, 1, 2)
    play.rounds.begin()
    play.answer(0, 1.0)
    play.answer(1, 1.0)
    assert not play.is_complete
    play.now_s = 5.0
    assert play.is_complete
    play.rounds.combine()
    assert "made without child 2" in play.said[-1]
    play.answer(2, 100.0, number=0)
    assert play.said[-1].endswith("answers round 0 too late")
    assert play.target == 1.0
    play.rounds.begin()
    play.answer(2, 2.0)
    play.answer(2, 300.0, number=0)  # what is late counts for nothing, whenever it comes
    play.answer(0, 2.0)
    play.answer(1, 2.0)
    play.rounds.combine()
    assert play.target == 2.0


def test_who_is_always_slower_counts_now_and_then() -> None:
    """Two of three take a second for a round, the third one and a half; nobody waits for a laggard,
    but in the round that it joins after it was late."""
    play = Play(rounds=100, quorum=2, grace_s=0.0)
    play.confirm(0, 1, 2)
    takes_s, due_s = (1.0, 1.0, 1.5), dict[int, tuple[float, int]]()
    counted = 0
    for _ in range(30):
        begun = len(play.sent)
        play.rounds.begin()
        for child, packet in play.sent[begun:]:
            assert child not in due_s, "it is busy"
            due_s[child] = play.now_s + takes_s[child], int(packet.values["round"])
        while not play.is_complete:
            child = min(due_s, key=lambda child: due_s[child])
            play.now_s, its = due_s.pop(child)
            play.answer(child, float(child), its)
        play.rounds.combine()
        counted += 2 in play.rounds.answered
    assert counted == 10
    assert play.now_s == 35.0


def test_who_is_owed_a_round_is_waited_for_twice_as_long_as_it_took() -> None:
    """It may hang with its heart still beating."""
    play = Play(quorum=2, grace_s=0.0)
    play.confirm(0, 1, 2)
    play.rounds.begin()
    for number, at_s in ((0, 1.0), (1, 2.0)):
        play.answer(0, 1.0)
        play.answer(1, 1.0)
        play.now_s = at_s
        assert play.is_complete != bool(number)  # round 1 waits for child 2
        if not number:
            play.rounds.combine()
            play.now_s = 1.5
            play.answer(2, 1.0, number=0)
            play.rounds.begin()
    play.now_s = 1.5 + 2 * 1.5 - 0.01
    assert not play.is_complete
    play.now_s = 1.5 + 2 * 1.5
    assert play.is_complete
    play.rounds.combine()
    assert "round 1 is made without child 2" in play.said[-1]


def without_the_third() -> Play:
    """The second of two rounds is open, and child 2 still works on the first."""
    play = Play(quorum=2, grace_s=0.0)
    play.confirm(0, 1, 2)
    play.rounds.begin()
    for child in (0, 1):
        play.answer(child, 1.0)
    play.rounds.combine()
    play.rounds.begin()
    return play


def test_nobody_is_sent_a_round_once_the_run_is_ending() -> None:
    play = without_the_third()
    play.answer(2, 1.0, number=0)
    play.rounds.end(stops=True)
    play.came(1, Packet(Kind.REFUSE, {"reason": "its disk is full"}))
    play.rounds.look(play.now_s)
    assert play.sent_to(Kind.TRAIN) == [0, 1, 2, 0, 1]


def test_a_round_that_lacks_children_takes_those_that_were_late() -> None:
    play = without_the_third()
    assert play.sent_to(Kind.TRAIN)[3:] == [0, 1]
    play.rounds.leave_out(1, "it is dead")
    play.answer(0, 1.0)
    play.rounds.look(play.now_s)
    assert not play.is_complete
    play.answer(2, 1.0, number=0)
    play.rounds.look(play.now_s)
    assert play.sent_to(Kind.TRAIN)[5:] == [2]
    play.answer(2, 3.0)
    assert play.is_complete
    play.rounds.combine()
    assert play.rounds.answered == [0, 2]


def test_who_confirms_late_joins_the_next_round_and_is_waited_for_once() -> None:
    play = Play(quorum=2, grace_s=5.0)
    play.confirm(0, 1)
    assert not play.rounds.may_begin(0.0)
    assert play.rounds.may_begin(5.0)
    for number in range(2):
        play.rounds.begin()
        assert sum("has not confirmed" in text for text in play.said) == 1
        if number:
            play.confirm(2)
        assert play.sent_to(Kind.TRAIN)[2 * number :] == [0, 1]
        play.answer(0, 1.0)
        play.answer(1, 1.0)
        play.rounds.combine()
        assert play.rounds.may_begin(6.0)
    play.rounds.begin()
    assert play.sent_to(Kind.TRAIN)[4:] == [0, 1, 2]


def test_answers_that_are_not_finite_are_none_of_a_quorum() -> None:
    play = Play(quorum=2)
    play.confirm(0, 1, 2)
    play.rounds.begin()
    play.answer(0, 1.0)
    play.answer(1, float("nan"))
    play.answer(2, float("nan"))
    assert not play.is_complete
    with pytest.raises(TrainingError, match="too few children are left"):
        play.rounds.look(0.0)


def test_who_is_left_out_is_told_so() -> None:
    play = Play()
    play.confirm(0, 1, 2)
    play.rounds.leave_out(1, "it is odd")
    play.rounds.leave_out(1, "it is dead as well")
    assert play.sent_to(Kind.OUT) == [1]


def test_values_that_are_not_finite_are_left_out_of_a_round() -> None:
    play = Play()
    play.confirm(0, 1, 2)
    play.rounds.begin()
    play.answer(0, 1.0)
    play.answer(1, float("nan"))
    play.answer(2, 1.0)
    assert "child 1 answers round 0 with values that are not finite" in play.said[-1]
    assert play.is_complete
    play.rounds.combine()
    assert play.target == 1.0 and play.rounds.answered == [0, 2]
    play.rounds.begin()
    assert play.sent_to(Kind.TRAIN)[-3:] == [0, 1, 2]  # it may do better


def test_a_child_that_is_known_to_be_wrong_need_not_be_tolerated_again() -> None:
    play = Play(children=5, rule="krum", tolerates=1)
    play.confirm(0, 1, 2, 3, 4)
    play.rounds.begin()
    for child in range(4):
        play.answer(child, 1.0 + 0.01 * child)
    assert not play.is_complete
    play.answer(4, float("nan"))
    assert play.is_complete
    play.rounds.look(0.0)
    play.rounds.combine()
    assert 1.0 <= play.target <= 1.03


def test_who_refuses_dies_or_is_silent_is_named() -> None:
    play = Play(children=4)
    play.came(1, Packet(Kind.REFUSE, {"reason": "no samples"}))
    play.confirm(0, 2, 3)
    assert play.rounds.may_begin(0.0)
    play.rounds.begin()
    play.rounds.leave_out(2, "rank 2 (a) is dead")
    play.now_s = 1.0
    play.answer(0, 1.0)
    assert not play.is_complete
    play.rounds.look(DEADLINE_S + 0.5)
    assert play.is_complete
    assert play.said == [
        "child 1 is left out: no samples",
        "child 2 is left out: rank 2 (a) is dead",
        "child 3 is left out: no sign of life for 100 s",
    ]
    play.answer(3, 5.0)  # it was alive after all, but is out
    play.rounds.combine()
    assert play.target == 1.0


def test_too_few_children_end_the_run() -> None:
    play = Play(children=2)
    play.confirm(0, 1)
    play.rounds.begin()
    for child in (0, 1):
        play.rounds.leave_out(child, "gone")
    with pytest.raises(TrainingError, match=r"too few children are left in round 0.*child 1: gone"):
        play.rounds.look(0.0)


def test_nobody_with_finite_values_ends_the_run() -> None:
    play = Play(children=2)
    play.confirm(0, 1)
    play.rounds.begin()
    for child in (0, 1):
        play.answer(child, float("inf"))
    assert not play.is_complete
    with pytest.raises(TrainingError, match="its answer was not finite"):
        play.rounds.look(0.0)


def test_another_encoder_is_left_out() -> None:
    play = Play(children=2)
    play.confirm(0, 1)
    play.rounds.begin()
    body = torch.zeros(5)
    play.came(0, Packet(Kind.ANSWER, {"round": 0, "figures": {}}, body))
    assert "parameters of another encoder" in play.said[-1]


def test_rounds_go_on_from_a_state() -> None:
    plays = [Play(server="adam", server_rate=0.1) for _ in range(2)]
    for play in plays:
        play.confirm(0, 1, 2)
    whole, parts = plays
    for number in range(3):
        if number == 2:
            resumed = Play(server="adam", server_rate=0.1)
            resumed.confirm(0, 1, 2)
            resumed.rounds.load_state_dict(parts.rounds.state_dict())
            parts = resumed
        for play in (whole, parts):
            play.rounds.begin()
            for child in range(3):
                play.answer(child, float(child + number))
            play.rounds.combine()
    assert parts.rounds.is_over
    assert torch.equal(whole.rounds.server.target, parts.rounds.server.target)


# ---------------------------------------------------------------------- who takes part


@pytest.mark.parametrize(("size", "group"), [(1, 1), (4, 2), (2, 3)])
def test_ranks_that_make_no_children(size: int, group: int) -> None:
    with pytest.raises(JobError, match="needs a root and children"):
        SharedConfig(group=group).children(size)


def test_groups_of_ranks() -> None:
    assert SharedConfig().children(3) == ((1,), (2,))
    assert SharedConfig(group=2).children(5) == ((1, 2), (3, 4))


def test_preconditions_are_checked_at_the_start() -> None:
    with pytest.raises(JobError, match="needs more children"):
        SharedConfig(rule="krum", tolerates=1).children(5)
    assert len(SharedConfig(rule="krum", tolerates=1).children(6)) == 5
    with pytest.raises(JobError, match="needs more answers"):
        SharedConfig(rule="krum", tolerates=1, quorum=4)
    with pytest.raises(JobError, match="there are not so many children"):
        SharedConfig(quorum=3).children(3)
