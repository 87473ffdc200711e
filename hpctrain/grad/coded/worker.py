"""A worker's side: computes data blocks, sends sums of them, and takes what the root sums up.

The main thread computes; messages are handled by whoever is inside the engine. What both touch is
under one lock, which is never held while one waits for the engine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from hpctrain.grad.coded.cells import Buffer, Kind, Pool, content
from hpctrain.grad.coded.collecting import Column, Parts
from hpctrain.grad.coded.schemes import Scheme
from hpctrain.grad.coded.sums import Node, tree_of
from hpctrain.trace import now_s

Post = Callable[[int, Buffer], None]
"""Sends a message to a rank, which takes it over."""


@dataclass
class Arrived:
    """What has come of a round's results."""

    results: dict[int, Buffer]
    figures: bytes | None = None
    """Figures of an evaluation."""
    state: Buffer | None = None
    """The state to go on from, instead of results."""
    whole_s: float = 0.0
    """When the last result came."""


class Worker:
    """What one rank computes and receives. Pure but for `post`.

    A rank that computes nothing, the dedicated root, is one without data blocks.

    Args:
        post: sends.
        pool: of buffers.
        roots: the ranks that sum up; the first also says who computes what.
        scheme: what is sent.
        index: which worker this is.
        holds_back: whether sums are sent only when they will not grow any more.
    """

    def __init__(
        self,
        post: Post,
        pool: Pool,
        roots: Sequence[int],
        scheme: Scheme,
        index: int = -1,
        holds_back: bool = True,
    ) -> None:
        self.lock = threading.Lock()
        self._post = post
        self._pool = pool
        self._roots = tuple(roots)
        self._scheme = scheme
        self._index = index
        self._holds_back = holds_back
        self._columns: Sequence[Column] = ()
        self._sums: list[Parts] = []
        self._blocks = 0
        self.round = -1
        self.trains = True
        """Whether the round is a step, and not an evaluation."""
        self.own: tuple[int, ...] = ()
        """The data blocks that it computes unless told otherwise."""
        self._queue: list[int] = []
        self._expected: list[set[int]] = []
        """By column: data blocks that it will still put into its sums."""
        self._begun: set[int] = set()
        """Data blocks that it has computed in this round, or is computing."""
        self._dropped: set[int] = set()
        self._told: dict[int, int] = {}
        """By data block: number of the last order about it."""
        self._own_round = -1
        """When the data blocks that it owns were dealt."""
        self.current: int | None = None
        self.arrived = Arrived({})
        self._shown: list[Buffer] = []
        """Results of the last step, which are the module's gradients until the next."""
        self.ended: bytes | None = None
        """The ranks that are dead, when the run is over."""
        self.continues = False
        """Whether the run that is over is to be continued."""
        self._last_round = -1

    # ------------------------------------------------------------------ the main thread

    def begin(
        self,
        round_: int,
        blocks: int,
        columns: Sequence[Column] | None,
        own: Sequence[int] | None = None,
    ) -> None:
        """Begin a round: say so to the roots, and be ready for their answers.

        Args:
            round_: its number, larger than that of the last.
            blocks: its data blocks.
            columns: the model blocks whose sums come back, empty if they are not laid out yet;
                None for an evaluation.
            own: the data blocks that this worker computes, if not those that the root dealt it.
        """
        with self.lock:
            self._shown += self.arrived.results.values()
            while columns is not None and self._shown:
                self._pool.drop(self._shown.pop())
            state = self.arrived.state  # may have come after all results
            if state and state.round <= round_:
                self._pool.drop(state)
                state = None
            self.arrived = Arrived({}, state=state)
            self.round, self._blocks, self.trains = round_, blocks, columns is not None
            mine = tuple(self.own if own is None else own)
            self._queue = list(mine)
            self._begun.clear()
            self._dropped.clear()
            self._told.clear()
            self.current = None
            self._take_columns(columns or (), mine)
        for root in self._roots:
            self._post(
                root,
                self._pool.message(
                    Kind.JOIN, round_, blocks, int(columns is not None), data=as_bytes(mine)
                ),
            )

    def lay_out(self, columns: Sequence[Column]) -> None:
        """Learn the columns, in the first round, before anything was put into them."""
        if self.round < 0:
            return  # the first round brings them
        with self.lock:
            expected = {*self._queue} | ({self.current} if self.current is not None else set())
            self._take_columns(columns, expected & {*self.own})

    def _take_columns(self, columns: Sequence[Column], expected: Collection[int]) -> None:
        for old in self._sums:
            old.clear()
        self._columns = columns
        tree = tree_of(self._blocks)
        drop = self._pool.drop
        self._sums = [self._scheme.parts(column, tree, self._index, drop) for column in columns]
        self._expected = [set(expected if self._holds_back else ()) for _ in columns]

    def next_block(self) -> int | None:
        """The data block to compute now, if there is one."""
        with self.lock:
            self.current = self._queue.pop(0) if self._queue and not self.is_over else None
            if self.current is not None:
                self._begun.add(self.current)
            return self.current

    @property
    def is_whole(self) -> bool:
        """Whether all that the round gives has come."""
        arrived = self.arrived
        if arrived.figures is not None:
            return True
        return bool(self._columns) and len(arrived.results) == len(self._columns)

    def has_all(self, round_: int) -> bool:
        """Whether this is the round that it is in, and all that it gives has come."""
        return self.round == round_ and self.is_whole

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to compute: it is whole, or others have gone on."""
        # What the last round gives may come after the word that it was the last.
        left_behind = self.ended is not None and self.round != self._last_round
        return self.is_whole or left_behind or self.arrived.state is not None

    @property
    def has_work(self) -> bool:
        """Whether there is a data block to compute."""
        return bool(self._queue)

    @property
    def is_wanted(self) -> bool:
        """Whether the data block that is being computed is still needed."""
        return not self.is_over and self.current not in self._dropped

    def put(self, column: int, cell: Buffer, block: int) -> None:
        """Take in the gradient of a model block on a data block; send sums that are complete."""
        with self.lock:
            self._put(column, cell, Node(block, block + 1))

    def take_left(self, column: int, block: int) -> Buffer | None:
        """The cell onto which that of the data block is to be added, if there is one.

        So that it can be added without a cell of its own; `put_sum` is to follow.
        """
        tree, node = tree_of(self._blocks), Node(block, block + 1)
        left = tree.siblings.get(node)
        if left is None or left.lo > block or not left.is_leaf:
            return None
        with self.lock:
            return self._sums[column].nodes.pop(left, None)

    def put_sum(self, column: int, cell: Buffer, block: int) -> None:
        """Take in what `take_left` gave, with the data block added."""
        with self.lock:
            self._put(column, cell, Node(block - 1, block + 1))

    def _put(self, column: int, cell: Buffer, node: Node) -> None:
        if self.is_over:
            self._pool.drop(cell)
            return
        self._expected[column].difference_update(range(*node))
        self._sums[column].put(node, cell)
        self._send_settled(column)

    def take_state(self) -> Buffer | None:
        """The state to go on from, if there is one. It is the caller's then."""
        with self.lock:
            state, self.arrived.state = self.arrived.state, None
            return state

    def finish(self) -> int:
        """The data block is computed; `done` is to follow when all of its cells are in."""
        with self.lock:
            block, self.current = self.current, None
        assert block is not None
        return block

    def done(self, block: int, figures: bytes = b"") -> None:
        """All cells of a data block are in, or its figures are there."""
        self._post(self._roots[0], self._pool.message(Kind.DONE, self.round, block, data=figures))

    def give_up(self) -> None:
        """The data block is not needed any more: nothing more of it comes."""
        with self.lock:
            block, is_wanted = self.current, self.is_wanted
            assert block is not None
            self.current = None
            self._begun.discard(block)
            if is_wanted:  # it was asked for again in the meantime
                self._queue.insert(0, block)
            else:
                self._expect_no_more(block)

    # ------------------------------------------------------------------ messages

    def receive(self, buffer: Buffer) -> None:
        """Handle a message of a root."""
        with self.lock:
            self._receive(buffer)

    def _receive(self, buffer: Buffer) -> None:
        kind = buffer.kind
        if kind is Kind.END:
            self.continues = bool(buffer.lo)
            self.ended, self._last_round = content(buffer), buffer.round
        elif kind is Kind.OWN:
            if buffer.round > self._own_round:
                self.own, self._own_round = as_blocks(content(buffer)), buffer.round
        elif kind is Kind.STATE:
            there = self.arrived.state
            if buffer.round > (there.round if there else self.round):
                self.arrived.state = buffer
                if there is None:
                    return
                buffer = there
        elif buffer.round == self.round:
            self._handle(kind, buffer)
            if kind is Kind.RESULT and self.arrived.results.get(buffer.column) is buffer:
                return
        self._pool.drop(buffer)

    def _handle(self, kind: Kind, buffer: Buffer) -> None:
        if kind is Kind.RESULT:
            self.arrived.results.setdefault(buffer.column, buffer)
            if len(self.arrived.results) == len(self._columns):
                self.arrived.whole_s = now_s()
        elif kind is Kind.OVER:
            self.arrived.figures = content(buffer)
        elif buffer.column > self._told.get(buffer.lo, -1):
            self._told[buffer.lo] = buffer.column
            self._obey(kind, buffer.lo)

    def _obey(self, kind: Kind, block: int) -> None:
        if kind is Kind.HELP:
            self._dropped.discard(block)
            if block not in self._begun and block not in self._queue:
                self._queue.append(block)
            return
        if kind is Kind.DROP:
            self._dropped.add(block)
        # Not if it is only taken: the one who was asked first might leave it to this one as well.
        if kind is not Kind.TAKEN and block in self._queue:
            self._queue.remove(block)
        self._expect_no_more(block)

    def _expect_no_more(self, block: int) -> None:
        for column, expected in enumerate(self._expected):
            if block in expected:
                expected.discard(block)
                self._send_settled(column)

    def _send_settled(self, column: int) -> None:
        root = self._columns[column].root
        for node, cell in self._sums[column].take_settled(self._expected[column]):
            cell.write(Kind.CELL, self.round, column, *node, cell.loss)
            self._post(root, cell)


def as_bytes(blocks: Sequence[int]) -> bytes:
    """Data blocks as they travel."""
    return np.asarray(blocks, np.int32).tobytes()


def as_blocks(data: bytes) -> tuple[int, ...]:
    """What `as_bytes` made."""
    return tuple(np.frombuffer(data, np.int32).tolist())
