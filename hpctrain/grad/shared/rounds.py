"""The root's side, as a plain state machine: who takes part, who is waited for, what comes out.

Free of MPI and of clocks: whoever drives it tells what came and what time it is, and sends what it
gives. A round is over when all of its children have answered, or, once there is a quorum, when
the time of grace is. Whoever answers later joins the next round that begins, which waits for it
twice as long as it took: else the answers of a child that is always slower would never count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hpctrain.errors import TrainingError
from hpctrain.grad.shared.config import SharedConfig
from hpctrain.grad.shared.packets import Kind, Packet
from hpctrain.grad.shared.rules import Server

OWED_TURNS = 2.0
"""How long a round waits for one that was late, in the time that its last turn took."""

Send = Callable[[int, Packet], object]
"""To a child, by its number."""
Say = Callable[[str], object]


@dataclass
class Child:
    """What the root knows of a child.

    Attributes:
        name: how messages call it.
        samples: of its training data; 0 until it has confirmed.
        gone: why it takes no part any more, if so.
        works_on: the round that it was last sent, or -1.
        spoilt: whether its answer to that cannot be used.
        is_busy: whether it has not answered that yet.
        sent_s: when that was sent.
        owed_s: how long from then on it is waited for, since its answer before came too late.
        heard_s: when it last gave a sign of life.
    """

    name: str
    samples: int = 0
    gone: str = ""
    works_on: int = -1
    spoilt: bool = False
    is_busy: bool = False
    sent_s: float = 0.0
    owed_s: float = 0.0
    heard_s: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    """What it last told of itself."""
    is_done: bool = False
    """Whether it has done what belongs to the end."""
    is_expected: bool = True
    """Whether a round waits for its confirmation; no second one does."""


class Rounds:
    """Leads children through rounds.

    Args:
        config: the rule, and who is waited for.
        names: of the children.
        start: initial parameters, flat.
        rounds: how many.
        trained: elements at the beginning of `start` that are trained; what is behind them, such as
            running means, is what the rule makes of it.
        send: sends a packet to a child.
        say: tells the user something.
        deadline_s: how long a child may be silent.

    Attributes:
        number: the present round, from 0.
        is_open: whether a round is under way.
        answered: numbers of the children that made the last round.
        is_told_to_stop: whether a child was told to end.
        is_ending: whether children were told that the run is over.
    """

    def __init__(
        self,
        config: SharedConfig,
        names: Sequence[str],
        start: torch.Tensor,
        rounds: int,
        trained: int,
        send: Send,
        say: Say,
        deadline_s: float,
    ) -> None:
        self.config = config
        self.children = [Child(name) for name in names]
        self.server = Server(config, start, trained)
        self.rounds = rounds
        self.number = 0
        self.is_open = False
        self.answered: list[int] = []
        self._send, self._say = send, say
        self._deadline_s = deadline_s
        self.is_told_to_stop = False
        self.is_ending = False
        self._now_s = 0.0
        self._rows: dict[int, torch.Tensor] = {}
        self._enough_s: float | None = None
        """Since when there is a quorum."""
        self._values: Mapping[str, Any] = {}

    @property
    def present(self) -> list[int]:
        """Children that are not gone."""
        return [number for number, child in enumerate(self.children) if not child.gone]

    @property
    def confirmed(self) -> list[int]:
        """Those of them that have samples."""
        return [number for number in self.present if self.children[number].samples]

    def instruct(self, now_s: float, **values: Any) -> None:
        """Tell all children what is to be trained."""
        for number, child in enumerate(self.children):
            child.heard_s = now_s
            self._send(number, Packet(Kind.INSTRUCT, values))

    def may_begin(self, now_s: float) -> bool:
        """Whether a round may begin: all have confirmed, or enough of them long enough ago."""
        self._now_s = now_s
        children = [self.children[number] for number in self.present]
        expected = sum(child.is_expected or child.samples > 0 for child in children)
        return self._is_enough(len(self.confirmed), expected, now_s)

    def begin(self, **values: Any) -> None:
        """Begin the next round with all that have confirmed and are not busy with an earlier one.

        Args:
            values: for the children, with the parameters.
        """
        for child in self.children:
            if not child.gone and not child.samples and child.is_expected:
                child.is_expected = False
                self._say(f"{child.name} has not confirmed: round {self.number} begins without it")
        self.is_open = True
        self._rows = {}
        self._enough_s = None
        self._values = values
        for number in self._idle:
            self._train(number)

    @property
    def _idle(self) -> list[int]:
        """Children that may be sent the present round."""
        children = self.children
        free = [number for number in self.confirmed if not children[number].is_busy]
        return [number for number in free if children[number].works_on != self.number]

    def _train(self, number: int) -> None:
        child = self.children[number]
        child.works_on, child.sent_s = self.number, self._now_s
        child.is_busy, child.spoilt = True, False
        values = {"round": self.number, **self._values}
        self._send(number, Packet(Kind.TRAIN, values, self.server.target))

    def came(self, number: int, packet: Packet, now_s: float) -> None:
        """A packet of a child is there."""
        child = self.children[number]
        child.heard_s = self._now_s = now_s
        if child.gone:
            return
        if packet.kind is Kind.CONFIRM:
            child.samples = int(packet.values["samples"])
        elif packet.kind is Kind.REFUSE:
            self.leave_out(number, str(packet.values["reason"]))
        elif packet.kind is Kind.ANSWER:
            self._answer(number, packet)
        elif packet.kind is Kind.STOP:
            self.is_told_to_stop = True
        elif packet.kind is Kind.BYE:
            child.figures = dict(packet.values["figures"])
            child.is_done = True

    def _answer(self, number: int, packet: Packet) -> None:
        child, its = self.children[number], int(packet.values["round"])
        is_late = its != self.number or not self.is_open
        if its == child.works_on:
            child.is_busy = False
            child.owed_s = OWED_TURNS * (self._now_s - child.sent_s) if is_late else 0.0
        if is_late:
            self._say(f"{child.name} answers round {its} too late")
            return
        row = packet.body
        if row is None or row.shape != self.server.target.shape:
            self.leave_out(number, "it answers with parameters of another encoder")
        elif not bool(torch.isfinite(row).all()):
            self._say(f"{child.name} answers round {its} with values that are not finite: left out")
            child.spoilt = True
        else:
            child.figures = dict(packet.values["figures"])
            self._rows[number] = row

    def leave_out(self, number: int, reason: str) -> None:
        """A child takes no part any more."""
        child = self.children[number]
        if not child.gone:
            child.gone = reason
            self._rows.pop(number, None)
            self._send(number, Packet(Kind.OUT, {"reason": reason}))
            self._say(f"{child.name} is left out: {reason}")

    def look(self, now_s: float) -> None:
        """Leave out those that have been silent for too long, and take in those that are needed.

        Raises:
            TrainingError: too few are left for the rule to mean anything.
        """
        self._now_s = now_s
        for number, child in enumerate(self.children):
            if now_s - child.heard_s > self._deadline_s and not child.is_done:
                self.leave_out(number, f"no sign of life for {self._deadline_s:g} s")
        if self.is_open and not self.is_ending and len(self._awaited) < self._fewest:
            for number in self._idle:
                self._train(number)
        left, fewest = len(self._hopes), self._fewest
        if left < fewest and not self.is_over and not self.is_ending:
            whys = [c.gone or c.spoilt * "its answer was not finite" for c in self.children]
            gone = "; ".join(f"{self.children[n].name}: {why}" for n, why in enumerate(whys) if why)
            raise TrainingError(
                f"too few children are left in round {self.number}",
                value=f"{left} ({gone})",
                allowed=f"{fewest} or more",
                fix="look for what ended them, or lower shared.quorum or shared.tolerates",
            )

    @property
    def _hopes(self) -> list[int]:
        """Children that have answered the present round, or still may."""
        return [number for number in self.present if not self.children[number].spoilt]

    @property
    def is_over(self) -> bool:
        """Whether all rounds are done."""
        return self.number >= self.rounds

    def is_complete(self, now_s: float) -> bool:
        """Whether the present round has all answers that it waits for."""
        awaited = self._awaited
        is_enough = self._is_enough(len(self._rows), len(awaited), now_s)
        missing = [self.children[number] for number in awaited if number not in self._rows]
        return is_enough and not any(now_s - child.sent_s < child.owed_s for child in missing)

    @property
    def _awaited(self) -> list[int]:
        """Children that have answered the present round, or were sent it."""
        return [n for n in self._hopes if self.children[n].works_on == self.number]

    def _is_enough(self, there: int, expected: int, now_s: float) -> bool:
        if there < self._fewest:
            self._enough_s = None
            return False
        if there >= expected:
            return True
        if not self.config.quorum:
            return False
        if self._enough_s is None:
            self._enough_s = now_s
        return now_s - self._enough_s >= self.config.grace_s

    def combine(self) -> None:
        """End the round: the rule makes the next parameters of the answers."""
        self.answered = sorted(self._rows)  # in one order, whoever was first
        missing = [c.name for n, c in enumerate(self.children) if self._is_missed(n)]
        if missing:
            self._say(f"round {self.number} is made without {', '.join(missing)}")
        rows = torch.stack([self._rows[number] for number in self.answered])
        samples = [self.children[number].samples for number in self.answered]
        self.server.step(rows, samples, self._spoilt)
        self.number += 1
        self.is_open = False
        self._enough_s = None

    @property
    def _spoilt(self) -> int:
        """Children whose answers cannot be used: fewer of the others can be hostile."""
        return sum(child.spoilt and not child.gone for child in self.children)

    @property
    def _fewest(self) -> int:
        """Answers without which there is no round."""
        return max(1, self.config.quorum, self.config.fewest_without(self._spoilt))

    def _is_missed(self, number: int) -> bool:
        child = self.children[number]
        has_begun = child.works_on >= 0 and number not in self._rows
        return has_begun and not child.gone and not child.spoilt

    def end(self, **values: Any) -> None:
        """Tell all children that the run is over, with the last parameters."""
        self.is_ending = True
        for number in self.present:
            self._send(number, Packet(Kind.END, values, self.server.target))

    @property
    def has_ended(self) -> bool:
        """Whether all children that take part have said goodbye."""
        return all(self.children[n].is_done for n in self.confirmed)

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on after the last round."""
        return {"number": self.number, **self.server.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.number = int(state["number"])
        self.server.load_state_dict({k: v for k, v in state.items() if k != "number"})
