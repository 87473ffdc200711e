"""One job file for laptop and cluster: TOML in, a frozen `Job` out, all mistakes at once.

The job file names a module of plain PyTorch that offers

- ``model(**[model])``: the module to train,
- ``train_data(**[data])``: a map-style data set or an iterable of samples,
- ``loss(model, batch)``: the mean loss over the samples of a batch,

and, if it likes, ``validation_data(**[data])``, ``metrics(model, batch)`` (means by name),
``collate(samples)`` and ``sample(model)`` (text to show at the end). ``[model]`` and ``[data]``
are tables of the job file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from hpctrain.config import nearest, option, read
from hpctrain.errors import JobError
from hpctrain.grad.overlap import ExchangeConfig
from hpctrain.train.checkpoint import CheckpointConfig
from hpctrain.train.loop import Parts, Settings, TrainConfig, Trainer, seed_generators
from hpctrain.train.optimizer import ScheduleConfig, check_optimizer
from hpctrain.train.run_folder import RunConfig
from hpctrain.world import World

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_REQUIRED = ("model", "train_data", "loss")
_OPTIONAL = ("validation_data", "metrics", "collate", "sample")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a job file says."""

    module: str
    """The job module, a Python file, relative to the job file."""
    train: TrainConfig
    seed: int = option(0, minimum=0)
    """Of initial parameters, order of samples and all random generators."""
    model: dict[str, Any] = option({})
    """Arguments of the module's `model`."""
    data: dict[str, Any] = option({})
    """Arguments of the module's `train_data` and `validation_data`."""
    optimizer: dict[str, Any] = option({})
    """`name` of an optimizer of torch.optim, lower-case, and its arguments."""
    schedule: ScheduleConfig = ScheduleConfig()
    exchange: ExchangeConfig = ExchangeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()

    @property
    def settings(self) -> Settings:
        """What the trainer needs."""
        names = [field.name for field in dataclasses.fields(Settings)]
        return Settings(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class LoadedJob:
    """A job without mistakes, and the module that it names."""

    name: str
    path: Path
    job: Job
    module: ModuleType

    @property
    def fingerprint(self) -> str:
        """Equal for jobs that may continue each other's runs: same values, same module."""
        values = dataclasses.asdict(self.job)
        del values["run"], values["checkpoint"]
        source = Path(inspect.getfile(self.module)).read_bytes()
        text = json.dumps(values, sort_keys=True, default=str).encode()
        return hashlib.sha256(text + source).hexdigest()[:16]

    def parts(self) -> Parts:
        """Make the model and the data. Call on every rank with the same seed set."""
        module, job = self.module, self.job
        seed_generators(job.seed)
        model = module.model(**job.model)
        if not isinstance(model, nn.Module):
            raise JobError(
                f"{self.job.module}: model() returned no torch module", value=type(model).__name__
            )
        validation = getattr(module, "validation_data", None)
        return Parts(
            model=model,
            train_data=module.train_data(**_accepted(module.train_data, job.data)),
            loss=module.loss,
            validation_data=validation(**_accepted(validation, job.data)) if validation else None,
            metrics=getattr(module, "metrics", None),
            collate=getattr(module, "collate", None),
            sample=getattr(module, "sample", None),
        )

    def trainer(self, world: World, chosen: Path | None = None, fresh: bool = False) -> Trainer:
        """A trainer for this job. Collective.

        Raises:
            JobError: on all ranks, when the module fails on some rank; names rank and place.
        """
        parts: Parts | None = None
        failure: str | None = None
        try:
            parts = self.parts()
        except JobError as error:
            failure = str(error)
        except Exception as error:
            failure = f"{self.job.module} failed: {_last_place(error)}"
        failures = world.comm.allgather(failure)
        for rank, text in enumerate(failures):
            if text:
                raise JobError(f"{world.name_of(rank)}: {text}", everywhere=True)
        assert parts is not None
        return Trainer(
            world,
            parts,
            self.job.settings,
            parent=Path(self.job.run.folder) / self.name,
            facts={
                "name": self.name,
                "fingerprint": self.fingerprint,
                "job": dataclasses.asdict(self.job),
            },
            chosen=chosen,
            fresh=fresh,
        )


def load(path: Path, overrides: Sequence[str] = ()) -> LoadedJob:
    """Read and check a job file and the module that it names. Starts no MPI.

    Args:
        path: the TOML file.
        overrides: `table.key=value`, where the value is TOML or else a string.

    Raises:
        JobError: listing every mistake with its place.
    """
    mistakes: list[str] = []
    table = _read_table(path)
    for text in overrides:
        _override(table, text, mistakes)
    job = read(Job, table, "", mistakes)
    optimizer = table.get("optimizer", {})
    if isinstance(optimizer, Mapping):
        check_optimizer(optimizer, "optimizer", mistakes)
    module = _load_module(path.parent, table.get("module"), mistakes)
    if module:
        _check_module(module, table, mistakes)
    if job:
        _check_together(job, mistakes)
    if mistakes or job is None or module is None:
        count = f"{len(mistakes)} mistakes" if len(mistakes) > 1 else "a mistake"
        raise JobError(f"{path} has {count}:\n  " + "\n  ".join(mistakes), everywhere=True)
    return LoadedJob(path.stem, path, job, module)


def _read_table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = f"the job file cannot be read: {error.strerror}"
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        what = f"the job file is not TOML: {error}"
    raise JobError(what, where=str(path), everywhere=True)


def _override(table: dict[str, Any], text: str, mistakes: list[str]) -> None:
    """Put one `table.key=value` into the table."""
    place, equals, written = text.partition("=")
    keys = place.strip().split(".")
    if not equals or not all(keys):
        mistakes.append(f"--set {text}: expected table.key=value")
        return
    try:
        value = tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        value = written.strip()
    for key in keys[:-1]:
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            mistakes.append(f"--set {text}: {key} is a value and not a table")
            return
        table = inner
    table[keys[-1]] = value


def _load_module(folder: Path, name: object, mistakes: list[str]) -> ModuleType | None:
    """Import the job module from its file; a line in `mistakes` when that fails."""
    if not isinstance(name, str):
        return None  # its absence or type is a mistake found elsewhere
    path = folder / (name if name.endswith(".py") else f"{name}.py")
    if not path.is_file():
        found = [p.name for p in folder.glob("*.py")]
        mistakes.append(f"module: there is no {path}{nearest(path.name, found)}")
        return None
    spec = importlib.util.spec_from_file_location(f"hpctrain_job_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(folder.resolve()))  # for modules beside it, imported now or later
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        mistakes.append(f"module: importing {path} failed: {_last_place(error)}")
        return None
    return module


def _check_module(module: ModuleType, table: Mapping[str, Any], mistakes: list[str]) -> None:
    """Functions that are missing, and arguments that they do not take."""
    for name in _REQUIRED:
        if not callable(getattr(module, name, None)):
            public = [n for n, v in vars(module).items() if callable(v) and n[0] != "_"]
            mistakes.append(f"module: {module.__file__} defines no {name}(){nearest(name, public)}")
    for name in _OPTIONAL:
        if hasattr(module, name) and not callable(getattr(module, name)):
            mistakes.append(f"module: {name} in {module.__file__} is not a function")
    for key, functions in (("model", ("model",)), ("data", ("train_data", "validation_data"))):
        arguments = table.get(key, {})
        targets = [getattr(module, name, None) for name in functions]
        if isinstance(arguments, Mapping):
            _check_arguments(key, [t for t in targets if callable(t)], arguments, mistakes)


def _check_arguments(
    where: str,
    targets: Sequence[Callable[..., Any]],
    arguments: Mapping[str, Any],
    mistakes: list[str],
) -> None:
    """Arguments that none of the functions takes, and those that one of them needs."""
    taken = [_parameters(target) for target in targets]
    if not taken or any(parameters is None for parameters in taken):
        return
    valid = {name for parameters in taken for name in parameters or ()}
    for name in arguments:
        if name not in valid:
            mistakes.append(f"{where}.{name}: unknown key{nearest(name, valid)}")
    for target, parameters in zip(targets, taken, strict=True):
        for name, parameter in (parameters or {}).items():
            if parameter.default is parameter.empty and name not in arguments:
                needed_by = getattr(target, "__name__", "the module")
                mistakes.append(f"{where}.{name}: missing; {needed_by}() needs it")


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """Named parameters of a function; None when it takes any, or does not tell."""
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return {name: p for name, p in parameters.items() if p.kind is not p.VAR_POSITIONAL}


def _check_together(job: Job, mistakes: list[str]) -> None:
    """Values that are possible by themselves but not here."""
    if job.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        mistakes.append("run.tensorboard: needs the package: pip install 'hpctrain[tensorboard]'")


def _accepted(target: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments that the function takes."""
    parameters = _parameters(target)
    if parameters is None:
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


def _last_place(error: BaseException) -> str:
    """`TypeError: ... at jobs/x.py:12 in model`."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} at {error.filename}:{error.lineno}"
    place = f" at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
