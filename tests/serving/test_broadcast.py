"""Whether all ranks failed, or only one."""

import time
from collections.abc import Callable
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from halovae.distributed.ranks import Ranks
from halovae.distributed.transport import join_world
from halovae.serving import broadcast

BUSY = 3.0  # seconds


@patch.object(broadcast, "_AGREEMENT", timedelta(seconds=1))
def failed_together(alone: int | None) -> bool | None:
    """Return what a failed rank learns while the others are busy; None on the others."""
    join_world(torch.device("cpu"))
    mine, begin = broadcast.RankZeroBroadcast(), time.monotonic()
    if alone not in (None, dist.get_rank()):
        time.sleep(BUSY)
        return None
    answer = mine.failed_together()
    assert time.monotonic() - begin < BUSY
    return answer


@pytest.mark.parametrize("alone", [None, 0, 1])
def test_a_rank_that_failed_learns_whether_all_did(ranks: Callable[[int], Ranks], alone: int | None) -> None:
    expected = [True, True] if alone is None else [False if rank == alone else None for rank in range(2)]
    assert ranks(2).run(failed_together, alone) == expected
