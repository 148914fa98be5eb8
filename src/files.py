"""Reading and writing the project's files: readers that explain a fault, and writes that are complete or not there."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

from errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

WHOLLY_DIGESTED = 2**30  # bytes
DIGESTED_END = 2**26


def read_json(path: str | os.PathLike) -> Any:
    """Parsed content of a UTF-8 JSON file.

    Raises:
        InputError: the file is missing, unreadable, not UTF-8 or not JSON (with line and column), has a key twice in
            one object (JSON would silently drop the first), or text that UTF-8 cannot hold.
    """
    path = Path(path)

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{path}: key {twice!r} stands {names.count(twice)} times in one object; allowed: once")
        return content

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=distinct)
        if "\\ud" in text.lower():  # half a character, unless the other half follows
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    except UnicodeEncodeError as error:
        before = error.object[max(error.start - 20, 0) : error.start]
        raise InputError(
            f"{path}: found half of a surrogate pair, {error.object[error.start]!r}, after {before!r}; allowed: text "
            "that UTF-8 can hold"
        ) from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply; allowed: what the README describes") from None
    except ValueError as error:  # a path with a NUL, a number of thousands of digits
        raise InputError(f"{path}: cannot be read ({error})") from None


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """The tensors of a safetensors file, by name and on the CPU, and its metadata.

    Raises:
        InputError: the file is missing, unreadable or damaged.
    """
    from safetensors import SafetensorError, safe_open  # with torch, which the scripts in data/ do without

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None


def check_values(name: str, tensor: "Tensor", path: str | os.PathLike) -> None:
    """Reject a stored tensor from which nothing can be trained.

    Raises:
        InputError: integers, or values that are not finite.
    """
    if not tensor.is_floating_point():
        raise InputError(f"{path}: {name} holds {tensor.dtype}; floating-point values are needed")
    if not tensor.isfinite().all():
        raise InputError(f"{path}: {name} holds values that are not finite; the task that saved it has failed")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path`; leaving the block without an error syncs it and renames it to `path`.

    A reader therefore sees the old file or the new one, never half of one; after an error nothing remains.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())  # here, as a writer may have put another file in its place
        sync(name)
        os.replace(name, path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """The same for a folder: what the block writes appears at `path` at once, replacing what was there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    os.chmod(partial, 0o777 & ~_umask())
    try:
        yield partial
        for written in [*partial.rglob("*"), partial]:
            sync(written)
        try:
            os.rename(partial, path)
        except OSError as error:  # not asked before: another process may write the same folder at the same time
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            retired = partial.with_suffix(".old")
            os.rename(path, retired)
            os.rename(partial, path)
            shutil.rmtree(retired)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync(path: str | os.PathLike) -> None:
    """Have a file's content, or a folder's entries, on the disk before this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file; of a file above 1 GiB, of its size, its first and its last 64 MiB.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            if size <= WHOLLY_DIGESTED:
                return hashlib.file_digest(file, "sha256").hexdigest()
            parts = hashlib.sha256(str(size).encode())
            parts.update(file.read(DIGESTED_END))
            file.seek(-DIGESTED_END, os.SEEK_END)
            parts.update(file.read(DIGESTED_END))
            return parts.hexdigest()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def check_writable(folder: str | os.PathLike) -> None:
    """Create `folder` and prove that a file can be written there.

    Raises:
        InputError: naming the folder and the system's reason.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None


def write_json(path: str | os.PathLike, content: Any, *, indent: int | None = 4, sort_keys: bool = False) -> None:
    """Write `content` as UTF-8 JSON, whole or not at all."""
    with whole_file(path) as partial:
        text = json.dumps(content, indent=indent, sort_keys=sort_keys, ensure_ascii=False)
        partial.write_text(text + "\n", encoding="utf-8")


def _umask() -> int:
    """The process's file mode mask; reading it needs setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
