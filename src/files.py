"""Reading and writing the project's files: JSON that explains its faults, and writes that are whole or not there."""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Iterator

from errors import InputError


def read_json(path: str | os.PathLike) -> Any:
    """Parsed content of a UTF-8 JSON file.

    Raises:
        InputError: the file is missing, unreadable, not UTF-8 or not JSON (with line and column).
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None


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
        with open(name, "rb") as written:
            os.fsync(written.fileno())
        os.replace(name, path)
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
        if path.exists():
            retired = partial.with_suffix(".old")
            os.rename(path, retired)
            os.rename(partial, path)
            shutil.rmtree(retired)
        else:
            os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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
