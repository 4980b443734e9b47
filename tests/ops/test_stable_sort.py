"""The stable sort, where values tie."""

import torch

from gatewright.ops import stable_sort


def test_equal_values_keep_their_order():
    values = torch.randint(3, (4, 500))
    for descending in (False, True):
        in_order, order = stable_sort(values, descending=descending)
        for row, places in zip(values.tolist(), order.tolist(), strict=True):
            assert places == sorted(range(500), key=row.__getitem__, reverse=descending)
        assert torch.equal(in_order, values.gather(1, order))
