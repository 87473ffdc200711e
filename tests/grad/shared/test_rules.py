"""What a root makes of the children's parameters, also of hostile ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpctrain.errors import JobError
from hpctrain.grad.shared.rules import RuleConfig, Server, combined, krum


def rows(children: int, count: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randn(children, count, generator=torch.Generator().manual_seed(seed))


def test_mean_weighs_samples() -> None:
    found = combined(RuleConfig(), rows(3), [1, 2, 5])
    expected = np.average(rows(3).numpy(), axis=0, weights=[1, 2, 5])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("children", [1, 2, 5, 6])
def test_median(children: int) -> None:
    found = combined(RuleConfig(rule="median"), rows(children), [1] * children)
    np.testing.assert_allclose(found.numpy(), np.median(rows(children).numpy(), axis=0), rtol=1e-6)


def test_trimmed_mean() -> None:
    found = combined(RuleConfig(rule="trimmed", tolerates=2), rows(7), [1] * 7)
    expected = np.sort(rows(7).numpy(), axis=0)[2:5].mean(axis=0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_krum_by_hand() -> None:
    points = torch.tensor([[0.0], [1.0], [1.1], [1.2], [50.0]])
    assert krum(points, 1) == 2


@pytest.mark.parametrize("rule", ["median", "trimmed", "krum"])
@pytest.mark.parametrize("hostile", [lambda x: -x, lambda x: 100 * x, lambda x: x + 1e6])
def test_one_of_five_spoils_nothing(rule: str, hostile: object) -> None:
    honest = 3.0 + 0.01 * rows(5)
    sent = honest.clone()
    sent[2] = hostile(honest[2])  # type: ignore[operator]
    tolerates = 0 if rule == "median" else 1
    found = combined(RuleConfig(rule=rule, tolerates=tolerates), sent, [1] * 5)
    assert (found - 3.0).abs().max() < 0.05


@pytest.mark.parametrize(("rule", "tolerates", "fewest"), [("krum", 1, 5), ("trimmed", 2, 5)])
def test_too_few_children(rule: str, tolerates: int, fewest: int) -> None:
    config = RuleConfig(rule=rule, tolerates=tolerates)
    config.refuse_few(fewest)
    with pytest.raises(JobError, match="needs more children"):
        config.refuse_few(fewest - 1)


def test_what_does_nothing_is_refused() -> None:
    with pytest.raises(JobError, match="does nothing"):
        RuleConfig(tolerates=1)


def test_server_without_momentum_takes_what_comes() -> None:
    server = Server(RuleConfig(), torch.zeros(9))
    server.step(rows(2), [1, 1])
    assert torch.equal(server.target, combined(RuleConfig(), rows(2), [1, 1]))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_server_in_numpy_and_resumed(kind: str) -> None:
    config = RuleConfig(server=kind, server_rate=0.5, server_momentum=0.9)
    server, x = Server(config, torch.ones(9)), np.ones(9, np.float32)
    m, v = np.zeros_like(x), np.full_like(x, 1e-6)
    for turn in range(5):
        sent = rows(3, seed=turn)
        change = sent.numpy().mean(axis=0) - x
        if kind == "adam":
            m = 0.9 * m + 0.1 * change
            v = 0.99 * v + 0.01 * change**2
            x = x + 0.5 * m / (np.sqrt(v) + 1e-3)
        else:
            m = 0.9 * m + change
            x = x + 0.5 * m
        if turn == 2:
            state = {name: value.clone() for name, value in server.state_dict().items()}
            server = Server(config, torch.zeros(9))
            server.load_state_dict(state)
        server.step(sent, [1, 1, 1])
    np.testing.assert_allclose(server.target.numpy(), x, rtol=1e-3)


@pytest.mark.parametrize("values", [{"server_momentum": 0.9}, {"server": "adam"}])
def test_buffers_are_what_the_rule_gives(values: dict[str, Any]) -> None:
    """A variance that an optimizer moves may become negative."""
    server = Server(RuleConfig(**values), torch.ones(9), 5)
    for turn in range(8):
        sent = rows(3, seed=turn).abs()
        server.step(sent, [1, 2, 3])
        expected = combined(RuleConfig(), sent, [1, 2, 3])
        assert torch.equal(server.target[5:], expected[5:])
        assert not torch.equal(server.target[:5], expected[:5])


def test_what_is_not_set_fits_the_servers_optimizer() -> None:
    assert (RuleConfig().rate, RuleConfig().momentum) == (1.0, 0.0)
    adam = RuleConfig(server="adam")
    assert (adam.rate, adam.momentum) == (0.01, 0.9)
    assert RuleConfig(server="adam", server_rate=0.5, server_momentum=0.0).momentum == 0.0


# ---------------------------------------------------------------------- accuracy


def trained_on_digits(rule: RuleConfig, hostile: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Accuracy of a linear classifier that five children train, of which the last is hostile."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[:400], order[400:]
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    server = Server(rule, nn.utils.parameters_to_vector(model.parameters()).detach())
    shares = rest.chunk(5)
    for _ in range(15):
        rows = []
        for child, share in enumerate(shares):
            nn.utils.vector_to_parameters(server.target.clone(), model.parameters())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            for part in share.split(32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[part]), y[part]).backward()
                optimizer.step()
            row = nn.utils.parameters_to_vector(model.parameters()).detach()
            rows.append(hostile(row) if child == 4 else row)
        finite = [n for n, row in enumerate(rows) if bool(torch.isfinite(row).all())]
        samples = [len(shares[n]) for n in finite]
        server.step(torch.stack([rows[n] for n in finite]), samples, 5 - len(finite))
    nn.utils.vector_to_parameters(server.target, model.parameters())
    return float((model(x[held]).argmax(dim=1) == y[held]).float().mean())


HOSTILE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sign flip": lambda row: -row,
    "times 100": lambda row: 100 * row,
    "NaN": lambda row: row * float("nan"),
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_one_hostile_child_of_five_costs_less_than_two_points(hostile: str) -> None:
    clean = trained_on_digits(RuleConfig(), lambda row: row)
    assert clean > 0.9
    for rule in (
        RuleConfig(rule="median"),
        RuleConfig(rule="trimmed", tolerates=1),
        RuleConfig(rule="krum", tolerates=1),
    ):
        assert trained_on_digits(rule, HOSTILE[hostile]) >= clean - 0.02, rule.rule
    if hostile != "NaN":
        assert trained_on_digits(RuleConfig(), HOSTILE[hostile]) < clean - 0.02, "the control"
