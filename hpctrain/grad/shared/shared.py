"""One encoder that many train: the root's side and a child's, for a program."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hpctrain.comm.collect import broadcast, broadcast_tensor
from hpctrain.comm.engine import engine_of
from hpctrain.comm.part import split
from hpctrain.errors import ExchangeError, RankDiedError
from hpctrain.grad.flat import Flat, elements_of
from hpctrain.grad.shared.config import SharedConfig
from hpctrain.grad.shared.packets import Kind, Packet
from hpctrain.grad.shared.post import Post
from hpctrain.grad.shared.rounds import Rounds
from hpctrain.trace import now_s
from hpctrain.world import World, join

LOOK_S = 0.05
"""How often the root looks at the clock while it waits."""


@dataclass
class Turn:
    """A child's part of a round.

    Attributes:
        number: of the round, from 0.
        values: what the root said with the parameters.
        figures: what the root is to be told with the answer, as plain JSON values.
        is_cut: set it if the turn was not played to its end, so that there is no answer.
    """

    number: int
    values: Mapping[str, Any]
    figures: dict[str, Any] = field(default_factory=dict)
    is_cut: bool = False


class Shared:
    """Trains one encoder with many tasks: rank 0 leads, groups of others are its children.

        shared = hpctrain.Shared(hpctrain.SharedConfig(rule="median"))
        if shared.is_root:
            shared.lead(encoder, rounds=20, kind={"width": 128})
        else:
            encoder = make_encoder(**shared.instruction()["kind"])
            for turn in shared.turns(encoder, samples=len(data)):
                ...  # steps on the encoder and a head of one's own, over the ranks of shared.world

    Construction is collective over all ranks; afterwards only the ranks of one child meet.

    Args:
        config: the rule, the ranks of a child, and who is waited for.
        world: all ranks; by default those of `hpctrain.join()`.

    Attributes:
        children: ranks of each child; the first speaks for it.
        child: number of this rank's child; -1 on the root.
        world: the ranks of this rank's child as a world of their own, for `DataParallel`.
        ended: what the root said at the end, once it has.

    Raises:
        JobError: the ranks do not make a root and enough children.
    """

    def __init__(self, config: SharedConfig | None = None, *, world: World | None = None) -> None:
        self.config = config = config or SharedConfig()
        self.whole = world = world or join()
        self.children = config.children(world.size)
        self.child = next((n for n, ranks in enumerate(self.children) if world.rank in ranks), -1)
        self.is_root = self.child < 0
        self._engine = engine = engine_of(world)
        engine.tolerate_deaths()
        self.world = split(world, self.child + 1, self._lost)
        self._control = engine_of(self.world).control
        peers = list(range(1, world.size)) if self.is_root else [0]
        self._post = Post(engine, peers, engine.deadline_s)
        self._child_of = {r: child for child, ranks in enumerate(self.children) for r in ranks}
        self.ended: Mapping[str, Any] | None = None
        self._out = ""
        """Why this child is left out, if it is."""

    # ------------------------------------------------------------------ the root

    def open(
        self,
        encoder: nn.Module,
        rounds: int,
        *,
        names: list[str] | None = None,
        say: Callable[[str], object] = lambda text: None,
        **instruction: Any,
    ) -> Rounds:
        """On the root: instruct the children. Not collective.

        Args:
            encoder: with the initial parameters.
            rounds: how many.
            names: of the children, for messages.
            say: tells the user something.
            instruction: for the children; plain JSON values.
        """
        ranks = [self.whole.name_of(ranks[0]) for ranks in self.children]
        self._encoder = encoder
        self._flat = Flat(shared_tensors(encoder))
        self._flat.gather(shared_tensors(encoder))
        self.rounds = Rounds(
            self.config,
            names or [f"child {number}, {name}" for number, name in enumerate(ranks)],
            self._flat.tensor,
            rounds,
            elements_of(trained_tensors(encoder)),
            self._send,
            say,
            self._engine.deadline_s,
        )
        self._kind = kind_of(encoder)
        self.rounds.instruct(now_s(), **instruction)
        return self.rounds

    def play(self, unless: Callable[[], bool] = lambda: False, **values: Any) -> bool:
        """On the root: one round. Afterwards the encoder holds what the rule has made.

        Args:
            unless: asked while children are waited for: whether to give the round up.
            values: for the children, with the parameters; plain JSON values.

        Returns:
            Whether it was played to its end.

        Raises:
            TrainingError: too few children are left.
        """
        rounds = self.rounds
        self._attend(lambda now: rounds.may_begin(now) or unless())
        if unless():
            return False
        rounds.begin(**values)
        self._attend(lambda now: rounds.is_complete(now) or unless())
        if unless():
            return False
        rounds.combine()
        self._flat.tensor.copy_(rounds.server.target)
        self._flat.scatter(shared_tensors(self._encoder))
        return True

    def gather(self, unless: Callable[[], bool] = lambda: False) -> None:
        """On the root: wait for all children that are there to confirm, as before a first round."""
        rounds = self.rounds
        self._attend(lambda _: rounds.confirmed == rounds.present or unless())

    def end(self, **values: Any) -> None:
        """On the root: tell the children that all is done, and wait for their last words."""
        self.rounds.end(**values)
        for child, ranks in enumerate(self.children):
            # Others of a child wait for it if theirs is left out, which may be so only later.
            for rank in ranks if self.rounds.children[child].gone else ranks[1:]:
                if rank not in self._post.dead:
                    self._post.send(rank, Packet(Kind.END, values))
        self._attend(lambda _: self.rounds.has_ended)
        self._leave()

    def lead(self, encoder: nn.Module, rounds: int, **options: Any) -> Rounds:
        """On the root: all rounds; see `open`."""
        self.open(encoder, rounds, **options)
        while not self.rounds.is_over:
            self.play()
        self.end()
        return self.rounds

    def _send(self, child: int, packet: Packet) -> None:
        """To the rank that speaks for a child; to all of its ranks if it is left out."""
        ranks = self.children[child]
        for rank in ranks if packet.kind is Kind.OUT else ranks[:1]:
            if rank not in self._post.dead:
                self._post.send(rank, packet)

    def _attend(self, until: Callable[[float], bool]) -> None:
        """Take in what comes until something is so."""
        rounds, looked_s = self.rounds, 0.0

        def is_due() -> bool:
            return now_s() - looked_s > LOOK_S

        while True:
            for rank, packet in self._post.take():
                self._hand_over(rank, packet)
            for child, ranks in enumerate(self.children):
                if gone := self._post.dead.intersection(ranks):
                    rounds.leave_out(child, f"{self._names(gone)} is dead")
                # A group is as alive as the rank that was silent for longest.
                heard_s = min(self._post.heard_s[rank] for rank in ranks)
                rounds.children[child].heard_s = heard_s
            rounds.look(now_s())
            looked_s = now_s()
            if until(looked_s):
                return
            self._post.wait(is_due)

    def _hand_over(self, rank: int, packet: Packet) -> None:
        child = self._child_of[rank]
        its = packet.values.get("kind_of_encoder", self._kind)
        if its != self._kind:
            self.rounds.leave_out(child, "it would train an encoder of other parameters")
        else:
            self.rounds.came(child, packet, now_s())

    def _names(self, ranks: set[int]) -> str:
        return ", ".join(self.whole.name_of(rank) for rank in sorted(ranks))

    # ------------------------------------------------------------------ a child

    def instruction(self) -> Mapping[str, Any]:
        """On a child: what is to be trained. Collective over the child's ranks."""
        return self._receive(most=1).values

    def refuse(self, reason: str) -> None:
        """On any rank of a child: the child takes no part, or no part any more."""
        self._post.send(0, Packet(Kind.REFUSE, {"reason": reason}))

    def turns(
        self,
        encoder: nn.Module,
        samples: int,
        keeps: Callable[[Mapping[str, Any]], bool] = lambda values: False,
    ) -> Iterator[Turn]:
        """On a child: its part of each round, with the encoder as the root has sent it.

        Confirms first. Answers with the encoder when the next turn is asked for. After the last
        one the encoder is what the root has sent at the end; say `goodbye` then. Collective over
        the child's ranks.

        Args:
            encoder: to be trained; floating-point parameters and buffers are exchanged.
            samples: of the child's training data.
            keeps: of what the root says with the parameters: whether to go on with the encoder as
                it is, in the middle of that round, as a run does that was ended there.

        Raises:
            RankDiedError: the root is dead or silent.
            ExchangeError: another rank of this child is.
        """
        tensors = shared_tensors(encoder)
        flat = Flat(tensors)
        values = {"samples": samples, "kind_of_encoder": kind_of(encoder)}
        self._tell(Packet(Kind.CONFIRM, values))
        while True:
            packet = self._receive()
            if packet.kind is Kind.END:
                self._last, self._tensors = packet.body, tensors
                self.ended = packet.values
                return
            assert packet.body is not None
            if not keeps(packet.values):
                flat.tensor.copy_(packet.body)
                flat.scatter(tensors)
            turn = Turn(int(packet.values["round"]), packet.values)
            yield turn
            if turn.is_cut:
                continue
            flat.gather(tensors)
            answer = {"round": turn.number, "figures": turn.figures}
            self._tell(Packet(Kind.ANSWER, answer, flat.tensor.clone()))

    def take_last(self) -> None:
        """On a child, after the last turn: give the encoder what the root has sent at the end.

        A child that was left out is sent nothing, and keeps its own.
        """
        if self._last is not None:
            flat = Flat(self._tensors)
            flat.tensor.copy_(self._last)
            flat.scatter(self._tensors)

    def goodbye(self, **figures: Any) -> None:
        """On a child, at the end: all that belongs to it is done."""
        self._tell(Packet(Kind.BYE, {"figures": figures}))
        self._leave()

    @property
    def is_told_to_end(self) -> bool:
        """On the rank that speaks for a child: whether the root has said that the run is over."""
        return self.world.rank == 0 and self._post.has(Kind.END)

    def wait_for_end(self) -> None:
        """On a rank of a child that takes no part any more: stay until the run is over."""
        while self.ended is None and not self._is_root_lost():
            if any(packet.kind is Kind.END for _, packet in self._post.take()):
                break
            self._post.wait(self._is_root_lost)
        self._leave()

    def stop(self) -> None:
        """On a child: it was told to end, and so the run is to. Not an answer to anything."""
        self._tell(Packet(Kind.STOP))

    @property
    def is_told_to_stop(self) -> bool:
        """On the root: whether a child was told to end."""
        return self.rounds.is_told_to_stop

    def _tell(self, packet: Packet) -> None:
        if self.world.rank == 0:
            self._post.send(0, packet)

    def _receive(self, most: int | None = None) -> Packet:
        """The newest packet of the root, or the first, on all ranks of this child."""
        newest: Packet | None = None
        if self.world.rank == 0:
            while newest is None:
                self._post.wait(lambda: self._lost() is not None)
                for _, packet in self._post.take(most):
                    if packet.kind is Kind.OUT:
                        self._out = str(packet.values["reason"])
                    elif newest is None or newest.kind is not Kind.END:
                        newest = packet  # but nothing comes after the end
                if newest is None and self._lost() is not None:
                    raise self._root_lost()
        head = (newest.kind, dict(newest.values), newest.body) if newest else None
        if self.world.size == 1:
            assert newest
            return newest
        told = (head[0], head[1], _facts(head[2])) if head else None
        kind, values, facts = broadcast(self._control, told, label="packet of the root")
        body = newest.body if newest else None
        if facts is not None:
            body = body if body is not None else torch.empty(facts[0], dtype=facts[1])
            self._control.run(broadcast_tensor(body), "parameters of the root")
        return Packet(kind, values, body)

    def _lost(self) -> str | None:
        """Why nothing will come any more, if so. Looked at while this child waits."""
        if self.is_root:
            return None
        if self._is_root_lost():
            return "the root is dead" if 0 in self._post.dead else "the root is silent"
        self._out = self._out or self._post.reason_to_be_out()
        if self._out and not self._post.has(Kind.END):
            return f"this child is left out: {self._out}"
        gone = self._post.dead.intersection(self.children[self.child])
        return f"{self._names(gone)} of the same child is dead" if gone else None

    def _is_root_lost(self) -> bool:
        return 0 in self._post.dead or now_s() - self._post.heard_s[0] > self._engine.deadline_s

    def _root_lost(self) -> Exception:
        reason = self._lost()
        where = self.whole.name_of(self.whole.rank)
        fix = "start the same command again to go on from the last checkpoint"
        if reason and reason.startswith("the root"):
            return RankDiedError(reason, (0,), where=where, fix=fix)
        return ExchangeError(str(reason), where=where, fix=fix)

    def _leave(self) -> None:
        self._post.close()
        if self._post.dead:
            self._engine.leave_behind()


def shared_tensors(encoder: nn.Module) -> list[torch.Tensor]:
    """What is exchanged of an encoder: its floating-point parameters, and behind them buffers."""
    buffers = [b for b in encoder.buffers() if b.is_floating_point() or b.is_complex()]
    return [*trained_tensors(encoder), *buffers]


def trained_tensors(encoder: nn.Module) -> list[torch.Tensor]:
    """Its floating-point parameters."""
    return [p for p in encoder.parameters() if p.is_floating_point() or p.is_complex()]


def kind_of(encoder: nn.Module) -> str:
    """Equal for encoders whose parameters fit each other."""
    named = [*encoder.named_parameters(), *encoder.named_buffers()]
    facts = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in named]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _facts(body: torch.Tensor | None) -> tuple[int, torch.dtype] | None:
    return None if body is None else (body.numel(), body.dtype)
