from __future__ import annotations

import datetime
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hpctrain import job
from hpctrain.data.batches import Batches
from hpctrain.errors import ExitCode, JobError
from hpctrain.job import LoadedJob
from hpctrain.train.settings import Parts
from hpctrain.world import World

SHIPPED = sorted((Path(__file__).parents[1] / "jobs").glob("*.toml"))

MODULE = """
from torch import nn

def model(width, depth=1):
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))

def train_data(count=8):
    return range(count)

def loss(model, batch):
    return model(batch).mean()
"""
JOB = """
module = "work.py"
train = { steps = 10, batch = 4 }
model = { width = 4 }
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a job file and its module, returns the path of the job file."""

    def write(text: str = JOB, module: str = MODULE) -> Path:
        (tmp_path / "work.py").write_text(module)
        (tmp_path / "mine.toml").write_text(text)
        return tmp_path / "mine.toml"

    return write


def mistakes(path: Path, *overrides: str) -> str:
    """What is wrong with a job file; one line a mistake after the first."""
    with pytest.raises(JobError) as caught:
        job.load(path, overrides)
    assert caught.value.everywhere
    assert caught.value.exit_code == ExitCode.BAD_JOB
    return str(caught.value)


# ---------------------------------------------------------------------- good jobs


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_job_gives_a_loss_with_gradients(path: Path) -> None:
    if path.stem == "digits":
        pytest.importorskip("sklearn")
    for parts in all_parts(job.load(path)):
        batches = Batches(parts.train_data, batch=4, collate=parts.collate)
        loss = parts.loss(parts.model, batches.read(0, 4))
        loss.backward()
        assert torch.isfinite(loss)
        assert all(p.grad is not None for p in parts.model.parameters())
        assert parts.validation_data is not None and len(parts.validation_data) > 0


