"""A job whose ranks die on purpose: where, which and in which step, by DIE="WHERE RANK STEP,...".

Once: what is started again after it, in the same folder, lives.
"""

from __future__ import annotations

PLACES = ("compute", "exchange", "evaluation", "save")
MODULE = """
import atexit, hashlib, os, signal, time
import torch
from hpctrain.launched import launched_rank

RANK = launched_rank(os.environ)
DEATHS = [death.split() for death in os.environ.get("DIE", "").split(",") if death]
count = {True: 0, False: 0}

def die(place, number):
    for where, rank, step in DEATHS:
        if (where, int(rank), int(step)) == (place, RANK, number):
            try:
                open(f"died-{where}-{rank}-{step}", "x").write(str(time.time()))
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

class Net(torch.nn.Sequential):
    def state_dict(self, *args, **kwargs):
        if not kwargs.get("prefix"):
            die("save", count[True])
        return super().state_dict(*args, **kwargs)

def model():
    global net
    net = Net(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
    # The first layer's gradient comes last, when the others are on the wire.
    net[0].weight.register_hook(lambda gradient: die("exchange", count[True]))
    atexit.register(end)
    return net

def end():
    state = torch.cat([p.detach().flatten() for p in net.parameters()])
    open(f"end-{RANK}", "w").write(hashlib.sha256(state.numpy().tobytes()).hexdigest())

def train_data():
    die("setup", 0)
    return list(torch.randn(60, 3, generator=torch.Generator().manual_seed(0)))

validation_data = train_data

def loss(model, batch):
    count[model.training] += 1
    if model.training:
        die("compute", count[True])
    else:
        die("evaluation", count[True])
    return (model(batch) - batch.prod(dim=1, keepdim=True)).square().mean()
"""
KEYS = """
train = { steps = 12, batch = 12, eval_every = 4 }
optimizer = { name = "adamw", lr = 0.01 }
exchange = { block_bytes = 1, deterministic = true, deadline_s = 30 }
checkpoint = { every = 3 }
run = { report = false, log_every = 5 }
"""
