"""Parts of a state that are put back."""

from __future__ import annotations

import torch
from torch import nn

from hpctrain.grad.replicas import load_gathered
from hpctrain.train.resume import BuffersBefore


def test_buffers_are_put_back_as_they_were_before_the_step_that_does_not_count() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = BuffersBefore(model)
    model(torch.randn(4, 2))
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before.take(step=3)
    model(torch.randn(4, 2))
    model[1].running_mean = torch.ones(3)  # another tensor, of another shape
    before.put_back(step=4)  # copies of an older step are of no use
    assert model[1].running_mean.shape == (3,)
    before.put_back(step=3)
    assert all(torch.equal(buffer, kept[name]) for name, buffer in model.named_buffers())


def test_an_optimizer_keeps_its_options() -> None:
    parameter = nn.Parameter(torch.ones(2))
    old, new = (torch.optim.Adam([parameter], lr=lr) for lr in (0.1, 0.2))
    parameter.grad = torch.ones(2)
    old.step()
    load_gathered(new, old.state_dict())
    assert new.param_groups[0]["lr"] == 0.2
    assert int(new.state[parameter]["step"]) == 1
