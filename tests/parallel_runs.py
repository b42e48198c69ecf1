"""What one of several gloo ranks does in the tests of parallelism, and returns."""

import torch

from qirl.config_parallel import Parallel
from qirl.parallel.data import start
from qirl.parallel.mesh import Axis, turned


def axes(rank: int) -> dict:
    ranks = start(device="cpu", parallel=Parallel(tp=2))
    other = turned(ranks.grid, ("tp", "dp"))
    assert Axis.of(other, "tp") == ranks.tp and Axis.of(ranks.grid, "pp") == Axis()
    return {
        "places": (ranks.rank, ranks.tp.rank),
        "first": ranks.first,
        "tp": int(ranks.tp.all_reduce(torch.tensor(rank))),
        "dp": int(ranks.data.all_reduce(torch.tensor(rank))),
        "turned": other.mesh.tolist(),
        "objects": ranks.tp.gather_objects(10 * ranks.rank + ranks.tp.rank),
    }
