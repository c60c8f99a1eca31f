"""Rows of a batch in groups, and in order again."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from zimage_turbo.engine import rows

KEYS = st.lists(st.integers(0, 5), min_size=1, max_size=20)


@given(KEYS)
def test_groups_hold_each_row_once_and_what_is_alike_together(keys):
    groups = rows.alike(keys)
    assert sorted(number for numbers in groups for number in numbers) == list(range(len(keys)))
    assert all(list(numbers) == sorted(numbers) for numbers in groups)
    assert [{keys[number] for number in numbers} for numbers in groups] == [{key} for key in dict.fromkeys(keys)]


@given(KEYS, st.integers(1, 3))
def test_what_is_computed_in_groups_comes_back_in_order(keys, width):
    batch = torch.arange(len(keys) * width, dtype=torch.float32).view(len(keys), width)
    groups = rows.alike(keys)
    parts = [rows.take(batch, numbers) + keys[numbers[0]] for numbers in groups]
    assert torch.equal(rows.restored(parts, groups), batch + torch.tensor(keys)[:, None])


def test_all_rows_are_the_batch_itself():
    batch = torch.randn(3, 2)
    assert rows.take(batch, (0, 1, 2)) is batch and rows.restored([batch], [(0, 1, 2)]) is batch
    assert torch.equal(rows.take(batch, (2, 0, 0)), batch[[2, 0, 0]])
