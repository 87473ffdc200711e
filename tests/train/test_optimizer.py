from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from hpctrain.errors import JobError
from hpctrain.train.optimizer import _OPTIMIZERS, ScheduleConfig, build_optimizer, check_optimizer

shapes = pytest.mark.parametrize("name", ["linear", "cosine"])


def mistakes_in(table: dict[str, Any]) -> list[str]:
    mistakes: list[str] = []
    check_optimizer(table, "optimizer", mistakes)
    return mistakes


# ---------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("name", sorted(_OPTIMIZERS))
def test_an_optimizer_that_is_accepted_trains_a_linear_layer(name: str) -> None:
    table = {"name": name, "lr": 0.01}
    assert mistakes_in(table) == []
    layer = nn.Linear(2, 2)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    optimizer = build_optimizer(layer.parameters(), table)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    for parameter, old in zip(layer.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)


def test_the_table_is_what_the_optimizer_gets() -> None:
    table = {"name": "adam", "lr": 0.5, "betas": [0.8, 0.9], "amsgrad": True}
    optimizer = build_optimizer([nn.Parameter(torch.zeros(1))], table)
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["lr"] == 0.5
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["amsgrad"] is True


def test_without_a_name_it_is_adamw() -> None:
    assert mistakes_in({}) == []
    assert type(build_optimizer([nn.Parameter(torch.zeros(1))], {})) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("table", "mistake"),
    [
        ({"name": "adamm"}, "optimizer.name: unknown optimizer 'adamm'; did you mean 'adam'?"),
        ({"name": "zzz"}, "optimizer.name: unknown optimizer 'zzz'; valid here: "),
        ({"name": 5}, "optimizer.name: unknown optimizer 5; valid here: "),
        ({"name": ["sgd"]}, "optimizer.name: "),
        ({"name": "lbfgs"}, "optimizer.name: unknown optimizer 'lbfgs'"),
        ({"name": "optimizer"}, "optimizer.name: unknown optimizer 'optimizer'"),
        (
            {"name": "sgd", "momentun": 0.9},
            "optimizer.momentun: unknown key for sgd; did you mean 'momentum'?",
        ),
        ({"name": "sgd", "params": []}, "optimizer.params: unknown key for sgd"),
        ({"lr": -1}, "optimizer.lr: adamw refuses it: Invalid learning rate"),
        ({"lr": "fast"}, "optimizer.lr: expected a number, got 'fast'"),
        ({"lr": True}, "optimizer.lr: expected a number, got True"),
        ({"lr": float("nan")}, "optimizer.lr: expected a number, got nan"),
        ({"lr": 10**400}, "optimizer.lr: expected a number, got an integer of 1329 bits"),
        ({"foreach": "no"}, "optimizer.foreach: expected true or false, got 'no'"),
        ({"amsgrad": 1}, "optimizer.amsgrad: expected true or false, got 1"),
        ({"capturable": True}, "optimizer.capturable: needs a GPU"),
        ({"differentiable": True}, "optimizer.differentiable: adamw refuses it: "),
        ({"betas": 0.9}, "optimizer.betas: expected a list of 2 numbers, got 0.9"),
        ({"betas": [0.9]}, "optimizer.betas: expected a list of 2 numbers, got [0.9]"),
        ({"betas": [0.9, True]}, "optimizer.betas: expected a list of 2 numbers"),
        ({"betas": {}}, "optimizer.betas: expected a list of 2 numbers, got {}"),
        ({"betas": [0.9, 1.5]}, "optimizer.betas: adamw refuses it: Invalid beta"),
        ({"name": "sgd", "nesterov": True}, "optimizer.nesterov: sgd refuses it: Nesterov"),
    ],
    ids=repr,
)
def test_a_mistake_in_the_table_is_told(table: dict[str, Any], mistake: str) -> None:
    [told] = mistakes_in(table)
    assert told.startswith(mistake)


@pytest.mark.parametrize(
    ("table", "places"),
    [
        ({"lr": -1, "weight_decay": -1}, ["lr", "weight_decay"]),
        ({"lr": -1, "foo": 1, "betas": [2, 3]}, ["foo", "betas", "lr"]),
        ({"lr": -1, "foreach": 1, "eps": -1}, ["foreach", "lr", "eps"]),
        ({"name": "sgd", "nesterov": True, "momentum": 0, "lr": -2}, ["nesterov", "lr"]),
    ],
    ids=repr,
)
def test_all_mistakes_are_told(table: dict[str, Any], places: list[str]) -> None:
    told = [mistake.split(":")[0].removeprefix("optimizer.") for mistake in mistakes_in(table)]
    assert sorted(told) == sorted(places)


def test_arguments_that_do_not_go_together_are_told() -> None:
    [told] = mistakes_in({"foreach": True, "fused": True})
    assert told.startswith("optimizer") and "fused" in told


def test_all_unknown_keys_are_told() -> None:
    mistakes = mistakes_in({"name": "sgd", "rate": 1, "beta": 2})
    assert [mistake.partition(":")[0] for mistake in mistakes] == [
        "optimizer.rate",
        "optimizer.beta",
    ]


# ---------------------------------------------------------------------- schedule


def factors(steps: int, **options: Any) -> list[float]:
    schedule = ScheduleConfig(**options)
    return [schedule.factor(step, steps) for step in range(steps)]


def test_a_constant_rate_is_constant() -> None:
    assert factors(5) == [1.0] * 5


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_the_warm_up_rises_along_a_line_and_ends_at_the_full_rate(name: str) -> None:
    assert factors(10, name=name, warmup=3)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_a_warm_up_longer_than_the_run_never_reaches_the_full_rate() -> None:
    assert factors(3, name="cosine", warmup=9) == [0.1, 0.2, 0.3]


@shapes
@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("final", [0.0, 0.25, 1.0])
def test_after_the_warm_up_the_rate_falls_from_1_towards_final(
    name: str, warmup: int, final: float
) -> None:
    after = factors(100, name=name, warmup=warmup, final=final)[warmup:]
    assert after[0] == 1.0
    assert all(later < earlier or final == 1 for earlier, later in pairwise(after))
    assert final <= after[-1] <= final + 0.02


def test_a_line_falls_evenly() -> None:
    falls = [earlier - later for earlier, later in pairwise(factors(9, name="linear", final=0.2))]
    assert falls == pytest.approx([falls[0]] * 8)


def test_a_half_cosine_falls_late_then_early() -> None:
    cosine = factors(101, name="cosine", final=0.2)
    line = factors(101, name="linear", final=0.2)
    assert all(c > lin for c, lin in zip(cosine[2:49], line[2:49], strict=True))
    assert all(c < lin for c, lin in zip(cosine[53:99], line[53:99], strict=True))


@shapes
def test_a_run_of_one_step_has_a_rate(name: str) -> None:
    assert 0 <= factors(1, name=name)[0] <= 1


@pytest.mark.parametrize(
    "options", [{"name": "step"}, {"warmup": -1}, {"final": 1.5}, {"final": -0.1}], ids=repr
)
def test_a_schedule_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(JobError, match=next(iter(options))):
        ScheduleConfig(**options)
