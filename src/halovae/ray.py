"""For Ray Data: `ds.map_batches(halovae.ray.Encode, ...)`."""

from halovae.cluster.encode import Encode

__all__ = ["Encode"]
