"""One training step on GPUs: gradients by way of the host, in device memory, and by torch DDP.

Ranks share the GPUs of this machine in turn, which DDP on NCCL refuses where there is one; DDP runs
on gloo. Arms: hpctrain by itself, with sums on the host, with messages out of device memory where
the MPI library takes them, DDP, a blocking all-reduce of all gradients after backward (a control
that must lose), and no exchange at all. Prints a table and, as its last line, a JSON object.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F
from peers import DDP, ddp
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
from stdlib_lm import CONTEXT, GPT

RANKS = 2
DDP_PORT = 29_542
WIDTH, LAYERS, HEADS = 512, 8, 8
WINDOWS = 64
REPEATS, QUICK_REPEATS = 15, 5
OURS = {
    "hpctrain": {},
    "by the host": {"way": "shared"},
    "in device memory": {"way": "device_direct"},
}
CONTROL = "one after another"
EXACT = 1e-4
"""Relative difference of gradients that have been averaged right."""


def fresh(where: torch.device) -> nn.Module:
    """A GPT of 100 MB, the same in every arm."""
    torch.manual_seed(0)
    return GPT(width=WIDTH, layers=LAYERS, heads=HEADS).to(where)


def time_arms(repeats: int) -> dict[str, Any]:
    """Times of all arms, on the ranks of one launch."""
    import hpctrain
    from hpctrain.comm.device_probe import messages_take_device_memory
    from hpctrain.comm.engine import engine_of

    world = hpctrain.join()
    where = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(where)
    address = f"tcp://127.0.0.1:{DDP_PORT}"
    torch.distributed.init_process_group(
        "gloo", init_method=address, rank=world.rank, world_size=world.size
    )
    drawn = torch.Generator().manual_seed(world.rank)
    windows = torch.randint(0, 256, (WINDOWS, CONTEXT + 1), generator=drawn).to(where)

    def loss(model: nn.Module) -> torch.Tensor:
        logits = model(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    stays = messages_take_device_memory(engine_of(world))
    models: dict[str, tuple[nn.Module, Callable[[], object] | None]] = {}
    for name, options in OURS.items():
        if stays or name != "in device memory":
            model = hpctrain.DataParallel(fresh(where), hpctrain.ExchangeConfig(**options))
            models[name] = model, None
    models |= {name: (ddp(fresh(where), name), None) for name in DDP}
    alone = fresh(where)
    models[CONTROL] = alone, lambda: average(alone, world.comm)
    for name, (model, after) in models.items():
        model.zero_grad()
        (loss(model) * (1 + world.rank)).backward()
        if after:
            after()
        check(name, model, world.comm, loss)
    models["no exchange"] = fresh(where), None

    arms = {}
    for name, (model, after) in models.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def step(
            model: nn.Module = model,
            optimizer: torch.optim.Optimizer = optimizer,
            after: Callable[[], object] | None = after,
        ) -> None:
            optimizer.zero_grad()
            loss(model).backward()
            if after:
                after()
            optimizer.step()
            torch.cuda.synchronize()

        arms[name] = step
        while isinstance(model, hpctrain.DataParallel) and model.exchange.is_trying:
            step()
    times = harness.take_turns(
        arms, repeats, world.comm.Barrier, lambda value: max(world.comm.allgather(value))
    )
    ways = {name: models[name][0].exchange.reducer.summary() for name in OURS if name in models}
    nbytes = sum(p.numel() * 4 for p in alone.parameters())
    return {
        "rank": world.rank,
        "times": times,
        "ways": ways,
        "mpi": world.library,
        "gpu": torch.cuda.get_device_name(where),
        "gpus": torch.cuda.device_count(),
        "model_bytes": nbytes,
        "copies_bytes_per_s": copies_per_s(where, nbytes),
    }


def check(
    name: str, model: nn.Module, comm: Any, loss: Callable[[nn.Module], torch.Tensor]
) -> None:
    """Every arm must average: the fastest way to be wrong is to send nothing."""
    from mpi4py import MPI

    truth = fresh(next(model.parameters()).device)
    (loss(truth) * (1 + comm.Get_rank())).backward()
    wanted = gradients(truth).cpu()
    comm.Allreduce(MPI.IN_PLACE, wanted.numpy())
    wanted.div_(comm.Get_size())
    error = float((gradients(model).cpu() - wanted).norm() / wanted.norm())
    if error > EXACT:
        raise AssertionError(f"gradients of {name} are wrong by {error:.1e}")


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def average(model: nn.Module, comm: Any) -> None:
    """What a home-made script does: all gradients to the host, one all-reduce, and back."""
    from mpi4py import MPI

    flat = gradients(model).cpu()
    comm.Allreduce(MPI.IN_PLACE, flat.numpy())
    flat.div_(comm.Get_size())
    place = 0
    for parameter in model.parameters():
        assert parameter.grad is not None
        part = flat[place : place + parameter.numel()].view_as(parameter)
        parameter.grad.copy_(part)
        place += parameter.numel()


def copies_per_s(where: torch.device, nbytes: int) -> dict[str, float]:
    """What the bus carries to and from pinned memory: the floor of the way by the host."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device=where)
    found = {}
    for name, into, source in (("out", host, there), ("in", there, host)):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        into.copy_(source, non_blocking=True)
        begin.record()
        into.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        found[name] = nbytes / begin.elapsed_time(end) * 1e3
    return found


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    if options.worker:
        harness.tell(time_arms(int(options.worker[0])))
        return
    if not torch.cuda.is_available():
        sys.exit("gpu: torch sees no GPU")
    found = harness.launch(RANKS, str(QUICK_REPEATS if options.quick else REPEATS))
    times = found.pop("times")
    rows = [
        {
            "arm": name,
            **{f"{key} ms": value * 1e3 for key, value in harness.spread(taken).items()},
            "over better DDP": statistics.median(harness.ratios(times, name, DDP)),
        }
        for name, taken in times.items()
    ]
    figures = {
        **found,
        "over_ddp": {row["arm"]: round(row["over better DDP"], 4) for row in rows},
        "median_ms": {row["arm"]: round(row["median ms"], 3) for row in rows},
    }
    harness.finish(harness.table(rows), figures, options.save)


if __name__ == "__main__":
    main()
