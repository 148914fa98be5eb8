"""Token ids of texts, kept so that no text is tokenised twice in a process: epoch after epoch, task after task."""

import functools
import hashlib
from array import array
from collections.abc import Callable, Hashable


class KeptIds:
    """Ids of texts by the texts' digests, until a number of them is kept.

    Nothing is dropped for something newer: examples come round in like order, epoch after epoch and task after task,
    so that the oldest would go just before it is needed again.

    Args:
        most: ids to keep at most.
    """

    MOST = 32_000_000  # 128 MB: the examples of all 15 datasets, some 20 million ids, with room to spare

    def __init__(self, most: int = MOST):
        self._room = most
        self._ids: dict[bytes, array] = {}

    def look_up(self, texts: list[str], encode: Callable[[list[int]], list[list[int]]]) -> list[list[int]]:
        """The ids of each text; `encode` gives those of the texts at the indices that it gets, which are not kept."""
        keys = [hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest() for text in texts]
        found = [list(self._ids[key]) if key in self._ids else None for key in keys]
        missing = [index for index, ids in enumerate(found) if ids is None]
        for index, ids in zip(missing, encode(missing) if missing else []):
            found[index] = ids
            if keys[index] not in self._ids and len(ids) <= self._room:
                self._ids[keys[index]] = array("i", ids)
                self._room -= len(ids)
        return found


@functools.lru_cache(maxsize=1)
def shared_ids(rules: Hashable) -> KeptIds:
    """The ids kept in this process under `rules`, all that decides a text's ids; those of the latest rules alone."""
    return KeptIds()
