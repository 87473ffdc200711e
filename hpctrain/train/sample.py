"""What the trained model makes, shown at the end of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from hpctrain.data.generators import OwnGenerators
from hpctrain.errors import told
from hpctrain.files import replace_text
from hpctrain.streams import say
from hpctrain.train.console import Console
from hpctrain.train.run_folder import RunFolder

_log = logging.getLogger("hpctrain")


def show_sample(
    sample: Callable[[nn.Module], str],
    model: nn.Module,
    run: RunFolder,
    console: Console,
    seed: int,
) -> None:
    """Print what `sample` makes of the model, and keep it as sample.txt.

    Its failure is told and does no harm: the run is finished.
    """
    was_training = model.training
    try:
        with torch.no_grad(), OwnGenerators(seed):
            text = str(sample(model.eval()))
        replace_text(run.path / "sample.txt", text + "\n")
        say(text + "\n")
    except (Exception, SystemExit) as error:
        _log.exception("sample() failed", extra={"shown": True})
        console.say(
            f"sample() failed, the run is finished all the same: {told(error)} "
            f"(traceback in {run.log(0)})"
        )
    finally:
        model.train(was_training)
