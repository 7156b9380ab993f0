"""Entries in groups of files: in their order, none too large, none smaller than need be."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from neoxconv.core.layout import Entry, in_groups
from neoxconv.core.tensor import in_memory
from neoxconv.quant import ENCODINGS


def entry_of(numbers: int) -> Entry:
    """An entry of 4 bytes for each number."""
    return Entry("name", "name", in_memory(np.zeros(numbers, np.float32)), ENCODINGS["F32"])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 60))
def test_groups_are_as_large_as_they_may_be(sizes: list[int], limit: int) -> None:
    entries = [entry_of(size) for size in sizes]
    groups = in_groups(entries, limit)
    assert [id(entry) for group in groups for entry in group] == [id(entry) for entry in entries]
    totals = [sum(entry.nbytes for entry in group) for group in groups]
    assert all(total <= limit or len(group) == 1 for total, group in zip(totals, groups, strict=True))
    followed = zip(totals[:-1], groups[1:], strict=True)
    assert all(total + later[0].nbytes > limit for total, later in followed)


def test_no_entries_are_one_empty_group() -> None:
    assert in_groups([], 10) == [[]]
