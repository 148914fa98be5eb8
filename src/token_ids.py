"""Ids of texts, kept so that no text is tokenised twice: for later tasks of a process, and in a file for later runs."""

import functools
import hashlib
import logging
from array import array
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from files import whole_file

logger = logging.getLogger("gorp")


class KeptIds:
    """Ids of texts by the texts' digests, until a number of them is kept.

    Nothing is dropped for something newer: rows come round in like order, epoch after epoch and task after task, so
    that the oldest would go just before it is needed again.

    Args:
        most: ids to keep at most.
        rules: names what decides a text's ids, for the file; None keeps them in this process only.
    """

    MOST = 32_000_000  # 128 MB: the rows of all 15 datasets, some 20 million ids, with room to spare

    def __init__(self, most: int = MOST, rules: str | None = None):
        self._room = most
        self._rules = rules
        self._ids: dict[bytes, array] = {}
        self._on_disk = 0

    def look_up(self, texts: list[str], encode: Callable[[list[int]], list[list[int]]]) -> list[list[int]]:
        """The ids of each text; `encode` gives those of the texts at the indices that it gets, which are not kept."""
        keys = [hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest() for text in texts]
        found = [list(self._ids[key]) if key in self._ids else None for key in keys]
        missing = [index for index, ids in enumerate(found) if ids is None]
        for index, ids in zip(missing, encode(missing) if missing else []):
            found[index] = ids
            self._keep(keys[index], array("i", ids))
        return found

    def read(self, folder: Path) -> None:
        """Add what earlier runs left in `folder` under the same rules; a damaged file is as none."""
        if self._rules is None or self._on_disk or not self._file(folder).exists():
            return
        try:
            saved = load_file(self._file(folder))
            keys, ids = saved["digests"].numpy(), saved["ids"].numpy()
            ends = list(accumulate(saved["lengths"].tolist()))
            if len(keys) != len(ends) or ends[-1:] != [len(ids)]:
                raise ValueError("its parts differ in length")
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            logger.warning("%s: not readable (%s), so rows are tokenised anew", self._file(folder), error)
            return
        for key, start, end in zip(keys, [0, *ends], ends):
            self._keep(key.tobytes(), array("i", ids[start:end].tobytes()))
        self._on_disk = len(self._ids)

    def write(self, folder: Path) -> None:
        """Leave what is kept in `folder` for later runs, if there is more than was read."""
        if self._rules is None or len(self._ids) == self._on_disk:
            return
        with whole_file(self._file(folder)) as partial:
            save_file({
                "digests": torch.frombuffer(bytearray(b"".join(self._ids)), dtype=torch.uint8).view(-1, 16),
                "lengths": torch.tensor([len(ids) for ids in self._ids.values()], dtype=torch.int32),
                "ids": torch.frombuffer(bytearray(b"".join(map(bytes, self._ids.values()))), dtype=torch.int32),
            }, partial)  # fmt: skip
        self._on_disk = len(self._ids)

    def _keep(self, key: bytes, ids: array) -> None:
        if key not in self._ids and len(ids) <= self._room:
            self._ids[key] = ids
            self._room -= len(ids)

    def _file(self, folder: Path) -> Path:
        return folder / f"{self._rules}.safetensors"


@functools.lru_cache(maxsize=1)
def shared_ids(rules: str) -> KeptIds:
    """The ids kept in this process under the latest rules; a run has one tokenizer."""
    return KeptIds(rules=rules)
