"""How one encoder is trained by many: rounds, who is waited for, and the rule."""

from __future__ import annotations

from dataclasses import dataclass

from hpctrain.config import LONGEST_S, check, option
from hpctrain.errors import JobError
from hpctrain.grad.shared.rules import RuleConfig


@dataclass(frozen=True, kw_only=True)
class SharedConfig(RuleConfig):
    """How a root and its children train one encoder."""

    tasks: list[str] = option([])
    """Job modules of the tasks, relative to the job file; children take them in turn."""
    round_steps: int = option(50, minimum=1)
    """Steps that a child takes between two exchanges of the encoder."""
    group: int = option(1, minimum=1)
    """Ranks of a child; they exchange gradients as in the mode `allreduce`."""
    quorum: int = option(0, minimum=0)
    """Children whose answers make a round; 0 for all that take part in it."""
    grace_s: float = option(10.0, minimum=0, maximum=LONGEST_S)
    """How long the others are waited for once there is a quorum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self)
        if bad := [task for task in self.tasks if not isinstance(task, str)]:
            raise JobError("tasks: must be names of files", value=bad[0], everywhere=True)
        if self.quorum and self.quorum < self.fewest:
            raise JobError(
                f"quorum: rule = {self.rule!r} that tolerates {self.tolerates} needs more answers",
                value=self.quorum,
                allowed=f"{self.fewest} or more, or 0 for all",
                everywhere=True,
            )

    def children(self, size: int) -> tuple[tuple[int, ...], ...]:
        """Ranks of each child, the first of which speaks for it; rank 0 is the root.

        Raises:
            JobError: the ranks do not make so many groups, or there are too few children.
        """
        count, rest = divmod(size - 1, self.group)
        if rest or not count:
            raise JobError(
                "exchange.mode = 'shared' needs a root and children of shared.group ranks each",
                value=f"{size} rank(s)",
                allowed=f"1 and a multiple of {self.group} more",
                fix=f"start {1 + self.group * max(1, count)} ranks, or change shared.group",
                everywhere=True,
            )
        self.refuse_few(count)
        if len(self.tasks) > count:
            raise JobError(
                "shared.tasks: there are more tasks than children",
                value=f"{len(self.tasks)} tasks, {count} child(ren)",
                allowed=f"at most {count} tasks",
                fix=f"start {1 + self.group * len(self.tasks)} ranks, or name fewer tasks",
                everywhere=True,
            )
        if self.quorum > count:
            raise JobError(
                "shared.quorum: there are not so many children",
                value=self.quorum,
                allowed=f"0 to {count}",
                fix="lower it, or start more ranks",
                everywhere=True,
            )
        groups = (range(1 + i * self.group, 1 + (i + 1) * self.group) for i in range(count))
        return tuple(tuple(ranks) for ranks in groups)
