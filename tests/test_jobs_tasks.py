"""The tasks on the standard library's source that share an encoder."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

JOBS = Path(__file__).parents[1] / "jobs"
TASKS = ("task_code", "task_comments", "task_kinds")
FEW_LABELS = TASKS[1:]
SNIPPET = b"""\
# one
def f(x):  # two
    return "# no" if x else 3
"""


@pytest.fixture(scope="module", autouse=True)
def jobs() -> None:
    """Job modules import those beside them."""
    if str(JOBS) not in sys.path:
        sys.path.append(str(JOBS))


@pytest.fixture
def encoder() -> nn.Module:
    """A small one, whose layers do something: they start as the identity."""
    torch.manual_seed(1)
    encoder = importlib.import_module("stdlib_encoder").encoder(width=16, layers=2, heads=2)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


@cache
def data(name: str, function: str) -> Dataset:
    """What a task's function makes, once for all tests."""
    return getattr(importlib.import_module(name), function)()


def first(samples: Dataset, count: int) -> torch.Tensor | list[torch.Tensor]:
    return torch.utils.data.default_collate([samples[index] for index in range(count)])


def test_a_gpt_is_its_trunk_and_a_head_with_the_values_it_always_had() -> None:
    lm = importlib.import_module("stdlib_lm")
    torch.manual_seed(1)
    gpt = lm.GPT(16, 2, 2)
    torch.manual_seed(1)
    expected = [nn.Embedding(lm.BYTES, 16), nn.Embedding(lm.CONTEXT, 16)]
    layers = [lm.Layer(16, 2) for _ in range(2)]
    expected.append(nn.Linear(16, lm.BYTES, bias=False))
    for table in expected:
        nn.init.normal_(table.weight, std=0.02)
    for made, table in zip((gpt.bytes, gpt.places, gpt.head), expected, strict=True):
        assert torch.equal(made.weight, table.weight)
    for made, layer in zip(gpt.layers, layers, strict=True):
        assert all(map(torch.equal, made.state_dict().values(), layer.state_dict().values()))
    window = torch.randint(lm.BYTES, (2, 9))
    assert torch.equal(gpt(window), gpt.head(lm.Trunk.forward(gpt, window)))


def test_features_depend_on_the_bytes_up_to_their_place(encoder: nn.Module) -> None:
    window = torch.randint(256, (3, 20))
    changed = window.clone()
    changed[:, 11] = (window[:, 11] + 1) % 256
    before, after = encoder(window), encoder(changed)
    assert before.shape == (3, 20, encoder.width)
    assert torch.equal(before[:, :11], after[:, :11])
    assert (before[:, 11:] != after[:, 11:]).any(dim=-1).all()


def test_a_task_trains_encoder_and_head(task: ModuleType, encoder: nn.Module) -> None:
    model = nn.Sequential(encoder, task.head(encoder))
    batch = first(data(task.__name__, "train_data"), 8)
    task.loss(model, batch).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    halves = [
        [part[i : i + 4] for part in batch] if isinstance(batch, list) else batch[i : i + 4]
        for i in (0, 4)
    ]
    mean = sum(task.loss(model, half) for half in halves) / 2
    torch.testing.assert_close(task.loss(model, batch), mean)
    assert 0 <= task.metrics(model, batch)["accuracy"] <= 1


def test_data_are_the_same_each_time(task: ModuleType) -> None:
    one, other = data(task.__name__, "validation_data"), task.validation_data()
    assert len(one) == len(other) > 0
    for index in (0, len(one) // 2, len(one) - 1):
        torch.testing.assert_close(one[index], other[index], rtol=0, atol=0)


def test_no_file_is_for_both_training_and_validation() -> None:
    tokens = importlib.import_module("stdlib_tokens")
    lm = importlib.import_module("stdlib_lm")
    train, validation = lm.source_files(False), lm.source_files(True)
    assert not set(train) & set(validation)
    assert set(tokens.labelled_files(False)) < set(train)
    assert set(tokens.labelled_files(True)) < set(validation)


@pytest.mark.parametrize("name", FEW_LABELS)
def test_few_windows_have_labels_and_as_many_of_each(name: str) -> None:
    for function, most in (("train_data", 400), ("validation_data", 2048)):
        windows, labels = data(name, function).tensors
        assert windows.shape == (len(labels), 64)
        counts = torch.bincount(labels)
        assert len(labels) <= most
        assert (counts == counts[0]).all()


def test_comments_of_a_snippet() -> None:
    labels = importlib.import_module("task_comments").comments(SNIPPET)
    inside = bytes(SNIPPET[i - 1] if label == 1 else 46 for i, label in enumerate(labels) if i)
    assert inside == b"# one" + b"." * 12 + b"# two" + b"." * (len(SNIPPET) - 22)
    assert labels[0] == 255  # its window holds no "#"
    assert set(labels[1:]) == {0, 1}


def test_a_long_comment_counts_while_its_window_holds_a_number_sign() -> None:
    source = b"# " + 80 * b"x" + b" # y\n"
    labels = importlib.import_module("task_comments").comments(source)
    assert labels == bytes([255, *[1] * 64, *[255] * 19, *[1] * 3, 0])


def test_kinds_of_a_snippet() -> None:
    task = importlib.import_module("task_kinds")
    labels = task.kinds(SNIPPET)
    found = [(i, task.KINDS[label]) for i, label in enumerate(labels) if label != 255]
    expected = {
        b"# one": "COMMENT", b"\ndef": "NEWLINE", b"def": "KEYWORD", b"f(": "NAME", b"(x": "OP",
        b"x)": "NAME", b"):": "OP", b":  ": "OP", b"# two": "COMMENT", b"\n    r": "NEWLINE",
        b"return": "KEYWORD", b'"# no"': "STRING", b"if x": "KEYWORD", b"x else": "NAME",
        b"else": "KEYWORD", b"3": "NUMBER",
    }  # fmt: skip
    expected_places = [(SNIPPET.index(text), kind) for text, kind in expected.items()]
    assert found == [*expected_places, (len(SNIPPET) - 1, "NEWLINE")]


@pytest.mark.parametrize(
    "source", [b"x = (", b"'''", b"  x\n y\n", b"\xff = 1\n", b"", b"x\0y\n"], ids=repr
)
def test_source_that_is_not_python_gives_no_labels(source: bytes) -> None:
    for name, labels_of in (("task_comments", "comments"), ("task_kinds", "kinds")):
        labels = getattr(importlib.import_module(name), labels_of)(source)
        assert len(labels) == len(source) + 1


def test_places_count_bytes_and_windows_are_of_one_file(tmp_path: Path) -> None:
    tokens = importlib.import_module("stdlib_tokens")
    source = "é = 'ü'  # ö\r\nx = '''é\ny'''\n".encode()
    for token in tokens.tokens(source):
        if token.kind not in ("NEWLINE", "NL"):
            assert source[token.start : token.end].decode() == token.text

    (tmp_path / "a.py").write_bytes(b"a" * 70)
    (tmp_path / "b.py").write_bytes(b"b" * 66)
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    made = tokens.labelled_windows(files, lambda source: bytearray(len(source) + 1), 1, 99)
    windows = [bytes(window.tolist()) for window, _ in made]
    assert sorted(windows) == [b"a" * 64] * 7 + [b"b" * 64] * 3
