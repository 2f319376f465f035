"""Work cut into batches: what is finished is kept, and equal however it was interrupted."""

import pytest
import torch
from accelerate import Accelerator

from slimstep.engine import parallel
from slimstep.engine.parallel import map_batches


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


@pytest.mark.parametrize("world", [2, 3, 5])
def test_what_lies_with_many_ranks_is_gathered_in_index_order(world, monkeypatch):
    batches = list(torch.arange(11).split(3))
    values = torch.arange(11 * 2).view(11, 2)
    of_ranks = [[values[indices] for indices in batches[rank::world]] for rank in range(world)]
    rounds = iter(range(len(batches)))

    def all_gather(into, mine, group):
        number = next(rounds)
        into[:] = [own[number] if number < len(own) else None for own in of_ranks]
        assert mine is into[1]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather)
    monkeypatch.setattr(parallel, "sleeping_ranks", lambda: None)
    assert torch.equal(parallel.gathered(list(of_ranks[1]), batches, world), values)