def all_parts(loaded: LoadedJob) -> list[Parts]:
    """Of each task, if the job has several."""
    if not loaded.tasks:
        return [loaded.parts()]
    encoder = loaded.encoder(**loaded.job.model)
    return [loaded.task_parts(task, encoder) for task in range(len(loaded.tasks))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_job_file_fits_in_fifteen_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 15


def test_three_lines_are_a_job(write: Write) -> None:
    loaded = job.load(write())
    assert (loaded.name, loaded.job.module, loaded.job.train.steps) == ("mine", "work.py", 10)
    assert loaded.job.settings.train is loaded.job.train


def test_packages_of_a_job_are_found(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their folder, or where a node keeps its copy."""
    path = write(JOB + '[submit]\ndeps = "deps"\n', "import hpctrain_test_package\n" + MODULE)
    (path.parent / "deps").mkdir()
    (path.parent / "deps" / "hpctrain_test_package.py").touch()
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HPCTRAIN_PACKAGES", "/a/copy/of/a/node")
    with pytest.raises(JobError, match="No module named 'hpctrain_test_package'"):
        job.load(path)
    monkeypatch.delenv("HPCTRAIN_PACKAGES")
    job.load(path)


def test_module_may_be_named_without_suffix_and_import_its_neighbours(write: Write) -> None:
    path = write(module="import neighbour_of_work\n" + MODULE)
    (path.parent / "neighbour_of_work.py").touch()
    assert job.load(path, ["module=work"]).module.neighbour_of_work


# ---------------------------------------------------------------------- mistakes in values

VALUES = [
    ("trian.steps=5", "trian: unknown key; did you mean 'train'?"),
    ("train.stepz=5", "train.stepz: unknown key; did you mean 'steps'?"),
    ("run.qqq=5", "run.qqq: unknown key; valid here: folder, line_s,"),
    ("train=5", "train: expected a table, got 5"),
    ("model=5", "model: expected a table, got 5"),
    ("optimizer=5", "optimizer: expected a table, got 5"),
    ("module=5", "module: expected a string, got 5"),
    ("seed=2.0", "seed: expected an integer, got 2.0"),
    ("train.steps=many", "train.steps: expected an integer, got 'many'"),
    ("train.steps=true", "train.steps: expected an integer, got True"),
    ("train.shuffle=1", "train.shuffle: expected true or false, got 1"),
    ("train.clip_norm=true", "train.clip_norm: expected a number, got True"),
    ("train.clip_norm=nan", "train.clip_norm: expected a number, got nan"),
    ("train.clip_norm=-inf", "train.clip_norm: expected a number, got -inf"),
    ("train.steps=0", "train.steps: got 0; allowed: at least 1"),
    ("train.clip_norm=0", "train.clip_norm: got 0.0; allowed: more than 0"),
    ("schedule.final=1.5", "schedule.final: got 1.5; allowed: at least 0 and at most 1"),
    ("schedule.name=cosin", "(did you mean 'cosine'?)"),
    ("train.nonfinite=explode", "train.nonfinite: got 'explode'; allowed: stop, skip"),
    ("optimizer.name=adamm", "optimizer.name: unknown optimizer 'adamm'; did you mean 'adam"),
    ('optimizer.name=["adam"]', "optimizer.name: "),
    ("optimizer.learning_rate=1", "optimizer.learning_rate: unknown key for adamw"),
    ("optimizer.lr=-1", "optimizer.lr: adamw refuses it: Invalid learning rate: -1"),
    ("optimizer.lr=fast", "optimizer.lr: expected a number, got 'fast'"),
    ("optimizer.lr=true", "optimizer.lr: expected a number, got True"),
    ("optimizer.foreach='no'", "optimizer.foreach: expected true or false, got 'no'"),
    ("optimizer.capturable=true", "optimizer.capturable: needs a GPU"),
    ("seed=18446744073709551616", "seed: got 18446744073709551616; allowed: at least 0 and at "),
    ("seed=18446744073709551615", "seed: got 18446744073709551615; allowed: at least 0 and at "),
    ("train.batch=100000000000", "train.batch: got 100000000000; allowed: at most 16777216"),
    ("model.widht=5", "model.widht: unknown key; did you mean 'width'?"),
    ("data.size=5", "data.size: unknown key; valid here: count"),
    ("module=wrok.py", "; did you mean 'work.py'?"),
    ("train.steps=1e400", "train.steps: expected an integer, got inf"),
    ("train.clip_norm=-0.0", "train.clip_norm: got -0.0; allowed: more than 0"),
    (f"train.steps=1{'0' * 30}", f"allowed: at least 1 and at most {2**63 - 1}"),
    ("train.steps=0x1" + "0" * 2000, "train.steps: got an integer of 8001 bits; allowed: "),
    (f"submit.nodes=1{'0' * 30}", f"allowed: at least 1 and at most {2**63 - 1}"),
    (f"exchange.in_flight_bytes=1{'0' * 12}", "allowed: at least 1 and at most 4294967296"),
    ("exchange.deadline_s=1e300", "allowed: more than 0 and at most 1000000000"),
    ("model.width=0x1" + "0" * 2000, "model.width: expected an integer of 64 bits, got an "),
    ("model.width=[[0x1" + "0" * 2000 + "]]", "model.width: expected an integer of 64 bits"),
    (f"exchange.wire={'x' * 100_000}", "xxx ... xxx"),
    (f'"a\x1b".steps={"x" * 100_000}', "unknown key"),
]


@pytest.mark.parametrize(("override", "expected"), VALUES, ids=[v[:40] for v, _ in VALUES])
def test_mistake_is_told_with_its_place(write: Write, override: str, expected: str) -> None:
    text = mistakes(write(), override)
    first, line = text.splitlines()
    assert first == "the command line has a mistake:"
    assert expected in line and len(line) < 1000
    assert line.endswith(f" (--set {override})" if len(override) < 200 else " characters))")


def test_largest_seed_trains(write: Write) -> None:
    loaded = job.load(write(), [f"seed={2**63 - 1}"])
    assert loaded.parts().model
    job.seed_generators(loaded.job.seed + 1 + (1 << 20) + 1_000_003 * (1 << 40))


def test_dates_reach_the_model_and_run_json(write: Write) -> None:
    text = JOB.replace("width = 4", "width = 4, date = 2024-01-01")
    loaded = job.load(write(text, MODULE.replace("depth=1", "depth=1, date=None")))
    facts = loaded._facts(loaded.parts().model)
    assert loaded.job.model["date"] == datetime.date(2024, 1, 1)
    assert json.loads(json.dumps(facts))["job"]["model"]["date"] == "2024-01-01"
    assert facts["parameters"] == 20


LINES = """# a remark
module = "work.py"
model = { width = 4 }

[train]
stepz = 5
batch = 0
[run]
folder = 3
"""


def test_mistakes_are_told_with_their_lines(write: Write) -> None:
    first, *lines = mistakes(write(LINES), "model.widht=4", "nope").splitlines()
    assert first.endswith("mine.toml and the command line have 6 mistakes:")
    assert {line.split(":")[0].strip(): line.rpartition(" (")[2] for line in lines} == {
        "train.stepz": "line 6)",
        "train.batch": "line 7)",
        "train.steps": "line 5)",
        "run.folder": "line 9)",
        "model.widht": "--set model.widht=4)",
        "--set nope": lines[0],
    }


@pytest.mark.parametrize("line", ["  [ train ]  # remark\nsteps = 0", "train.steps = 0"])
def test_mistake_of_a_table_is_told_with_its_line(write: Write, line: str) -> None:
    path = write(f'module = "work.py"\nmodel = {{ width = 4 }}\n{line}')
    told = mistakes(path)
    assert f"train.steps: got 0; allowed: at least 1 (line {3 + line.count(chr(10))})" in told
    assert "mine.toml has 2 mistakes" in told


def test_options_that_exclude_each_other_are_a_mistake(write: Write) -> None:
    text = mistakes(write(), "exchange.way=native", "exchange.deterministic=true", "seed=-1")
    assert "has 2 mistakes" in text and "exchange: " in text


def test_missing_keys_are_told(write: Write) -> None:
    text = mistakes(write("train = { batch = 1 }\nmodel = { width = 4 }"))
    assert "module: missing; it must be set" in text
    assert "train.steps: missing; it must be set" in text


def test_all_mistakes_are_told_at_once(write: Write) -> None:
    text = """
        module = "work.py"
        sed = 1
        train = { steps = 0, batch = "all", shufle = false, clip_norm = nan }
        model = { widht = 4 }
        schedule = { name = "cosin", warmup = true }
        checkpoint = 5
        optimizer = { name = "sgd", rate = 1 }
    """
    path = write(text, MODULE.replace("def loss", "def lost"))
    first, *lines = mistakes(path, "run.line_s=-1", "malformed").splitlines()
    assert first.endswith("mine.toml and the command line have 14 mistakes:")
    assert sorted(line.split(":")[0].strip() for line in lines) == [
        "--set malformed",
        *("checkpoint", "model.widht", "model.width", "module", "optimizer.rate", "run.line_s"),
        *("schedule.name", "schedule.warmup", "sed"),
        *("train.batch", "train.clip_norm", "train.shufle", "train.steps"),
    ]


# ---------------------------------------------------------------------- mistakes in the module


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("import nowhere_to_be_found", "failed: ModuleNotFoundError: No module named 'nowhere"),
        ("\n\n1 / 0", "ZeroDivisionError: division by zero at "),
        ("\n\n1 / 0", "work.py:3 in <module>"),
        ("\ndef model(:", "failed: SyntaxError: "),
        ("\ndef model(:", "work.py:2"),
        ("import sys; sys.exit(7)", "failed: SystemExit: 7"),
        (
            MODULE.replace("def loss", "def _loss"),
            "work.py defines no loss(); needed: model, train_data, loss; found: model, train_data",
        ),
        (MODULE.replace("def loss", "def los"), "defines no loss() (is los() meant?); needed: "),
        ("from torch.nn import Linear", "found: none"),
        (MODULE + "\nloss = 3", "work.py defines no loss()"),
        ("class Odd(BaseException): pass\nraise Odd('no')", "failed: Odd: no at "),
        ("raise SystemExit", "failed: SystemExit at "),
        ("import os\nos.listdir('/nowhere')", "work.py:2 in <module>"),
        ("import json\njson.loads('x')", "work.py:2 in <module>"),
        ("x = '\0'", "failed: "),
        ("raise ValueError('x' * 10**7)", "xxx ... xxx"),
        ("globals()[''] = 3\nglobals()[3] = 4", "defines no model()"),
        ("def __getattr__(name): raise OSError(name)", "failed: OSError: model at "),
        (
            MODULE.replace("loss(model, batch)", "loss(batch)"),
            "loss() must take 2 arguments, model",
        ),
        (MODULE + "\ndef collate(a, b): pass", "collate() must take 1 argument, samples ("),
        (MODULE + "\ndef sample(): pass", "work.py:13 in sample)"),
        (MODULE + "\nmetrics = 3", "module: metrics in "),
        (MODULE.replace("count=8", "count, path='x'"), "data.count: missing; train_data() needs"),
        (
            MODULE + "\nimport functools\ntrain_data = functools.partial(lambda n: range(n))",
            "data.n: missing;",
        ),
    ],
)
def test_mistake_in_the_module_is_told(write: Write, module: str, expected: str) -> None:
    assert expected in mistakes(write(module=module))


@pytest.mark.parametrize("text", ["", "[model]\nwidth = 3\n"])
def test_argument_without_default_must_be_given(write: Write, text: str) -> None:
    path = write('module = "work.py"\ntrain = { steps = 1, batch = 1 }\n' + text)
    if text:
        job.load(path)
    else:
        assert "model.width: missing; model() needs it" in mistakes(path)


def test_functions_may_take_any_arguments(write: Write) -> None:
    module = MODULE.replace("width, depth=1", "width, depth=1, **rest")
    assert job.load(write(module=module), ["model.anything=5"]).job.model["anything"] == 5


def test_builtin_may_make_the_data(write: Write) -> None:
    path = write(module=MODULE + "\ntrain_data = bytes")
    assert job.load(path, ["data.source=[1, 2]"]).parts().train_data == b"\1\2"


def test_empty_module_name_is_told(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write().parent)
    assert "module: there is no " in mistakes(Path("mine.toml"), "module=")


# ---------------------------------------------------------------------- mistakes in the file


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"train = {", "the job file is not TOML"),
        (b"seed = 1\nseed = 2", "the job file is not TOML"),
        (b'module = "\xff"', "the job file is not TOML"),
        (b"", "has 2 mistakes"),
    ],
)
def test_broken_file_is_told(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    text = mistakes(path)
    assert expected in text and str(path) in text


def test_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    text = mistakes(tmp_path / "none.toml")
    assert "cannot be read: No such file" in text and "fix: check the path" in text
    (tmp_path / "some.toml").touch()
    text = mistakes(tmp_path)
    assert "cannot be read: Is a directory" in text
    assert f"fix: name a job file; there are {tmp_path / 'some.toml'}" in text


def test_module_in_place_of_the_job_file_is_told(write: Write) -> None:
    text = mistakes(write().with_name("work.py"))
    assert "the job file is not TOML" in text
    assert "fix: give the .toml whose `module` is work.py" in text


@pytest.mark.parametrize("name", ["x" * 5000, "a\\u0000b", "/dev/zero", "../up/..", "\\u001b[2J"])
def test_odd_names_of_modules_are_told(write: Write, name: str) -> None:
    text = mistakes(write(JOB.replace("work.py", name)))
    assert "module: there is no " in text
    assert text.replace("\n", "").isprintable() and len(text) < 1000


def test_module_that_waits_for_a_writer_is_not_read(write: Write) -> None:
    path = write(JOB.replace("work", "pipe"))
    os.mkfifo(path.with_name("pipe.py"))
    assert "module: there is no " in mistakes(path)


# ---------------------------------------------------------------------- extends


def test_extended_job_is_that_of_one_file(write: Write) -> None:
    path = write()
    (path.parent / "more").mkdir()
    other = path.parent / "more" / "other.toml"
    other.write_text('extends = "../mine.toml"\ntrain.steps = 20\n')
    loaded = job.load(other)
    assert (loaded.name, loaded.job.train.steps, loaded.job.train.batch) == ("other", 20, 4)
    assert loaded.source.resolve() == path.with_name("work.py")
    assert loaded.fingerprint == job.load(path, ["train.steps=20"]).fingerprint


def test_mistakes_are_told_with_the_file_where_they_stand(write: Write) -> None:
    base = write(JOB.replace("batch = 4", "batch = 0") + "sede = 1\n")
    path = base.with_name("other.toml")
    path.write_text('extends = "mine.toml"\ntrain.steps = 0\ncheckpoint.evry = 1\n')
    first, *lines = mistakes(path, "seed=-1").splitlines()
    assert first == f"{path} and the command line have 5 mistakes:"
    assert {line.split(":")[0].strip(): line.rpartition(" (")[2] for line in lines} == {
        "train.steps": "line 2)",
        "train.batch": f"line 3 of {base})",
        "checkpoint.evry": "line 3)",
        "sede": f"line 5 of {base})",
        "seed": "--set seed=-1)",
    }


def test_what_is_extended_must_be_a_name(write: Write) -> None:
    assert "extends: expected a string, got 5 (line 1)" in mistakes(write("extends = 5" + JOB))


# ---------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.width=5", 5),
        ("model.width=5e-1", 0.5),
        ("model.width=-1_000", -1000),
        ("model.width=true", True),
        ("model.width=wide", "wide"),
        ("model.width= wide ", "wide"),
        ("model.width='5'", "5"),
        ("model.width=/scratch/a=b.txt", "/scratch/a=b.txt"),
        ("model.width=", ""),
        ("model.width=[1, 2]", [1, 2]),
        ("model.width={ a = 1 }", {"a": 1}),
        (" model.width =5", 5),
    ],
)
def test_override_is_toml_or_a_string(write: Write, override: str, value: object) -> None:
    got = job.load(write(), [override]).job.model["width"]
    assert got == value and type(got) is type(value)


def test_overrides_make_tables_and_the_last_one_counts(write: Write) -> None:
    loaded = job.load(
        write(), ["optimizer.name=sgd", "optimizer.lr=1", "optimizer.lr=0.5", "train.batch=8"]
    )
    assert loaded.job.optimizer == {"name": "sgd", "lr": 0.5}
    assert (loaded.job.train.steps, loaded.job.train.batch) == (10, 8)


@pytest.mark.parametrize("text", ["train.steps", "=5", "train..steps=5", ".=5", ""])
def test_malformed_override_is_told(write: Write, text: str) -> None:
    assert f"--set {text}: expected table.key=value" in mistakes(write(), text)


def test_override_of_several_values_is_told(write: Write) -> None:
    text = mistakes(write(), "train.batch=3\noops=4")
    assert text.splitlines()[1].endswith("holds more than one value; repeat --set for each")
    loaded = job.load(write(), ['model.width="""a\nb = 1"""'])
    assert loaded.job.model["width"] == "a\nb = 1"


def test_override_inside_a_value_is_told(write: Write) -> None:
    text = mistakes(write(), "train.steps.more=5", "seed=-1")
    assert "--set train.steps.more=5: steps is a value and not a table" in text
    assert "has 2 mistakes" in text


# ---------------------------------------------------------------------- fingerprint


@pytest.mark.parametrize(
    "override",
    ["seed=1", "train.steps=11", "model.depth=2", "optimizer.lr=1", "exchange.wire=bfloat16"],
)
def test_other_values_are_another_job(write: Write, override: str) -> None:
    assert job.load(write(), [override]).fingerprint != job.load(write()).fingerprint


@pytest.mark.parametrize(
    "override",
    ["run.folder=/x", "run.log_every=3", "checkpoint.every=7", "train.steps=10", "seed=0"],
)
def test_same_job_may_be_kept_differently(write: Write, override: str) -> None:
    assert job.load(write(), [override]).fingerprint == job.load(write()).fingerprint


def test_other_source_is_another_job(write: Write) -> None:
    before = job.load(write()).fingerprint
    assert job.load(write(text="# a remark\n" + JOB)).fingerprint == before
    assert job.load(write(module=MODULE + "\nEXTRA = 1")).fingerprint != before


# ---------------------------------------------------------------------- parts


def test_same_seed_same_model(write: Write) -> None:
    def weights(*overrides: str) -> object:
        return job.load(write(), overrides).parts().model.state_dict()["0.weight"].tolist()

    assert weights() == weights()
    assert weights() != weights("seed=1")


def test_validation_data_gets_the_arguments_it_takes(write: Write) -> None:
    more = "def validation_data(count):\n    return range(count + 1)\n"
    module = MODULE.replace("count=8", "count=8, noise=0.1") + more
    parts = job.load(write(module=module), ["data.count=3", "data.noise=0.5"]).parts()
    assert (parts.train_data, parts.validation_data) == (range(3), range(4))


def trainer_mistakes(world: World, loaded: LoadedJob) -> str:
    with pytest.raises(JobError) as caught:
        loaded.trainer(world)
    assert caught.value.everywhere
    return str(caught.value)


def test_failing_model_is_told_with_rank_and_place(world: World, write: Write) -> None:
    module = MODULE.replace("    return nn.Seq", "    1 / 0\n    return nn.Seq")
    text = trainer_mistakes(world, job.load(write(module=module)))
    assert text.startswith(f"{world.name_of(0)}: work.py: model() failed: ZeroDivisionError")
    assert "work.py:5 in model\n" in text


def test_wrong_argument_is_told_with_the_users_line_and_its_source(
    world: World, write: Write
) -> None:
    """torch raises it, far below the user's file."""
    text = trainer_mistakes(world, job.load(write(), ["model.width=0.5"]))
    assert re.search(r"where: \S+work\.py:5 in <genexpr>\n", text)
    assert (
        "fix: check what [model] of mine.toml gives it: width = 0.5 (--set model.width=0.5)" in text
    )
    module = MODULE.replace("return range(count)", "return range(count / 2)")
    text = trainer_mistakes(world, job.load(write(JOB + "data.count = 3\n", module)))
    assert "work.py: train_data() failed: TypeError" in text and "work.py:8 in train_data" in text
    assert "check what [data] of mine.toml gives it: count = 3 (line 5)" in text


def test_model_that_cannot_be_trained_is_the_jobs_mistake(world: World, write: Write) -> None:
    module = MODULE + "\ndef model(width):\n    return nn.Embedding(3, width, sparse=True)\n"
    text = trainer_mistakes(world, job.load(write(module=module)))
    assert text.startswith("work.py: ") and "sparse" in text


def test_model_must_be_a_torch_module(world: World, write: Write) -> None:
    module = MODULE + "\ndef model(width):\n    return [width]\n"
    text = trainer_mistakes(world, job.load(write(module=module)))
    assert "model() returned no torch module: got 'list'" in text


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("None", "no torch module: got 'NoneType'"),
        ("'a string'", "no torch module: got 'str'"),
        ("nn.Linear", "the class Linear, and not an instance of it"),
        ("nn.Tanh()", "a model without parameters"),
        ("nn.Linear(1, 1).requires_grad_(False)", "a model whose parameters are all frozen"),
        ("nn.Linear(1, 1, device='meta')", "a model on the device 'meta'"),
        ("nn.LazyLinear(1)", "a model with parameters of unknown shape"),
    ],
)
def test_what_cannot_be_trained_is_told_with_its_place(
    world: World, write: Write, returned: str, expected: str
) -> None:
    module = MODULE + f"\ndef model(width):\n    return {returned}\n"
    text = trainer_mistakes(world, job.load(write(module=module)))
    assert f"work.py: model() returned {expected}" in text
    assert re.search(r"where: \S+work\.py:13 in model\n  fix: ", text)


