"""Factors that matrices with the same inputs share: queries, keys and values; gate and up."""

from __future__ import annotations

from threading import Lock
from weakref import WeakValueDictionary

from neoxconv.core.encoding import Moments
from neoxconv.quant.feedback.encode import Factors, factors_of

_Key = tuple[str, int]  # the moments' digest and columns: the columns too, as a file may lie about the digest


class _Shared:
    """The factors that are in use, and those made last until others are asked for.

    So there are never more of them than workers that use them. Any thread may ask.
    """

    def __init__(self) -> None:
        self.used: WeakValueDictionary[_Key, Factors] = WeakValueDictionary()
        self.last: Factors | None = None
        self.lock, self.making = Lock(), dict[_Key, Lock]()

    def of(self, moments: Moments, name: str) -> Factors:
        """The factors of moments; of several threads that need the same one makes them. Raises as `factors_of` does."""
        key = moments.digest, moments.columns
        with self.lock:
            making = self.making.setdefault(key, Lock())
        with making:
            found = self.used.get(key)
            if found is None:
                self.last = None
                found = self.used[key] = factors_of(moments, name)
            self.last = found
            return found

    def forget(self) -> None:
        """Let go of what nobody uses."""
        self.last = None
        with self.lock:
            self.making.clear()


SHARED = _Shared()
