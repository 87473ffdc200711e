"""One job file for laptop and cluster: TOML in, a frozen `Job` out, all mistakes at once.

The job file names a module of plain PyTorch that offers

- ``model(**[model])``: the module to train,
- ``train_data(**[data])``: a map-style data set or an iterable of samples,
- ``loss(model, batch)``: the mean loss over the samples of a batch,

and, if it likes, ``validation_data(**[data])``, ``metrics(model, batch)`` (means by name),
``collate(samples)`` and ``sample(model)`` (text to show at the end). ``[model]`` and ``[data]``
are tables of the job file.

With ``exchange.mode = "shared"`` the module offers ``encoder(**[model])``, and each module that
``shared.tasks`` names offers ``head(encoder)``, ``train_data``, ``loss`` and the rest, where
`model` is a `Joined` of encoder and head.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import hashlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from hpctrain import job_file
from hpctrain.comm.collect import all_gather
from hpctrain.comm.engine import engine_of
from hpctrain.config import key_text, nearest, option, read
from hpctrain.data.batches import data_error
from hpctrain.data.generators import seed_generators
from hpctrain.errors import ExchangeError, JobError, MismatchError, shortened, shown, told
from hpctrain.grad.coded.config import CodedConfig
from hpctrain.grad.config import USED_BY_CHILDREN_OF_ONE, ExchangeConfig
from hpctrain.grad.periods.method import PeriodsConfig
from hpctrain.grad.shared.config import SharedConfig
from hpctrain.stop import StopRequest
from hpctrain.submit.cache import ENTRY
from hpctrain.submit.config import SubmitConfig
from hpctrain.train.checkpoint.config import CheckpointConfig
from hpctrain.train.checks import model_mistake
from hpctrain.train.coded_loop import CodedTrainer
from hpctrain.train.inject import InjectConfig
from hpctrain.train.loop import Trainer
from hpctrain.train.optimizer import ScheduleConfig, check_optimizer
from hpctrain.train.periods_loop import PeriodsTrainer
from hpctrain.train.run_folder import KEPT_APART, RunConfig
from hpctrain.train.settings import Parts, Settings, TrainConfig
from hpctrain.train.shared_loop import Joined, SharedTrainer, Tasks
from hpctrain.world import World

_REQUIRED = ("model", "train_data", "loss")
_OF_SHARED = ("encoder",)
_OF_TASK = ("head", "train_data", "loss")
_OPTIONAL = ("validation_data", "metrics", "collate", "sample")
_GIVEN = {
    "head": ("encoder",),
    "loss": ("model", "batch"),
    "metrics": ("model", "batch"),
    "collate": ("samples",),
    "sample": ("model",),
}
"""What functions of the module are called with, in order."""
TRAINERS = {"allreduce": Trainer, "coded": CodedTrainer, "periods": PeriodsTrainer}
"""By exchange.mode."""
MOST_SAMPLES = 1 << 24
"""Of a step. A larger batch is a slip: reading it would take hours and look like a hang."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a job file says."""

    module: str
    """The job module, a Python file, relative to the job file."""
    train: TrainConfig
    extends: str | None = None
    """Another job file, relative to this one, whose values hold where this one says nothing; tables
    are put together key by key."""
    seed: int = option(0, minimum=0, maximum=(1 << 63) - 1)
    """Of initial parameters, order of samples and all random generators."""
    model: dict[str, Any] = option({})
    """Arguments of the module's `model`."""
    data: dict[str, Any] = option({})
    """Arguments of the module's `train_data` and `validation_data`."""
    optimizer: dict[str, Any] = option({})
    """`name` of an optimizer of torch.optim, lower-case, and its arguments."""
    schedule: ScheduleConfig = ScheduleConfig()
    exchange: ExchangeConfig = ExchangeConfig()
    coded: CodedConfig = CodedConfig()
    periods: PeriodsConfig = PeriodsConfig()
    shared: SharedConfig = SharedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()
    inject: InjectConfig = InjectConfig()
    submit: SubmitConfig = SubmitConfig()

    @property
    def settings(self) -> Settings:
        """What the trainer needs."""
        names = [field.name for field in dataclasses.fields(Settings)]
        return Settings(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Task:
    """A task of a shared encoder."""

    module: ModuleType
    source: Path


@dataclass(frozen=True)
class LoadedJob:
    """A job without mistakes, and the module that it names."""

    name: str
    path: Path
    job: Job
    module: ModuleType
    source: Path
    """Of the module."""
    file: job_file.JobFile
    tasks: tuple[Task, ...] = ()
    """With exchange.mode = "shared"."""

    @property
    def fingerprint(self) -> str:
        """Equal for jobs that may continue each other's runs: same values, same module."""
        values = dataclasses.asdict(self.job)
        for name in KEPT_APART:
            del values[name]
        sources = [self.source, *(task.source for task in self.tasks)]
        source = b"".join(path.read_bytes() for path in sources)
        text = json.dumps(values, sort_keys=True, default=str).encode()
        return hashlib.sha256(text + source).hexdigest()[:16]

    def parts(self) -> Parts:
        """Make the model and the data. Call on every rank with the same seed set.

        Raises:
            JobError: a function of the module fails; names the user's line and what it was given.
        """
        seed_generators(self.job.seed)
        return self._parts(self.module, self._model("model", self.module, self.job.model))

    def encoder(self, **kind: Any) -> nn.Module:
        """Make the shared encoder, the same on every rank."""
        seed_generators(self.job.seed)
        return self._model("encoder", self.module, kind)

    def task_parts(self, number: int, encoder: nn.Module) -> Parts:
        """Make head and data of a task."""
        module = self.tasks[number].module
        seed_generators(self.job.seed + 1 + number)
        head = self._model("head", module, {"encoder": encoder}, table="")
        return self._parts(module, Joined(encoder, head))

    def _name_of(self, module: ModuleType) -> str:
        """As the job file calls it."""
        return self.job.module if module is self.module else Path(str(module.__file__)).name

    def _model(
        self, name: str, module: ModuleType, arguments: Mapping[str, Any], table: str = "model"
    ) -> nn.Module:
        model = self._call(module, name, table, arguments)
        if mistake := model_mistake(model):
            raise JobError(
                f"{self._name_of(module)}: {name}() returned {mistake}",
                where=_place_of(getattr(module, name)),
                fix="return an instance of torch.nn.Module that has parameters to train",
            )
        assert isinstance(model, nn.Module)
        return model

    def _parts(self, module: ModuleType, model: nn.Module) -> Parts:
        job = self.job
        data = {
            name: self._call(module, name, "data", _accepted(getattr(module, name), job.data))
            for name in ("train_data", "validation_data")
            if getattr(module, name, None)
        }
        for name, made in data.items():
            if made is None and name in _OPTIONAL:
                continue
            if error := data_error(made, name, _place_of(getattr(module, name))):
                raise error
        return Parts(
            model=model,
            train_data=data["train_data"],
            loss=module.loss,
            validation_data=data.get("validation_data"),
            metrics=getattr(module, "metrics", None),
            collate=getattr(module, "collate", None),
            sample=getattr(module, "sample", None),
        )

    def _call(self, module: ModuleType, name: str, table: str, arguments: Mapping[str, Any]) -> Any:
        try:
            return getattr(module, name)(**arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit among them
            given = ", ".join(f"{key} = {shown(value)}" for key, value in arguments.items())
            origins = {o for key in arguments if (o := self.file.origin(f"{table}.{key}"))}
            source = f" ({', '.join(sorted(origins))})" if origins else ""
            raise JobError(
                f"{self._name_of(module)}: {name}() failed: {told(error)}",
                where=_own_place(error, self.source.parent),
                fix=f"check what [{table}] of {self.path.name} gives it: {given}{source}"
                if given and table
                else None,
            ) from error

    def trainer(
        self,
        world: World,
        chosen: Path | None = None,
        fresh: bool = False,
        stop: StopRequest | None = None,
        launch: str = "",
    ) -> Trainer | SharedTrainer:
        """A trainer for this job. Collective.

        Args:
            world: the ranks.
            chosen: run folder to use, instead of a new or an unfinished one.
            fresh: do not continue an earlier run.
            stop: what listens already for the word that this rank is to end.
            launch: what a supervisor calls this launch, which finds its run folder by it.

        Raises:
            JobError: on all ranks, when the module fails on some rank, or its model cannot be
                trained or is not the same on all; names rank and place.
        """
        engine = engine_of(world)  # before user code runs: ranks where that hangs are told
        engine.deadline_s = self.job.exchange.deadline_s
        if self.tasks:
            return self._shared_trainer(world, chosen, fresh, stop, launch)
        parts: Parts | None = None
        failure: str | None = None
        try:
            parts = self.parts()
        except JobError as error:
            failure = str(error)
        except Exception as error:
            failure = f"{self.job.module} failed: {_with_place(error, self.source.parent)}"
        failures = all_gather(engine.control, failure, label="making of the job's model and data")
        for rank, text in enumerate(failures):
            if text:
                raise JobError(f"{world.name_of(rank)}: {text}", everywhere=True)
        assert parts is not None
        try:
            return TRAINERS[self.job.exchange.mode](
                world,
                parts,
                self.job.settings,
                parent=Path(self.job.run.folder) / self.name,
                facts={**self._facts(parts.model), "launch": launch},
                chosen=chosen,
                fresh=fresh,
                stop=stop,
            )
        except (MismatchError, ExchangeError) as error:  # of the model: the job is to be mended
            raise JobError(
                f"{self.job.module}: {error.what}",
                value=error.value,
                allowed=error.allowed,
                where=error.where,
                fix=error.fix,
                everywhere=error.everywhere,
            ) from error

    def _shared_trainer(
        self,
        world: World,
        chosen: Path | None,
        fresh: bool,
        stop: StopRequest | None,
        launch: str,
    ) -> SharedTrainer:
        tasks = Tasks(
            names=tuple(task.source.stem for task in self.tasks),
            encoder=self.encoder,
            kind=self.job.model,
            parts=self.task_parts,
        )
        return SharedTrainer(
            world,
            tasks,
            self.job.settings,
            parent=Path(self.job.run.folder) / self.name,
            facts={**self._facts(self.encoder(**self.job.model)), "launch": launch},
            chosen=chosen,
            fresh=fresh,
            stop=stop,
        )

    def _facts(self, model: nn.Module) -> dict[str, Any]:
        """What run.json says about the job, as plain JSON values; TOML's dates become text."""
        values = json.dumps(dataclasses.asdict(self.job), default=str)
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "job": json.loads(values),
            "parameters": sum(p.numel() for p in model.parameters()),
            "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        }


def load(path: Path, overrides: Sequence[str] = ()) -> LoadedJob:
    """Read and check a job file and the module that it names. Starts no MPI.

    Args:
        path: the TOML file.
        overrides: `table.key=value`, where the value is TOML or else a string.

    Raises:
        JobError: listing every mistake with its place.
    """
    file = job_file.read(path, overrides)
    table, mistakes = file.table, list(file.mistakes)
    job = read(Job, table, "", mistakes)
    if job and job.submit.deps and ENTRY not in os.environ:  # which nodes of a cluster have
        packages = str(Path(job.submit.deps).resolve())
        sys.path[:0] = [packages] if packages not in sys.path else []
    _check_sizes(table.get("train"), mistakes)
    optimizer = table.get("optimizer", {})
    if isinstance(optimizer, Mapping):
        check_optimizer(optimizer, "optimizer", mistakes)
    exchange = table.get("exchange")
    is_shared = isinstance(exchange, Mapping) and exchange.get("mode") == "shared"
    source = _find_module(file, "module", table.get("module"), mistakes)
    required = _OF_SHARED if is_shared else _REQUIRED
    module = _load_module(source, table, required, mistakes) if source else None
    tasks = _load_tasks(file, job.shared.tasks, table, mistakes) if job and is_shared else ()
    if job:
        _check_together(job, mistakes)
    if mistakes or job is None or module is None or source is None:
        raise file.mistake(mistakes)
    return LoadedJob(path.stem, path, job, module, source, file, tasks)


def _check_sizes(train: object, mistakes: list[str]) -> None:
    """A batch that no rank could read."""
    batch = train.get("batch") if isinstance(train, Mapping) else None
    if isinstance(batch, int) and batch > MOST_SAMPLES:
        mistakes.append(
            f"train.batch: got {shown(batch)}; allowed: at most {MOST_SAMPLES} samples a step"
        )


def _load_tasks(
    file: job_file.JobFile,
    names: Sequence[str],
    table: Mapping[str, Any],
    mistakes: list[str],
) -> tuple[Task, ...]:
    """The modules of the tasks; lines in `mistakes` for all that is wrong with them."""
    if not names:
        mistakes.append("shared.tasks: missing; exchange.mode = 'shared' needs one or more")
    tasks = []
    for name in names:
        source = _find_module(file, "shared.tasks", name, mistakes)
        module = _load_module(source, table, _OF_TASK, mistakes) if source else None
        if source and module:
            tasks.append(Task(module, source))
    return tuple(tasks)


def _find_module(
    file: job_file.JobFile, key: str, name: object, mistakes: list[str]
) -> Path | None:
    """The file of a module that the job names; a line in `mistakes` when there is none."""
    if not isinstance(name, str):
        return None  # its absence or type is a mistake found elsewhere
    folder = file.folder_of(key)
    path = folder / (name if name.endswith(".py") else f"{name}.py")
    try:
        if path.is_file():
            return path
        found = [p.name for p in folder.glob("*.py")]
    except (OSError, ValueError):  # a name that is too long, or no name at all
        found = []
    shown_path = str(path) if str(path).isprintable() else repr(str(path))
    mistakes.append(f"{key}: there is no {shortened(shown_path)}{nearest(path.name, found)}")
    return None


def _load_module(
    path: Path, table: Mapping[str, Any], required: Sequence[str], mistakes: list[str]
) -> ModuleType | None:
    """Import and check the job module; a line in `mistakes` for all that is wrong with it."""
    spec = importlib.util.spec_from_file_location(f"hpctrain_job_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # for modules beside it, imported now or later
    try:
        spec.loader.exec_module(module)
        _check_module(module, path, table, required, mistakes)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit among them
        mistakes.append(f"module: importing {path} failed: {_with_place(error, path.parent)}")
        return None
    return module


def _check_module(
    module: ModuleType,
    path: Path,
    table: Mapping[str, Any],
    required: Sequence[str],
    mistakes: list[str],
) -> None:
    """Functions that are missing, and arguments that they do not take."""
    public = [
        n
        for n, v in vars(module).items()
        if isinstance(n, str)
        and n[:1] != "_"
        and callable(v)
        and getattr(v, "__module__", None) == module.__name__
    ]
    for name in required:
        if not callable(getattr(module, name, None)):
            close = difflib.get_close_matches(name, set(public) - {*required, *_OPTIONAL}, n=1)
            hint = f" (is {close[0]}() meant?)" if close else ""
            mistakes.append(
                f"module: {path} defines no {name}(){hint}; "
                f"needed: {', '.join(required)}; found: {_names(public) or 'none'}"
            )
    for name in _OPTIONAL:
        if hasattr(module, name) and not callable(getattr(module, name)):
            mistakes.append(f"module: {name} in {path} is not a function")
    for name, given in _GIVEN.items():
        target = getattr(module, name, None)
        if callable(target) and not _takes(target, len(given)):
            must = f"must take {len(given)} argument{'s'[: len(given) - 1]}"
            mistakes.append(f"module: {name}() {must}, {' and '.join(given)} ({_place_of(target)})")
    of_model = ("encoder",) if required is _OF_SHARED else ("model",)
    for key, functions in (("model", of_model), ("data", ("train_data", "validation_data"))):
        arguments = table.get(key, {})
        targets = [getattr(module, name, None) for name in functions]
        if isinstance(arguments, Mapping):
            _check_arguments(key, [t for t in targets if callable(t)], arguments, mistakes)


def _names(found: Sequence[str]) -> str:
    return ", ".join(found[:20]) + (f" and {len(found) - 20} more" if found[20:] else "")


def _takes(target: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many arguments, as far as it tells."""
    try:
        inspect.signature(target).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        pass
    return True


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
            mistakes.append(f"{where}.{key_text(name)}: unknown key{nearest(name, valid)}")
    for target, parameters in zip(targets, taken, strict=True):
        for name, parameter in (parameters or {}).items():
            if parameter.default is parameter.empty and name not in arguments:
                needed_by = getattr(target, "__name__", "the module")
                mistakes.append(f"{where}.{name}: missing; {needed_by}() needs it")


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """Named parameters of a function; None when it takes any, or does not tell."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return {name: p for name, p in parameters.items() if p.kind is not p.VAR_POSITIONAL}


def _check_together(job: Job, mistakes: list[str]) -> None:
    """Values that are possible by themselves but not here."""
    if job.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        mistakes.append("run.tensorboard: needs the package: pip install 'hpctrain[tensorboard]'")
    if job.exchange.next_forward:
        # Both decide about a step from all gradients, of which some come after it was taken.
        if job.train.clip_norm is not None:
            mistakes.append("train.clip_norm: not with exchange.next_forward = true")
        if job.train.nonfinite == "skip":
            mistakes.append("train.nonfinite: 'skip' is not possible with exchange.next_forward")
    if job.exchange.mode != "coded" and job.coded != CodedConfig():
        mistakes.append("coded: does nothing unless exchange.mode = 'coded'")
    if job.exchange.mode != "periods" and job.periods != PeriodsConfig():
        mistakes.append("periods: does nothing unless exchange.mode = 'periods'")
    if job.exchange.mode != "shared" and job.shared != SharedConfig():
        mistakes.append("shared: does nothing unless exchange.mode = 'shared'")
    if job.exchange.mode == "shared" and job.shared.group == 1:
        mistakes.extend(
            f"exchange.{name}: does nothing with exchange.mode = 'shared' unless shared.group > 1"
            for name in job.exchange.set_besides(USED_BY_CHILDREN_OF_ONE)
        )
    if job.inject.step is not None and job.inject.step > job.train.steps:
        mistakes.append(f"inject.step: got {job.inject.step}; the run has {job.train.steps} steps")


def _accepted(target: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments that the function takes."""
    parameters = _parameters(target)
    if parameters is None:
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


def _with_place(error: BaseException, folder: Path) -> str:
    """`TypeError: ... at jobs/x.py:12 in model`: where the user's own code is, if it is there."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} at {error.filename}:{error.lineno}"
    place = _own_place(error, folder)
    frames = traceback.extract_tb(error.__traceback__)
    if place is None and frames:
        place = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}"
    return told(error) + (f" at {place}" if place else "")


def _own_place(error: BaseException, folder: Path) -> str | None:
    """`jobs/x.py:12 in model`: the innermost line of the user's own code, not of a library's."""
    own, ours = folder.resolve(), Path(__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename).resolve()
        is_library = "site-packages" in path.parts or path.is_relative_to(ours)
        if path.is_relative_to(own) and not is_library:
            return f"{frame.filename}:{frame.lineno} in {frame.name}"
    return None


def _place_of(function: Callable[..., Any]) -> str | None:
    """`jobs/x.py:12 in model`: where a function is defined, as far as it tells."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno} in {code.co_name}" if code else None
