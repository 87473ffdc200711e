"""The state that a rank which fell behind is given."""

from __future__ import annotations

import torch
from torch import nn

from hpctrain.grad.coded.catching_up import packed, unpack


class Model(nn.Module):
    """With a buffer that is saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("saved", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


def test_all_that_a_step_changes_is_given() -> None:
    here, there = Model(), Model()
    mine, its = adam(here), adam(there)
    here.layer(torch.ones(1, 2)).sum().backward()
    mine.step()
    here.saved += 1
    here.scratch += 2
    assert unpack(packed(here, mine, None, 7), there, its, None) == 7
    for name, tensor in [*here.named_parameters(), *here.named_buffers()]:
        assert torch.equal(
            tensor, there.get_parameter(name) if "layer" in name else getattr(there, name)
        )
    for state, other in zip(mine.state.values(), its.state.values(), strict=True):
        assert torch.equal(state["exp_avg"], other["exp_avg"])
