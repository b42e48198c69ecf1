"""What a tensor parallel rank reads and holds of a model."""

import pytest
import torch

from qirl.models.weights import load_config, load_model, read_weights
from qirl.parallel.apply import sharding_of
from qirl.parallel.data import Ranks
from qirl.parallel.mesh import Axis


@pytest.fixture(scope="module", params=["QwenImage21Pipeline", "QwenImagePipeline"])
def folder(request, folders):
    return folders(request.param) / "transformer"


def shardings(folder):
    return [sharding_of(load_config(folder), Ranks(tp=Axis(rank, 2))) for rank in range(2)]


def test_two_ranks_hold_parts_that_make_up_the_file(folder):
    parts = [load_model(folder, torch.float32, sharding=sharding).state_dict() for sharding in shardings(folder)]
    place, cut, first = shardings(folder)[0].place, 0, 0
    for name, whole in read_weights(folder):
        if place(name).first:
            first += 1
            assert torch.equal(parts[0][name], whole) and name not in parts[1]
        elif place(name).dim is None:
            assert torch.equal(parts[0][name], whole) and torch.equal(parts[1][name], whole)
        else:
            cut += 1
            assert torch.equal(torch.cat([part[name] for part in parts], place(name).dim), whole)
    biased = any(name.endswith("to_q.bias") for name in parts[0])
    assert cut >= 14 and first == (8 if biased else 0)  # two blocks; of 1.x four row layers each have a bias


def test_a_rank_reads_its_part_of_a_weight_and_no_more(folder):
    whole = sum(value.numel() for _, value in read_weights(folder))
    read = [sum(value.numel() for _, value in read_weights(folder, sharding=s)) for s in shardings(folder)]
    held = [sum(p.numel() for p in load_model(folder, sharding=s).parameters()) for s in shardings(folder)]
    assert read == held and read[0] < 0.8 * whole
