"""The plane: modules run unmodified on a grid of ranks, on tensors that know how their H and W are partitioned."""

from halovae.plane.plane import Plane
from halovae.plane.results import ShardReport
from halovae.plane.shard import shard
from halovae.plane.sharded import Sharded
from halovae.plane.tensor import PlaneTensor

__all__ = ["Plane", "PlaneTensor", "ShardReport", "Sharded", "shard"]
