"""Distillation on a GPU: `python -m pytest -m gpu`. Teachers arrive on a side stream while a step runs."""

import json

import pytest
import torch
from distill_runs import config, save_teacher
from tiny_runs import BFLOAT16

from qirl.distillation.teachers import Source, Teachers
from qirl.distillation.trainer import distill
from qirl.models.weights import load_model, read_weights
from qirl.parallel.data import Ranks, local

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def teachers(tmp_path, tiny_model):
    return {name: save_teacher(tiny_model, tmp_path / name, seed) for seed, name in enumerate("abc")}


def test_a_prefetched_teacher_is_whole_while_the_device_is_busy(teachers, tiny_model):
    bench = Teachers(
        {n: Source(p) for n, p in teachers.items()}, tiny_model, torch.float32, Ranks(device=torch.device("cuda"))
    )
    assert all(v.is_pinned() for host in bench.host.values() for v in host.values())
    busy = torch.randn(4096, 4096, device="cuda")
    for step in range(12):
        name, following = "abc"[step % 3], "abc"[(step + 1) % 3]
        bench.activate(name)
        bench.prefetch(following)
        for _ in range(5):
            busy = busy @ busy / 64
        found = {k: local(p).cpu() for k, p in bench.model.named_parameters()}
        assert all(torch.equal(found[key], value) for key, value in read_weights(teachers[name]))


def test_a_bfloat16_run_learns_from_two_teachers(tmp_path, teachers, tiny_model):
    which = {"a": {"path": str(teachers["a"]), "guidance": 3}, "b": {"path": str(teachers["b"]), "task": "edit"}}
    try:
        distill(config(tmp_path / "run", tiny_model, which, BFLOAT16, {"run": {"steps": 20}}), quiet=True)
    finally:
        torch.distributed.destroy_process_group()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss/a", "loss/b"):
        losses = [r[name] for r in records if name in r]
        assert losses[-1] < losses[0]
    assert load_model(tmp_path / "run" / "model")
