"""Read files with errors that name the fault, and write them atomically: a file or folder is complete or absent."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

from errors import InputError

if TYPE_CHECKING:
    from safetensors import safe_open
    from torch import Tensor

WHOLLY_DIGESTED = 2**30  # bytes
DIGESTED_END = 2**26


@contextlib.contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Turn whatever keeps the block from reading a file into an InputError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start})") from None


def read_text(path: str | os.PathLike) -> str:
    """The content of a UTF-8 text file."""
    with reading(path):
        return Path(path).read_text(encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """The content of a UTF-8 JSON file.

    Raises:
        InputError: the file is unreadable or not JSON (with line and column), repeats a key in an object (JSON would
            silently drop the first), or holds text that UTF-8 cannot encode.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            name, count = Counter(name for name, _ in pairs).most_common(1)[0]
            raise InputError(f"{path}: key {name!r} occurs {count} times in one object; allowed: once")
        return content

    try:
        text = read_text(path)
        content = json.loads(text, object_pairs_hook=distinct)
        if "\\ud" in text.lower():  # perhaps half of a surrogate pair, which cannot be encoded
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    except UnicodeEncodeError as error:
        before = error.object[max(error.start - 20, 0) : error.start]
        raise InputError(f"{path}: found half of a surrogate pair, {error.object[error.start]!r}, after {before!r}; "
                         "allowed: text that UTF-8 can encode") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply") from None
    except ValueError as error:  # a path with a NUL, a number of thousands of digits
        raise InputError(f"{path}: cannot be read ({error})") from None


def read_object(path: str | os.PathLike, allowed: str = "an object") -> dict[str, Any]:
    """The content of a JSON file that must be an object; `allowed` describes it for the message."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: found {json_kind(content)}; allowed: {allowed}")
    return content


def json_kind(value: Any) -> str:
    """What kind of JSON value this is, for a message."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    name = names.get(type(value), "null")
    return f"empty {name}" if value in ([], {}, "") else name


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike) -> Iterator["safe_open"]:
    """Open a safetensors file for reading on the CPU; whatever keeps the block from reading it is an InputError."""
    from safetensors import SafetensorError, safe_open  # imports torch, which the scripts in data/ do without

    try:
        with reading(path), safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """The tensors of a safetensors file, by name, on the CPU, and its metadata."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def check_values(name: str, tensor: "Tensor", path: str | os.PathLike) -> None:
    """Reject a stored tensor of integers, or with values that are not finite."""
    if not tensor.is_floating_point():
        raise InputError(f"{path}: {name} holds {tensor.dtype}; floating-point values are needed")
    if not tensor.isfinite().all():
        raise InputError(f"{path}: {name} holds values that are not finite; the task that saved it has failed")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` when the block ends without an error.

    A reader sees the old file or the new one, never part of one. After an error the temporary file is removed.
    """
    path, partial = Path(path), _beside(path)
    partial.touch()
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)  # a writer may have replaced this file with one of its own
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """`atomic_file` for a folder: what the block writes replaces `path` once it is complete."""
    path, partial = Path(path), _beside(path)
    partial.mkdir()
    try:
        yield partial
        for written in [*partial.rglob("*"), partial]:
            sync(written)
        try:
            partial.rename(path)
        except OSError as error:  # not checked before: another process may write the same folder
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            retired = partial.with_suffix(".old")
            path.rename(retired)
            partial.rename(path)
            shutil.rmtree(retired)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _beside(path: str | os.PathLike) -> Path:
    """A new name in the folder of `path`, which is created if necessary; a leading dot marks what is incomplete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"


def sync(path: str | os.PathLike) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # some network file systems sync no folder
            raise
    finally:
        os.close(handle)


def digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file; above 1 GiB, of its size and its first and last 64 MiB."""
    with reading(path), open(path, "rb") as file:
        size = os.path.getsize(path)
        if size <= WHOLLY_DIGESTED:
            return hashlib.file_digest(file, "sha256").hexdigest()
        parts = hashlib.sha256(str(size).encode())
        parts.update(file.read(DIGESTED_END))
        file.seek(-DIGESTED_END, os.SEEK_END)
        parts.update(file.read(DIGESTED_END))
        return parts.hexdigest()


def check_writable(folder: str | os.PathLike) -> None:
    """Create `folder`, and raise InputError if no file can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None


def write_json(path: str | os.PathLike, content: Any, *, indent: int | None = 4, sort_keys: bool = False) -> None:
    """Write `content` as UTF-8 JSON, atomically."""
    with atomic_file(path) as partial:
        text = json.dumps(content, indent=indent, sort_keys=sort_keys, ensure_ascii=False)
        partial.write_text(text + "\n", encoding="utf-8")
