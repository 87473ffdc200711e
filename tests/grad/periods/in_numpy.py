"""Methods with changes that come late, in NumPy: all ranks in one process, as papers tell them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from hpctrain.grad.periods.method import Method

Array = npt.NDArray[np.float32]
Mean = Callable[[Array], Array]
"""Of one row a rank; with what its wire does to them."""


def mean_in_rank_order(rows: Array) -> Array:
    total = rows[0].copy()
    for row in rows[1:]:
        total += row
    return total * np.float32(1 / len(rows))


class Fragment:
    """One fragment on all ranks.

    Attributes:
        x: the parameters, one row a rank.
        z: what all ranks agree on (with eager updates one row a rank).
    """

    def __init__(self, method: Method, start: Array, ranks: int, mean: Mean) -> None:
        self.method = method
        self.mean = mean
        self.x = np.stack([start] * ranks)
        self.z = self.x.copy()
        self.m = np.zeros_like(self.x)
        self.v = np.full_like(self.x, 1e-3**2)
        self.at_capture = self.x.copy()
        self.late = np.zeros_like(self.x)
        self.own = np.zeros_like(self.x)

    def outer(self, change: Array) -> None:
        f, method = np.float32, self.method
        if method.outer == "adam":
            self.v = self.v * f(0.99) + change * change * f(1 - 0.99)
            self.m = self.m * f(method.outer_momentum) + change * f(1 - method.outer_momentum)
            step = self.m / (np.sqrt(self.v) + f(1e-3))
        elif not method.outer_momentum:
            step = change
        else:
            self.m = self.m * f(method.outer_momentum) + change
            if method.outer_clip:
                self.m = np.clip(self.m, -f(method.outer_clip), f(method.outer_clip))
            step = self.m
            if method.outer == "nesterov":
                step = change + self.m * f(method.outer_momentum)
        self.z = self.z + step * f(method.outer_rate)

    def capture(self) -> Array:
        change = self.x - self.z
        self.at_capture = self.x.copy()
        if self.method.merge == "replace" and self.method.pull_lag:
            self.x = self.z.copy()
        if self.method.merge == "eager":
            self.own = change * np.float32(1 / len(self.x))
            self.outer(self.late + self.own)
            self.late = np.zeros_like(self.late)
            self.x = self.z.copy()
        return change

    def pull(self, mean: Array) -> None:
        f, mix = np.float32, self.method.mix
        if self.method.merge == "eager":
            self.late = mean - self.own
            return
        self.outer(np.stack([mean] * len(self.x)))
        if self.method.merge == "correct" and self.method.pull_lag:
            self.x = (self.x - self.at_capture) + self.z
        elif self.method.merge == "mix":
            self.x = self.x * f(mix) + self.z * f(1 - mix)
        else:
            self.x = self.z.copy()


def trained(
    method: Method,
    start: Array,
    ranks: int,
    iterations: int,
    step: Callable[[Array, int], Array],
    mean: Mean = mean_in_rank_order,
    number: int = 0,
    together: Callable[[Array, int], Array] | None = None,
) -> Fragment:
    """One fragment of a model after so many iterations.

    Args:
        method: how.
        start: its parameters.
        ranks: how many.
        iterations: how many.
        step: what a local step makes of the parameters of all ranks in an iteration.
        mean: over ranks.
        number: which of the model's fragments it is, from 0.
        together: what a step on the gradient of all ranks makes of them, in the warm-up.
    """
    fragment = Fragment(method, start, ranks, mean)
    sent: dict[int, Array] = {}
    ahead = number * method.period // method.fragments
    for i in range(1, method.warmup + 1):
        assert together
        fragment.x = together(fragment.x, i)
        fragment.z = fragment.x.copy()
    for i in range(method.warmup + 1, iterations + 1):
        fragment.x = step(fragment.x, i)
        came = i - method.pull_lag
        captures, pulls = ((j + ahead) % method.period == 0 for j in (i, came))
        pulls = pulls and came > method.warmup
        replaces = method.merge == "replace"
        if captures and (replaces or method.pull_lag == 0):
            sent[i] = fragment.capture()
        if pulls:
            fragment.pull(mean(sent.pop(came)))
        if captures and not replaces and method.pull_lag > 0:
            sent[i] = fragment.capture()
    return fragment


def trained_in_fragments(
    method: Method,
    starts: Sequence[Array],
    ranks: int,
    iterations: int,
    step: Callable[[Array, int, slice], Array],
    make_mean: Callable[[int], Mean],
    together: Callable[[Array, int, slice], Array] | None = None,
) -> Array:
    """A whole model, one row a rank.

    Args:
        method: how.
        starts: parameters of each fragment.
        ranks: how many.
        iterations: how many.
        step: as of `trained`, told which elements of the model they are.
        make_mean: over ranks, of so many elements.
        together: as of `trained`, told which elements of the model they are.
    """
    ends = list(accumulate(len(start) for start in starts))
    found = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        cut = slice(end - len(start), end)
        one = trained(
            *(method, start, ranks, iterations),
            lambda x, i, cut=cut: step(x, i, cut),
            make_mean(len(start)),
            number,
            together and (lambda x, i, cut=cut: together(x, i, cut)),
        )
        found.append(one.x)
    return np.concatenate(found, axis=1)


def trained_late(
    method: Method,
    start: Array,
    ranks: int,
    iterations: int,
    gradient: Callable[[Array, int], Array],
    rate: float,
    momentum: float,
    mean: Mean = mean_in_rank_order,
) -> tuple[Array, Array]:
    """A model whose ranks tell each other gradients, with plain SGD.

    Args:
        method: how.
        start: its parameters.
        ranks: how many.
        iterations: how many.
        gradient: of each rank at its parameters, in an iteration; one row a rank.
        rate: the learning rate.
        momentum: of SGD.
        mean: over ranks.

    Returns:
        The parameters, one row a rank, and what all ranks agree on.
    """
    f, lag = np.float32, method.pull_lag

    def moved(x: Array, buffer: Array | None, g: Array) -> tuple[Array, Array | None]:
        if momentum:
            buffer = g if buffer is None else buffer * f(momentum) + g
            g = buffer
        return x - g * f(rate), buffer

    shared, held = start.copy(), None
    x = np.stack([start] * ranks)
    told: dict[int, Array] = {}
    then: dict[int, Array] = {}
    for i in range(1, method.warmup + 1):
        shared, held = moved(shared, held, mean_in_rank_order(gradient(x, i)))
        x = np.stack([shared] * ranks)
    for i in range(method.warmup + 1, iterations + 1):
        told[i], then[i] = gradient(x, i), x
        if i > method.warmup + lag:
            g = mean(told[i - lag])
            if method.merge == "compensate":
                g = g + g * g * (x[0] - then[i - lag][0]) * f(method.compensation)
            shared, held = moved(shared, held, g)
        x = np.stack([shared] * ranks)
        if method.merge == "correct":
            for rank in range(ranks):
                own, buffer = shared, held
                for ahead in range(max(method.warmup, i - lag) + 1, i + 1):
                    own, buffer = moved(own, buffer, told[ahead][rank])
                x[rank] = own
    return x, shared
