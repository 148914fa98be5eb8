"""Which checkpoints within a task are whole: a process can be killed at any moment of writing one.

A checkpoint is many files, written one after another. The last is `whole.json`, which names the others with their
digests; a folder without it, or with a file that differs, is not one to go on from.
"""

import logging
import re
from pathlib import Path

from errors import InputError
from files import digest, read_json, sync, write_json

log = logging.getLogger("gorp")

WHOLE = "whole.json"


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, latest first, whole or not."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def mark_whole(folder: Path) -> None:
    """Have a checkpoint's files on the disk, then say that it is whole."""
    (folder / WHOLE).unlink(missing_ok=True)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        sync(path)
    write_json(folder / WHOLE, {str(path.relative_to(folder)): digest(path) for path in paths})


def is_whole(folder: Path) -> bool:
    """Whether every file is there as it was written."""
    try:
        return all(digest(folder / name) == wanted for name, wanted in read_json(folder / WHOLE).items())
    except (InputError, AttributeError):
        return False


def latest_whole(output_dir: Path) -> Path | None:
    """The latest checkpoint to go on from, None where there is none; says which later ones it leaves out."""
    for folder in checkpoint_folders(output_dir):
        if is_whole(folder):
            return folder
        log.warning("%s: not whole, left out", folder)
    return None
