"""Work cut into batches: what is finished is kept, and equal however it was interrupted."""

import pytest
import torch
from accelerate import Accelerator

from engine.parallel import map_batches


class Killed(Exception):
    pass


def test_killed_work_goes_on_where_it_stopped(tmp_path):
    accelerator, keep = Accelerator(cpu=True), tmp_path / "partial"
    computed = []

    def square(indices, dies_at=None):
        if dies_at in indices:
            raise Killed
        computed.append(indices)
        return torch.tensor(indices).double() ** 2

    with pytest.raises(Killed):
        map_batches(lambda indices: square(indices, dies_at=7), 11, 3, accelerator, "squares", keep)
    values = map_batches(square, 11, 3, accelerator, "squares", keep)
    assert computed == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    assert torch.equal(values, torch.arange(11).double() ** 2)
    assert not keep.exists()