@pytest.mark.parametrize("name", ["train_data", "validation_data"])
@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("5", "got 'int'"),
        ("'a/path'", "is a string"),
        ("list", "is a class, and not an instance of it"),
        ("{'x': 1}", "is a dict whose keys are not the numbers of its samples"),
        ("No()", "has no length: ValueError: unknown"),
        ("[]", "is empty"),
        ("iter([1])", "has no indices: got 'list_iterator'"),
    ],
)
def test_what_is_no_data_is_told_with_its_place(
    world: World, write: Write, name: str, returned: str, expected: str
) -> None:
    none = "class No(list):\n    def __len__(self): raise ValueError('unknown')\n"
    loaded = job.load(write(module=f"{MODULE}\ndef {name}():\n    return {returned}\n{none}"))
    if (returned == "[]" and name == "validation_data") or (
        returned[:4] == "iter" and name[0] == "t"
    ):
        assert loaded.parts()
        return
    text = trainer_mistakes(world, loaded)
    kind = "training" if name == "train_data" else "validation"
    assert f"the {kind} data " in text and expected in text
    assert re.search(rf"where: \S+work\.py:13 in {name}\n  fix: ", text)


def test_validation_data_may_be_none(write: Write) -> None:
    loaded = job.load(write(module=MODULE + "\ndef validation_data():\n    return None\n"))
    assert loaded.parts().validation_data is None


@pytest.mark.parametrize("name", ["model", "train_data"])
def test_exit_is_no_end_of_a_job(world: World, write: Write, name: str) -> None:
    """It would leave the other ranks alone, with the status of a job that is done."""
    arguments = "width" if name == "model" else ""
    module = f"{MODULE}\ndef {name}({arguments}):\n    raise SystemExit\n"
    text = trainer_mistakes(world, job.load(write(module=module)))
    assert f"work.py: {name}() failed: SystemExit\n  where: " in text
    assert f"work.py:14 in {name}" in text


def test_next_forward_excludes_what_decides_from_all_gradients(write: Write) -> None:
    overrides = ("exchange.next_forward=true", "train.clip_norm=1.0", "train.nonfinite='skip'")
    text = mistakes(write(), *overrides)
    assert "train.clip_norm: not with exchange.next_forward" in text
    assert "train.nonfinite: 'skip' is not possible with exchange.next_forward" in text
