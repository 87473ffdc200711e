"""Windows of the standard library's source with labels that Python's tokenizer gives."""

from __future__ import annotations

import io
import tokenize
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from stdlib_lm import CONTEXT, source_files
from torch.utils.data import TensorDataset

UNLABELLED = 255
LABELLED_FILES = 60
"""Of the training files, evenly spread. To tokenize all of them would take several seconds."""
TRAIN_WINDOWS = 320
"""Few labels: what an encoder learns from other tasks on the same text is worth much here."""
VALIDATION_WINDOWS = 2048
LABEL_SMOOTHING = 0.1
"""Keeps a head from certainty about its few windows, for which it would bend the encoder."""


class Token(NamedTuple):
    """A token of Python, with its place in bytes."""

    kind: str
    text: str
    start: int
    end: int


def tokens(source: bytes) -> list[Token]:
    """The tokens that have a text; none for source that is not Python's or not UTF-8."""
    try:
        lines = io.StringIO(source.decode()).readlines()
        found = [t for t in tokenize.generate_tokens(iter(lines).__next__) if t.string]
    except (UnicodeDecodeError, SyntaxError, tokenize.TokenError):
        return []
    starts = [0, *accumulate(len(line.encode()) for line in lines)]

    def place(row: int, column: int) -> int:
        return starts[row - 1] + len(lines[row - 1][:column].encode())

    return [
        Token(tokenize.tok_name[t.type], t.string, place(*t.start), place(*t.end)) for t in found
    ]


def labelled_files(validation: bool) -> list[Path]:
    """Files to take labels from, without tables of characters, which hold most of the comments."""
    files = [path for path in source_files(validation) if path.parent.name != "encodings"]
    return files if validation else files[:: max(1, len(files) // LABELLED_FILES)]


def labelled_windows(
    files: list[Path], labels_of: Callable[[bytes], bytearray], classes: int, count: int
) -> TensorDataset:
    """Windows of CONTEXT bytes, each of one file, with a label for the place after it.

    Args:
        files: where the windows come from.
        labels_of: the label of each place in a source, from 0 to its length.
        classes: how many labels there are.
        count: of windows; as many of each label, as far as there are any.
    """
    text, labels = bytearray(), bytearray()
    for path in files:
        source = path.read_bytes()
        found = labels_of(source)
        found[:CONTEXT] = bytes([UNLABELLED]) * min(CONTEXT, len(found))  # no whole window before
        labels += found
        text += source + b"\n"  # a file has one place more than bytes
    all_labels = torch.frombuffer(labels, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for label in range(classes):
        places = (all_labels == label).nonzero().flatten()
        order = torch.randperm(len(places), generator=generator)
        chosen.append(places[order[: count // classes]])
    ends = torch.cat(chosen)
    windows = torch.frombuffer(text, dtype=torch.uint8).unfold(0, CONTEXT, 1)
    return TensorDataset(windows[ends - CONTEXT], all_labels[ends].long())
