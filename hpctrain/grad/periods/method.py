"""What is exchanged when, and what it does to the parameters: published methods, and others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from hpctrain.comm.quantize import QUANTIZERS
from hpctrain.comm.reduce import WIRE_DTYPES
from hpctrain.config import check, option
from hpctrain.errors import JobError

SENDS = ("gradients", "changes")
MERGES = ("late", "correct", "compensate", "replace", "mix", "eager")
OUTER = ("sgd", "nesterov", "adam")
WIRES = (*WIRE_DTYPES, *QUANTIZERS)
ADAM_RATE, ADAM_MOMENTUM = 1e-2, 0.9
"""What is not set with outer = "adam"."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train with gradients or parameters of other ranks that come late.

    Attributes:
        sends: the gradient of an iteration, or the change of the parameters since they last took
            in what had come.
        period: iterations between two exchanges of the same parameters; 1 with gradients.
        push_lag: iterations between capturing and sending.
        pull_lag: iterations between capturing and taking in; with changes at most the period.
        merge: how parameters take in what comes; see `merging`.
        mix: weight of a rank's own parameters, with merge = "mix".
        compensation: weight of the correction for delay, with merge = "compensate".
        fragments: parts of the model that are exchanged in turn.
        outer: optimizer that the mean change is given to, as if it were a gradient.
        outer_rate: its learning rate.
        outer_momentum: its momentum (or Adam's first decay).
        outer_clip: largest element of the momentum; 0 for no limit.
        wire: type of elements on the wire.
        warmup: iterations at the beginning whose gradients are exchanged and waited for.
    """

    sends: str = "gradients"
    period: int = 1
    push_lag: int = 0
    pull_lag: int = 0
    merge: str = "correct"
    mix: float = 0.0
    compensation: float = 0.0
    fragments: int = 1
    outer: str = "sgd"
    outer_rate: float = 1.0
    outer_momentum: float = 0.0
    outer_clip: float = 0.0
    wire: str = "same"
    warmup: int = 0


PRESETS = {
    "every_step": Method(),
    "one_late": Method(pull_lag=1, merge="late"),
    "od_sgd": Method(pull_lag=1),
    "dc_sgd": Method(pull_lag=1, merge="compensate", compensation=0.04),
    "local": Method(sends="changes", period=8, merge="replace"),
    "corrected": Method(sends="changes", period=8, pull_lag=2, fragments=8),
    "overlap_local": Method(
        sends="changes", period=8, pull_lag=8, merge="mix", mix=0.4, outer_momentum=0.7
    ),
    "co2": Method(
        sends="changes", period=8, pull_lag=8, merge="replace", outer_momentum=0.2, outer_clip=1.0
    ),
    "diloco": Method(
        sends="changes",
        period=16,
        merge="replace",
        outer="nesterov",
        outer_rate=0.7,
        outer_momentum=0.9,
    ),
    "eager_diloco": Method(
        sends="changes",
        period=16,
        pull_lag=16,
        merge="eager",
        outer="nesterov",
        outer_rate=0.7,
        outer_momentum=0.9,
    ),
    "streaming_diloco": Method(
        sends="changes",
        period=16,
        pull_lag=2,
        merge="mix",
        mix=0.5,
        fragments=4,
        outer="nesterov",
        outer_rate=0.4,
        outer_momentum=0.9,
    ),
}
"""Published methods, with the settings of their papers where these do not depend on the model.

- one_late: Pipe-SGD (Li et al., NeurIPS 2018), with a pipeline of two.
- od_sgd: OD-SGD (Xu et al., ACM TACO 2020): a local step until the global gradient comes. Here the
  local step is the job's optimizer's; with plain SGD that is the paper's.
- dc_sgd: DC-ASGD's correction of a late gradient (Zheng et al., ICML 2017), of the mean over ranks.
- local: local SGD (Stich, ICLR 2019): parameters are averaged once a period.
- overlap_local: Overlap-Local-SGD (Wang, Liang, Joshi, ICASSP 2020), pullback 0.6, momentum 0.7.
- co2: CO2 (Sun et al., ICLR 2024). Its authors' code divides the change by a constant L, 1 unless
  set, for the staleness gap: outer_rate = 1 / L with an outer_clip that is L times as large.
- diloco: DiLoCo (Douillard et al., 2023).
- eager_diloco: eager updates (Kale et al., 2025).
- streaming_diloco: Streaming DiLoCo (Douillard et al., 2025); with wire = "int8" or "int4".
"""


@dataclass(frozen=True, kw_only=True)
class PeriodsConfig:
    """How late gradients and local updates are; what is left out is as in the preset."""

    preset: str = option("every_step", choices=PRESETS)
    """A published method, see docs/periods.md; other keys change it."""
    sends: str | None = option(None, choices=SENDS)
    """What ranks tell each other: the gradient of each iteration, or the change of the parameters
    in a period of local steps."""
    period: int | None = option(None, minimum=1, maximum=1 << 20)
    """Iterations between two exchanges of the same parameters."""
    push_lag: int | None = option(None, minimum=0, maximum=1 << 20)
    """Iterations after which it is sent what there is to tell."""
    pull_lag: int | None = option(None, minimum=0, maximum=1 << 20)
    """Iterations after which the parameters take in what others have told."""
    merge: str | None = option(None, choices=MERGES)
    """How they take it in. Gradients: instead of the local step that they were given to
    (`correct`), or without any local step (`late`), then also corrected for the delay to first
    order (`compensate`). Changes: instead of the local change (`correct`), of all local parameters
    (`replace`), of a part of them (`mix`), or before it has come, with the local change in its
    place (`eager`)."""
    mix: float | None = option(None, minimum=0, maximum=1)
    """Weight of the local parameters with merge = 'mix'."""
    compensation: float | None = option(None, minimum=0)
    """Weight of the correction with merge = 'compensate'."""
    fragments: int | None = option(None, minimum=1, maximum=1 << 16)
    """Parts of the model that are exchanged in turn, so that the wire is evenly loaded."""
    outer: str | None = option(None, choices=OUTER)
    """Optimizer that takes the mean change as its gradient."""
    outer_rate: float | None = option(None, above=0)
    """Its learning rate; with `adam` 0.01 unless set."""
    outer_momentum: float | None = option(None, minimum=0, maximum=0.9999)
    """Its momentum; with `adam` its first decay, 0.9 unless set."""
    outer_clip: float | None = option(None, minimum=0)
    """Largest element of its momentum; 0 for no limit."""
    wire: str | None = option(None, choices=WIRES)
    """Type of elements on the wire: the parameters' own, 16 bits, or integers of 8 or 4 bits with
    a scale for every 64, where what rounding loses is sent later (error feedback)."""
    warmup: int | None = option(None, minimum=0, maximum=1 << 40)
    """Iterations at the beginning that are as with mode = 'allreduce': a model that has just begun
    moves too fast for late gradients and long periods (as in OD-SGD; post-local SGD, Lin et al.,
    2020)."""
    memory_limit_mb: float = option(0.0, minimum=0)
    """Most memory (10^6 bytes) of a rank for copies of gradients and parameters; 0 for no limit."""

    def __post_init__(self) -> None:
        check(self)
        for mistake in mistakes_of(self.method):
            raise JobError(mistake, everywhere=True)

    @property
    def method(self) -> Method:
        """The preset with what is set besides."""
        given: dict[str, Any] = {
            field.name: value
            for field in fields(Method)
            if (value := getattr(self, field.name)) is not None
        }
        if self.outer == "adam":  # whose steps are of another size than the preset's optimizer's
            given = {"outer_rate": ADAM_RATE, "outer_momentum": ADAM_MOMENTUM} | given
        preset = PRESETS[self.preset]
        if preset.pull_lag == preset.period > 1 and "period" in given:
            given.setdefault("pull_lag", given["period"])  # what is told is taken in a period later
        return replace(preset, **given)


def mistakes_of(method: Method) -> Iterator[str]:
    """What does not fit together."""
    gradients = method.sends == "gradients"
    merges = ("late", "correct", "compensate") if gradients else ("correct", *MERGES[3:])
    if method.merge not in merges:
        yield (
            f"merge = {method.merge!r} with sends = {method.sends!r}; allowed: {', '.join(merges)}"
        )
    if gradients and (method.period > 1 or method.fragments > 1):
        yield (
            "gradients of every iteration are sent, all at once; period and fragments must be 1, "
            "or sends = 'changes'"
        )
    if method.push_lag and method.pull_lag <= method.push_lag:
        yield f"pull_lag = {method.pull_lag}: must be more than push_lag, {method.push_lag}"
    if not gradients and method.pull_lag > method.period:
        yield (
            f"pull_lag = {method.pull_lag}: with sends = 'changes' at most the period, "
            f"{method.period}"
        )
    if method.merge == "eager" and method.pull_lag != method.period:
        yield f"merge = 'eager' takes in what was sent a period ago; pull_lag = {method.period}"
    if method.merge == "replace" and 0 < method.pull_lag < method.period:
        yield (
            f"pull_lag = {method.pull_lag} with merge = 'replace' gives up the local steps between "
            f"telling and taking in; allowed: 0, {method.period}, or merge = 'correct'"
        )
    if method.merge == "compensate" and not method.pull_lag:
        yield "merge = 'compensate' corrects for a delay; pull_lag must be at least 1"
    if method.outer_clip and (method.outer == "adam" or not method.outer_momentum):
        yield "outer_clip limits the momentum of outer = 'sgd' or 'nesterov'; there is none"
    for name, merge in (("mix", "mix"), ("compensation", "compensate")):
        if getattr(method, name) and method.merge != merge:
            yield f"{name} does nothing with merge = {method.merge!r}"
    if gradients:
        unset = Method()
        for name in ("outer", "outer_rate", "outer_momentum", "outer_clip"):
            if getattr(method, name) != getattr(unset, name):
                yield f"{name} does nothing with sends = 'gradients'"
    if method.outer == "nesterov" and not method.outer_momentum:
        yield "outer = 'nesterov' needs outer_momentum"
