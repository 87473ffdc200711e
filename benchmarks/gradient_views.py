"""How a gradient should get into its slab: moved once, or accumulated into a zeroed view.

Measured in one process without any communication, for the decision that grad/overlap.py states:
``plain`` leaves gradients where autograd puts them, ``moved`` copies each into the slab from its
hook and frees autograd's own, ``accumulated`` zeroes the slab and lets autograd add to views.
Whole steps with optimizer; the last line is JSON with each arm's time over ``plain``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import harness
import torch
import torch.nn.functional as F
from step import CONTEXT, GPT
from torch import nn

from hpctrain.comm.memory import Slab
from hpctrain.grad.blocks import Block, move, slab_size


def perceptron(width: int, layers: int) -> tuple[nn.Module, torch.Tensor]:
    parts = [
        nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        for _ in range(layers)
    ]
    return nn.Sequential(*parts), torch.randn(32, width)


def loss_of_gpt(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def loss_of_perceptron(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).pow(2).mean()


CASES: dict[str, Callable[[], tuple[nn.Module, torch.Tensor, Callable[..., torch.Tensor]]]] = {
    "GPT, 25 MB": lambda: (
        GPT(width=256, layers=8, heads=4),
        torch.randint(0, 256, (1, CONTEXT + 1)),
        loss_of_gpt,
    ),
    "perceptron, 17 MB": lambda: (*perceptron(256, 8), loss_of_perceptron),
    "perceptron, 100 MB": lambda: (*perceptron(1024, 3), loss_of_perceptron),
}


def make_arm(case: str, arm: str) -> Callable[[], None]:
    torch.manual_seed(0)
    model, batch, loss = CASES[case]()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    names = [name for name, _ in model.named_parameters()]
    slab = Slab.allocate(*slab_size(parameters))
    block = Block(0, range(len(parameters)), names, parameters, slab)
    if arm == "moved":
        for parameter, view in zip(parameters, block.views, strict=True):
            parameter.register_post_accumulate_grad_hook(lambda p, view=view: move(p, view, "it"))

    def step() -> None:
        optimizer.zero_grad()
        if arm == "accumulated":
            block.slab.tensor.zero_()
            for parameter, view in zip(parameters, block.views, strict=True):
                parameter.grad = view
        loss(model, batch).backward()
        optimizer.step()

    return step


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    repeats = 9 if options.quick else 31
    rows, figures = [], {}
    for case in CASES:
        arms = {arm: make_arm(case, arm) for arm in ("plain", "moved", "accumulated")}
        times = harness.take_turns(arms, repeats, time.perf_counter, float, warm_up=4)
        over = {arm: statistics.median(harness.ratios(times, arm, ["plain"])) for arm in arms}
        figures[case] = {arm: round(ratio, 4) for arm, ratio in over.items()}
        for arm, taken in times.items():
            spread = {f"{key} ms": value * 1e3 for key, value in harness.spread(taken).items()}
            rows.append({"model": case, "arm": arm, **spread, "over plain": over[arm]})
    harness.finish(harness.table(rows), figures, options.save)


if __name__ == "__main__":
    main()
