"""The files of one checkpoint: how state becomes files, and files state.

    manifest.json       step, ranks, size and SHA-256 of each file, and a hash of all that
    model.safetensors   the model's state, for hpctrain and for other tools
    model.rest.pt       what of it safetensors does not hold, and the order of its entries
    KEY.pt              other state that is the same on all ranks
    rank-00000.pt       state of one rank

Files that end in .pt are read with `weights_only=True`, which executes nothing from them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import safetensors.torch
import torch

from hpctrain.errors import CheckpointError, ExitCode
from hpctrain.train.checkpoint.manifest import MODEL, REST, Entry, check_file, is_own

_BUFFER_BYTES = 1 << 20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What every reader of safetensors knows."""


class UnreadableError(CheckpointError):
    """A checkpoint cannot be read, however often one tries: a relauncher need not."""

    exit_code = ExitCode.BAD_JOB


# ---------------------------------------------------------------------- writing


class HashedFile:
    """A file written from its start to its end, with its size and hash.

    Errors are kept until `close`: torch would turn one that `write` raises into another.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb", buffering=_BUFFER_BYTES)
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Append; returns the number of bytes."""
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
            self._digest.update(data)
            self._bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """For torch, which calls it: nothing is promised before `close`."""

    def close(self) -> Entry:
        """Have everything on disk; returns the entry in the manifest.

        Raises:
            OSError: something could not be written. The file is removed.
        """
        try:
            if self._error:
                raise self._error
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except BaseException:
            self.discard()
            raise
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def discard(self) -> None:
        """Remove the file: what is half written takes space that may be needed."""
        for undo in (self._file.close, self._path.unlink):
            try:
                undo()
            except OSError:
                continue


def write_shared(folder: Path, state: Mapping[str, Any]) -> dict[str, Entry]:
    """Write and sync state that is the same on all ranks; entries by file.

    Args:
        folder: of the checkpoint.
        state: by key, with all tensors on the host; `model` becomes two files.

    Raises:
        OSError: a file cannot be written.
    """
    entries = {}
    for key, value in state.items():
        if key == "model":
            plain, rest = parts_of_model(value)
            entries[MODEL] = _write_tensors(folder / MODEL, plain)
            entries[REST] = write_object(folder / REST, rest)
        else:
            entries[f"{key}.pt"] = write_object(folder / f"{key}.pt", value)
    return entries


def write_object(path: Path, value: Any) -> Entry:
    """Write and sync what torch can save.

    Raises:
        OSError: the file cannot be written.
        Exception: the value cannot be saved.
    """
    file = HashedFile(path)
    try:
        torch.save(value, cast(IO[bytes], file))
    except BaseException:
        file.discard()
        raise
    return file.close()


def parts_of_model(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What safetensors holds of a model's state, and the rest, with the order of all entries."""
    plain = {name: value for name, value in state.items() if _is_plain(name, value)}
    rest = {
        "names": list(state),
        "entries": {name: value for name, value in state.items() if name not in plain},
        "metadata": getattr(state, "_metadata", None),
    }
    return plain, rest


def _is_plain(name: str, value: Any) -> bool:
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.dtype in _DTYPES
        and value.device.type == "cpu"
        and name != "__metadata__"
        and name.isprintable()
    )


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> Entry:
    """Write and sync a safetensors file, in one pass with its hash and without a second copy.

    Tensors that share memory are written as often as they have names, so that every name loads.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file = HashedFile(path)
    try:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            if tensors[name].numel():
                file.write(_bytes_of(tensors[name]))
    except BaseException:
        file.discard()
        raise
    return file.close()


# ---------------------------------------------------------------------- reading


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    dense = tensor.detach().resolve_neg().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # a single number may have any stride
    return flat.view(torch.uint8).numpy().data


def read_state(folder: Path, manifest: Mapping[str, Any], own: str | None) -> dict[str, Any]:
    """Check and read the files that a rank needs.

    Args:
        folder: of the checkpoint.
        manifest: as `read_manifest` gave it.
        own: file with this rank's own state, if there is one.

    Returns:
        The state, one key a file, with the own one under ``own``: None if there is none.

    Raises:
        CheckpointError: a file is not what the manifest says.
        Exception: a file cannot be read.
    """
    files = manifest["files"]
    names = [name for name in files if name == own or not is_own(name)]
    for name in names:
        check_file(folder, name, files[name])
    state: dict[str, Any] = {"own": load_object(folder / own) if own else None}
    for name in names:
        if name == MODEL:
            state["model"] = _read_model(folder)
        elif name not in (REST, own):
            state[name.removesuffix(".pt")] = load_object(folder / name)
    return state


def _read_model(folder: Path) -> OrderedDict[str, Any]:
    tensors = safetensors.torch.load_file(folder / MODEL)
    rest = load_object(folder / REST)
    entries = tensors | rest["entries"]
    if sorted(rest["names"]) != sorted(entries):
        raise CheckpointError(
            "the two files of the model do not belong together", where=str(folder)
        )
    state = OrderedDict((name, entries[name]) for name in rest["names"])
    if rest["metadata"] is not None:
        state._metadata = rest["metadata"]  # type: ignore[attr-defined]
    return state


def load_object(file: Any) -> Any:
    """What `write_object` wrote, with all tensors on the host. Nothing in it is executed."""
    return torch.load(file, map_location="cpu", weights_only=True)


# ---------------------------------------------------------------------- reading back


def unreadable_entry(folder: Path, state: Mapping[str, Any], own: tuple[str, Any]) -> str:
    """Read back the files just written, as a resumed run will.

    Args:
        folder: of the checkpoint.
        state: what `write_shared` wrote.
        own: file with this rank's state, and the state.

    Returns:
        Place and type of an entry that cannot be read again, such as `model['a']['b'] (ndarray)`;
        empty if there is none.
    """
    written: list[tuple[str, str, Any]] = [(own[0], own[0].removesuffix(".pt"), own[1])]
    for key, value in state.items():
        if key == "model":
            written.append((REST, key, parts_of_model(value)[1]["entries"]))
        else:
            written.append((f"{key}.pt", key, value))
    for file, place, value in written:
        if not _loads(folder / file):
            return place + _innermost(value)
    return ""


def _innermost(value: Any) -> str:
    """Place and type of the innermost entry that cannot be read: `['a']['b'] (ndarray)`."""
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, (list, tuple)):
        inner = enumerate(value)
    for key, entry in inner:
        buffer = io.BytesIO()
        torch.save(entry, buffer)
        buffer.seek(0)
        if not _loads(buffer):
            return f"[{key!r}]{_innermost(entry)}"
    return f" ({type(value).__module__}.{type(value).__name__})"


def _loads(file: Any) -> bool:
    try:
        load_object(file)
    except Exception:
        return False
    return True
