"""What is written comes back bit for bit, and other tools can read the model."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from torch import nn

from hpctrain.train.checkpoint import format, manifest
from hpctrain.train.checkpoint.copies import Copies

BASE = torch.arange(24.0).reshape(4, 6)
TENSORS = {
    "plain": BASE,
    "transposed": BASE.t(),
    "every other": BASE[:, ::2],
    "expanded": torch.ones(1, 3).expand(4, 3),
    "scalar": torch.tensor(-0.0),
    "empty": torch.zeros(0),
    "empty with a shape": torch.zeros(3, 0, 2),
    "nan and infinity": torch.tensor([float("nan"), float("inf"), -float("inf")]),
    "double": torch.tensor([1e-320, 1 / 3], dtype=torch.float64),
    "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "bfloat": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
    "bool": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "long": torch.tensor([2**62, -1]),
    "complex": torch.tensor([1 + 2j, -0.0j]),
    "complex double": torch.tensor([1 + 2j], dtype=torch.complex128),
    "conjugate": torch.tensor([1 + 2j]).conj(),
    "negative": torch.tensor([1 + 2j]).conj().imag,
    "float8": torch.ones(4).to(torch.float8_e4m3fn),
    "sparse": torch.eye(3).to_sparse(),
    "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
}


def bits(tensor: torch.Tensor) -> bytes:
    """Of what a tensor holds, without its place in memory."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).flatten()
    return dense.view(torch.uint8).numpy().tobytes()


def stored(folder: Path, state: dict[str, Any], copied: str) -> dict[str, Any]:
    """A model's state after a checkpoint."""
    if copied:
        copies = Copies()
        state = copies.of("model", state, is_dense="dense" in copied, alone="alone" in copied)
        copies.finish()
    folder.mkdir(exist_ok=True)
    files = format.write_shared(folder, {"model": state})
    for name, entry in files.items():
        manifest.check_file(folder, name, entry)
    found: dict[str, Any] = format.read_state(folder, {"files": files}, None)["model"]
    return found


@pytest.mark.parametrize("copied", ["", "dense", "alone", "dense alone"])
@pytest.mark.parametrize("name", TENSORS)
def test_tensor_comes_back_bit_for_bit(tmp_path: Path, name: str, copied: str) -> None:
    value = TENSORS[name]
    found = stored(tmp_path, {name: value, "other": BASE}, copied)
    assert found[name].dtype == value.dtype and found[name].shape == value.shape
    assert bits(found[name]) == bits(value)


@pytest.mark.parametrize("copied", ["", "dense", "alone"])
def test_all_of_a_state_with_its_order_and_versions(tmp_path: Path, copied: str) -> None:
    state: OrderedDict[str, Any] = OrderedDict(TENSORS)
    state["_extra_state"] = {"counts": [1, 2], "text": "x"}
    state["__metadata__"] = torch.ones(2)
    state["line\nbreak"] = torch.ones(1)
    state["größe"] = torch.ones(1)
    state._metadata = OrderedDict({"": {"version": 7}})  # type: ignore[attr-defined]
    found = stored(tmp_path, state, copied)
    assert list(found) == list(state)
    assert found._metadata == {"": {"version": 7}}  # type: ignore[attr-defined]
    assert found["_extra_state"] == state["_extra_state"]
    assert all(bits(found[n]) == bits(v) for n, v in state.items() if n != "_extra_state")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight


@pytest.mark.parametrize("copied", ["", "dense", "alone"])
def test_other_tools_load_a_model_with_tied_weights(tmp_path: Path, copied: str) -> None:
    model, other = Tied(), Tied()
    stored(tmp_path, model.state_dict(), copied)
    other.load_state_dict(load_file(tmp_path / manifest.MODEL))
    assert other.last.weight is other.first.weight
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    with safetensors.safe_open(tmp_path / manifest.MODEL, "np") as file:
        assert set(file.keys()) == set(model.state_dict())
        assert file.metadata() == {"format": "pt"}


def test_model_that_has_nothing(tmp_path: Path) -> None:
    assert stored(tmp_path, {}, "dense") == {}


def test_tied_tensors_are_copied_once() -> None:
    copies = Copies()
    weight = torch.rand(5)
    state = copies.of("model", {"a": weight, "b": weight, "c": weight[:3]})
    assert state["a"] is state["b"]
    assert torch.equal(state["c"], weight[:3])


def test_memory_of_copies_is_used_again_where_it_fits() -> None:
    copies = Copies()
    first = copies.of("x", [torch.zeros(3), torch.zeros(4), torch.zeros(5)])
    second = copies.of("x", [torch.ones(3), torch.ones(2, 2), torch.ones(5, dtype=torch.float64)])
    assert first[0] is second[0] and second[0].tolist() == [1, 1, 1]
    assert first[1] is not second[1] and first[2] is not second[2]
    assert len(copies.of("x", [torch.ones(3)])) == 1


@pytest.mark.parametrize("alone", [False, True])
def test_copies_hold_nothing_that_the_program_holds(alone: bool) -> None:
    inner = {"list": [1], "set": {2}, "tensors": (torch.zeros(2), torch.zeros(2, 2).t())}
    copies = Copies()
    copied = copies.of("x", inner, alone=alone)
    copies.finish()
    inner["list"].append(3)  # type: ignore[attr-defined]
    inner["set"].add(3)  # type: ignore[attr-defined]
    inner["tensors"][0].add_(1)  # type: ignore[index]
    assert copied["list"] == [1] and copied["set"] == {2}
    assert copied["tensors"][0].tolist() == [0, 0]
    assert copied["tensors"][1].stride() == (1, 2)


def test_full_disk_is_told_as_such_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through torch's writer as well, which has words of its own for it."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(format, "_BUFFER_BYTES", 64)
    for name, state in (("model", {"w": torch.rand(5000)}), ("optimizer", torch.rand(5000))):
        folder = tmp_path / name
        folder.mkdir()
        path = folder / (manifest.MODEL if name == "model" else "optimizer.pt")
        path.symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left"):
            format.write_shared(folder, {name: state})
        assert not path.exists()


def test_checkpoints_of_the_first_format_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "step-000000003"
    folder.mkdir()
    files = {}
    for name, value in (("model.pt", {"w": torch.ones(2)}), ("rank-00000.pt", {"seed": 1})):
        files[name] = format.write_object(folder / name, value)
    text = {"format": 1, "step": 3, "ranks": 1, "files": files}
    text["digest"] = manifest.digest_of(text)
    (folder / manifest.MANIFEST).write_text(json.dumps(text))
    read = manifest.read_manifest(folder)
    state = format.read_state(folder, read, "rank-00000.pt")
    assert state["model"]["w"].tolist() == [1, 1] and state["own"] == {"seed": 1}
