"""A byte-level GPT on the source of the Python standard library: text that every machine has."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

BYTES = 256
CONTEXT = 64
VALIDATION_EVERY = 20
"""Every twentieth file is kept for validation."""
VALIDATION_WINDOWS = 2048
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}


class Attention(nn.Module):
    """Causal self-attention with normalised queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project_in = nn.Linear(width, 3 * width, bias=False)
        self.project_out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        query, key, value = self.project_in(x).view(shape).permute(2, 0, 3, 1, 4)
        query, key = (F.normalize(t, dim=-1) * t.shape[-1] ** 0.5 for t in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.project_out(mixed.transpose(1, 2).reshape(x.shape))


class Layer(nn.Module):
    """One transformer layer: attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_2 = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * width, width, bias=False),
        )
        nn.init.zeros_(self.attention.project_out.weight)
        nn.init.zeros_(self.perceptron[2].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.perceptron(self.norm_2(x))


class Trunk(nn.Module):
    """A GPT without its head. Its tables are drawn by `draw_tables`, together with the head's."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.bytes = nn.Embedding(BYTES, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        """Features (batch, length, width) of each byte of a window and those before it."""
        x = self.bytes(window) + self.places.weight[: window.shape[1]]
        return self.norm(self.layers(x))


class GPT(Trunk):
    """Predicts each byte of a window from those before it."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__(width, layers, heads)
        self.head = nn.Linear(width, BYTES, bias=False)
        draw_tables(self.bytes, self.places, self.head)

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        """Logits (batch, length, 256) for the byte after each of a window (batch, length)."""
        return self.head(super().forward(window))


def draw_tables(*tables: nn.Embedding | nn.Linear) -> None:
    """Initial values of embeddings, and of a head over as many bytes."""
    for table in tables:
        nn.init.normal_(table.weight, std=0.02)


class Windows(Dataset):
    """Windows of CONTEXT + 1 bytes, cut from files joined end to end; each overlaps by one byte."""

    def __init__(self, files: list[Path], limit: int | None = None) -> None:
        text = b"".join(path.read_bytes() for path in files)
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        count = (len(text) - 1) // CONTEXT
        self.starts = torch.arange(count) * CONTEXT
        if limit is not None and count > limit:
            self.starts = self.starts[torch.linspace(0, count - 1, limit).long()]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> torch.Tensor:
        start = int(self.starts[index])
        return self.text[start : start + CONTEXT + 1]


def source_files(validation: bool) -> list[Path]:
    """Source files of the standard library, sorted, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    relative = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    kept = [path for path in relative if not SKIPPED & set(path.parts)]
    return [
        root / path
        for number, path in enumerate(kept)
        if (number % VALIDATION_EVERY == VALIDATION_EVERY // 2) == validation
    ]


def model(width: int = 128, layers: int = 4, heads: int = 4) -> nn.Module:
    return GPT(width, layers, heads)


def train_data() -> Dataset:
    return Windows(source_files(validation=False))


def validation_data() -> Dataset:
    return Windows(source_files(validation=True), VALIDATION_WINDOWS)


def loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    windows = windows.long()
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def sample(model: nn.Module, start: bytes = b"def ", length: int = 300) -> str:
    """Text that the model writes on from `start`, byte by byte."""
    generator = torch.Generator().manual_seed(0)
    text = list(start)
    for _ in range(length):
        logits = model(torch.tensor([text[-CONTEXT:]]))[0, -1]
        chances = torch.softmax(logits / 0.8, dim=-1)
        text.append(int(torch.multinomial(chances, 1, generator=generator)))
    return bytes(text).decode(errors="replace")
