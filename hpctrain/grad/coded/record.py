"""What the trace says of the rounds of the coded mode; `hpctrain.straggling` reads it."""

from __future__ import annotations

from collections.abc import Sequence

from hpctrain.comm.engine import Engine
from hpctrain.grad.coded.aggregator import Aggregator
from hpctrain.grad.coded.collecting import Column
from hpctrain.grad.coded.coordinator import Coordinator
from hpctrain.trace import CODED, DATA_BLOCKS, now_s


class Record:
    """Records data blocks on every rank, and rounds on the first root."""

    def __init__(
        self,
        engine: Engine,
        workers: Sequence[int],
        samples: Sequence[int],
        aggregator: Aggregator | None,
        coordinator: Coordinator | None,
    ) -> None:
        self._engine = engine
        self._trace = engine.world.trace
        self._rank = engine.world.rank
        self._workers = tuple(workers)
        self._samples = list(samples)
        self._aggregator = aggregator
        self._coordinator = coordinator
        self._finished: dict[int, tuple[int, float]] = {}
        """By round: the step that it was, and when its last sum was there."""

    def block(self, step: int, round_: int, block: int, begun_s: float, computed: bool) -> None:
        """A data block is over on this rank: it was computed, or given up."""
        self._trace.add(
            *(DATA_BLOCKS, f"data block {block}", begun_s, now_s()),
            step=step,
            round=round_,
            block=block,
            computed=computed,
        )

    def finished(self, step: int, round_: int, whole_s: float) -> None:
        """A step has its gradient, since `whole_s`."""
        if self._coordinator:
            self._finished[round_] = step, whole_s

    def rounds(self, last: int, columns: Sequence[Column]) -> None:
        """Record rounds up to `last`, of which late news have come by now."""
        if self._coordinator is None or self._aggregator is None:
            return
        ranks = self._workers
        with self._engine.exclusive():
            ended = [e for e in self._coordinator.ended if e.number <= last]
            self._coordinator.ended = [e for e in self._coordinator.ended if e.number > last]
            tallies = [self._aggregator.tallies.pop(e.number, None) for e in ended]
        nbytes = sum(column.nbytes for column in columns if column.root == self._rank)
        for round_, tally in zip(ended, tallies, strict=True):
            step, whole_s = self._finished.pop(round_.number, (0, 0.0))
            if not step or tally is None or not self._trace.active:
                continue
            done_by = {block: ranks[worker] for block, worker in round_.done_by.items()}
            blocks = range(len(self._samples))
            sources = [tally.sources.get(block, done_by.get(block, -1)) for block in blocks]
            if -1 in sources:
                continue  # an estimate: there is no time by which all data blocks were there
            self._trace.add(
                *(CODED, "step", round_.begun_s, whole_s),
                step=step,
                round=round_.number,
                holders=[[ranks[w] for w in holders] for holders in round_.assignment.holders],
                sources=sources,
                redundant=[[block, ranks[worker]] for block, worker in round_.redundant],
                vectors=tally.nbytes / nbytes,
                samples=self._samples,
                dead=sorted(self._coordinator.dead),
            )
