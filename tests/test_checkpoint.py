import json
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from qirl.errors import UserError
from qirl.run import checkpoint

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8)


def state(seed: int = 0):
    """Odd shapes of every dtype, NaN, -0 and denormals among them."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (7 * 8,), generator=g, dtype=torch.uint8)
    raw = {str(d): noise[: 7 * d.itemsize].view(d) for d in DTYPES}
    raw["bool"] = torch.rand(3, generator=g) > 0.5
    weights = {
        "w": torch.nn.Parameter(torch.randn(5, 3, generator=g)),
        "view": torch.randn(6, 6, generator=g)[::2, ::3],
    }
    return {"model": weights, "raw": raw, "scalar": torch.tensor(float(seed)), "empty": torch.zeros(0, 3)}


def blank(tensors):
    return {k: torch.zeros_like(v, requires_grad=False) for k, v in checkpoint.flatten(tensors).items()}


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same(a, b):
    a, b = checkpoint.flatten(a), checkpoint.flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape and torch.equal(bits(a[name]), bits(b[name])), name


def test_a_checkpoint_gives_back_every_bit_and_the_extra(tmp_path):
    path = checkpoint.save(tmp_path, 12, state(), {"step": 12, "lr": 0.1 + 0.2, "order": [3, 1, 2]})
    assert path == tmp_path / "step_000012" == checkpoint.latest(tmp_path)
    loaded = blank(state())
    assert checkpoint.load(path, loaded) == {"step": 12, "lr": 0.1 + 0.2, "order": [3, 1, 2]}
    assert_same(loaded, state())
    assert checkpoint.describe(path)["tensors"]["model/w"] == {"dtype": "torch.float32", "shape": [5, 3]}


def test_part_of_a_checkpoint_can_be_loaded(tmp_path):
    path = checkpoint.save(tmp_path, 1, state())
    part = {"model": {"w": torch.zeros(5, 3)}}
    checkpoint.load(path, part)
    assert_same(part, {"model": {"w": state()["model"]["w"]}})


def test_old_checkpoints_and_unfinished_ones_are_removed(tmp_path):
    (tmp_path / "step_000099.tmp").mkdir(parents=True)
    assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "nothing") is None
    for step in (1, 2, 10, 11):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step_000010", "step_000011"]
    checkpoint.save(tmp_path, 12, state(), keep=0)
    assert len(os.listdir(tmp_path)) == 3


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, 3, state(0), {"try": 1})
    checkpoint.save(tmp_path, 3, state(1), {"try": 2})
    loaded = blank(state())
    assert checkpoint.load(checkpoint.latest(tmp_path), loaded) == {"try": 2}
    assert_same(loaded, state(1))
    assert os.listdir(tmp_path) == ["step_000003"]


def test_a_checkpoint_set_aside_counts_until_its_successor_stands(tmp_path):
    checkpoint.save(tmp_path, 3, state(0))
    os.rename(tmp_path / "step_000003", tmp_path / "step_000003.old")
    assert checkpoint.latest(tmp_path).name == "step_000003.old"
    checkpoint.save(tmp_path, 3, state(1))
    assert os.listdir(tmp_path) == ["step_000003"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def alter(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


FILES = ("__0_0.distcp", ".metadata", "extra.json", "manifest.json")


# The manifest has no checksum of its own, so one flipped bit in it is not among these.
@pytest.mark.parametrize(
    "damage, name",
    [(damage, name) for damage in (os.unlink, truncate) for name in FILES] + [(alter, name) for name in FILES[:-1]],
)
def test_a_damaged_file_is_named_and_nothing_is_loaded(tmp_path, name, damage):
    checkpoint.save(tmp_path, 4, state())
    path = checkpoint.save(tmp_path, 5, state())
    damage(path / name)
    loaded = blank(state())
    with pytest.raises(UserError) as error:
        checkpoint.load(path, loaded)
    message = str(error.value)
    assert name in message and str(path) in message and "resume from step_000004" in message and "\n" not in message
    assert not any(bits(tensor).any() for tensor in loaded.values())


def test_the_fix_does_not_name_a_checkpoint_that_is_not_there(tmp_path):
    path = checkpoint.save(tmp_path, 5, state())
    (path / "extra.json").unlink()
    with pytest.raises(UserError, match="delete that folder to start the run again"):
        checkpoint.load(path, {})


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"model": {"w": torch.zeros(5, 4)}}, r"'model/w' has shape \[5, 3\], the model needs \[5, 4\]"),
        ({"model": {"new": torch.zeros(5)}}, "no tensor is called 'model/new'"),
        (
            {"scalar": torch.zeros((), dtype=torch.bfloat16)},
            "'scalar' is torch.float32, the model needs torch.bfloat16",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, tensors, words):
    path = checkpoint.save(tmp_path, 5, state())
    with pytest.raises(UserError, match=words):
        checkpoint.load(path, tensors)


def test_an_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        checkpoint.save(tmp_path / "file", 1, state())


def test_what_keeps_a_checkpoint_from_being_written_is_told_in_a_line(tmp_path):
    """A limit on the size of files stands in for a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"free disk space .*\(.*File too large.*\)$") as told:
            checkpoint.save(tmp_path, 1, {"large": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "Traceback" not in str(told.value)


def build(seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.GELU(), torch.nn.Linear(10, 5), torch.nn.Linear(5, 3))
    model[3].weight.requires_grad_(False)
    return model


def train(model, optimizer, steps):
    for step in steps:
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def whole(model, optimizer, names):
    """Everything that training goes on from."""
    return {"model": dict(model.state_dict()), "adam": checkpoint.adam_tensors(optimizer, names)}


def resume_is_exact(folder):
    def start(seed):
        model = build(seed)
        if dist.is_initialized():
            from torch.distributed.fsdp import fully_shard

            for layer in (model[0], model[2], model):
                fully_shard(layer)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
        return model, optimizer, {p: n for n, p in model.named_parameters()}

    straight = start(0)
    train(*straight[:2], range(3))
    path = checkpoint.save(folder, 3, whole(*straight), {"step": 3})
    train(*straight[:2], range(3, 6))
    resumed = start(1)
    assert checkpoint.load(path, whole(*resumed)) == {"step": 3}
    train(*resumed[:2], range(3, 6))
    a, b = checkpoint.flatten(whole(*straight)), checkpoint.flatten(whole(*resumed))
    local = [{k: getattr(v, "_local_tensor", v) for k, v in x.items()} for x in (a, b)]
    assert_same(*local)


def test_training_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    resume_is_exact(tmp_path)


def two_ranks(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    resume_is_exact(Path(folder, "sharded"))
    mine = {f"rank{rank}/rng": torch.full((4,), rank)}
    path = checkpoint.save(Path(folder, "own"), 1, mine)
    loaded = blank(mine)
    checkpoint.load(path, loaded)
    assert_same(loaded, mine)
    if rank == 1:
        truncate(path / "__1_0.distcp")
    dist.barrier()
    with pytest.raises(UserError, match="__1_0.distcp has"):
        checkpoint.load(path, loaded)  # damaged where only one rank looks: both must stop
    dist.barrier()
    dist.destroy_process_group()


def test_sharded_training_resumes_exactly_and_its_checkpoint_loads_in_one_process(tmp_path):
    torch.multiprocessing.spawn(two_ranks, (str(tmp_path),), nprocs=2)
    path = checkpoint.latest(tmp_path / "sharded")
    model, reference = build(1), build(0)
    checkpoint.load(path, {"model": dict(model.state_dict())})
    trained = [p for p in reference.parameters() if p.requires_grad]
    train(reference, torch.optim.AdamW(trained, 1e-2, weight_decay=0.1), range(3))
    for name, value in reference.state_dict().items():
        # both ranks saw the same batch; only the order of adding two equal gradients differs
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def content(step):
    return {"a": torch.full((200_000,), step), "b": {"c": torch.full((3,), step / 3, dtype=torch.float64)}}


def save_for_ever(folder, first):
    torch.set_num_threads(1)
    step = first
    while True:
        checkpoint.save(folder, step, content(step), {"step": step}, keep=1 + step % 2)
        step += step % 3 > 0 or random.random() < 0.5  # some steps are saved twice


def test_a_process_killed_while_it_writes_leaves_a_checkpoint_that_loads(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "qirl.run.checkpoint"])
    rng = random.Random(0)
    unfinished, step = 0, 1
    for _ in range(25):
        before = checkpoint.latest(tmp_path)
        process = context.Process(target=save_for_ever, args=(tmp_path, step))
        process.start()
        deadline = time.time() + 30
        while checkpoint.latest(tmp_path) == before and time.time() < deadline:  # until it writes
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.15))
        process.kill()
        process.join()
        unfinished += any(path.name.endswith(".tmp") for path in tmp_path.iterdir())
        path = checkpoint.latest(tmp_path)
        loaded = blank(content(0))
        step = checkpoint.load(path, loaded)["step"]
        assert path.name.startswith(f"step_{step:06d}")
        assert_same(loaded, content(step))
    assert unfinished > 0, "no kill hit a write; the test proves nothing"


def test_the_manifest_lists_every_file(tmp_path):
    path = checkpoint.save(tmp_path, 1, state())
    listed = set(json.loads((path / "manifest.json").read_text())["files"])
    assert listed | {"manifest.json"} == set(os.listdir(path))


def test_an_interrupt_that_spoils_torchs_archive_stays_an_interrupt(tmp_path):
    """Ctrl-C inside torch's writer: closing the archive then fails as well, and that is what torch reports."""

    def save(state, checkpoint_id, no_dist):
        try:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904
        except RuntimeError as error:
            raise CheckpointException("write", {0: _wrap_exception(error)}) from None

    with pytest.raises(KeyboardInterrupt):
        checkpoint._dcp(save, {}, tmp_path)
