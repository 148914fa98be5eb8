"""Token ids of texts, kept so that a process tokenises no text twice: epoch after epoch, task after task."""

import functools
import hashlib
from array import array
from collections.abc import Callable, Hashable


class KeptIds:
    """The ids of texts, by a digest of the text, up to `most` ids in all.

    Nothing is evicted: examples recur in a similar order, so the oldest would go just before it is needed again.
    """

    MOST = 32_000_000  # 128 MB; all 15 datasets have some 20 million ids

    def __init__(self, most: int = MOST):
        self._room = most
        self._ids: dict[bytes, array] = {}
        self.cut: set[int] = set()  # the hashes of the texts whose ids are of a part only

    def look_up(self, texts: list[str], encode: Callable[[list[int]], list[list[int]]]) -> list[list[int]]:
        """The ids of each text; `encode` computes those of the texts at the given indices, which are not kept yet."""
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
    """The ids kept in this process under `rules`, which determine a text's ids; only the latest rules' are kept."""
    return KeptIds()
