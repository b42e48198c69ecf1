"""AdamW that decides on the device against the loop that reads each norm, and against apex's; sharded, skipped, continued."""

import math
import sys
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from qirl.config_sections import Optimizer as Options
from qirl.errors import UserError
from qirl.models.lora import LoraLinear
from qirl.optim import Optimizer, check, total_norm
from qirl.policy.weights import Weights, blend_unless
from qirl.run import checkpoint

# a large epsilon: AdamW then does not blow up the rounding of gradients near zero into whole steps
OPTIONS = Options(lr=1e-2, weight_decay=0.1, eps=1e-3, warmup=2, clip=0.5, decay="cosine")
STEPS = 8
CLOSE = dict(rtol=1e-6, atol=1e-7)

try:
    from apex.optimizers import FusedAdam

    APEX = torch.cuda.is_available()
except ImportError:
    APEX = False


class Net(torch.nn.Module):
    """Two layers that learn, one with an adapter over a frozen base between them, and one that never gets a gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.unused = (torch.nn.Linear(*size) for size in ((6, 9), (5, 3), (3, 3)))
        self.adapted = LoraLinear(torch.nn.Linear(9, 5).requires_grad_(False), rank=2, scale=2.0)
        torch.nn.init.normal_(self.adapted.lora_B["default"].weight)

    def forward(self, x):
        return self.last(self.adapted(self.first(x)))


def build(device="cpu", dtype=torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(device, dtype)


def go(model, optimizer, steps=range(STEPS), bad=(), weights=None) -> list[float]:
    """Norms of the steps; in those of `bad` one gradient is not a number. Every other step is clipped."""
    norms = []
    for step in steps:
        p = next(model.parameters())
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(p.device, p.dtype)
        (model(x).square().sum() * (10 if step % 2 else 1e-3)).backward()
        if step in bad:
            p.grad = p.grad * math.nan
        norms.append(optimizer.step(step))
        if weights:
            weights.blend("ema", 0.7, stay=norms[-1].isfinite().logical_not())
    return [float(norm) for norm in norms]


def state_of(model, optimizer) -> dict[str, torch.Tensor]:
    return checkpoint.flatten({"model": dict(model.named_parameters()), "adam": optimizer.tensors()})


def kept(model, optimizer) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in state_of(model, optimizer).items()}


@pytest.mark.parametrize("bad", [(), (0, 3, 4)])
def test_deciding_on_the_device_gives_the_numbers_of_reading_every_norm(bad):
    found = []
    for fused in (False, True):
        model = build()
        optimizer = Optimizer(model, OPTIONS, STEPS, fused=fused)
        weights = Weights(model, lora=False)
        weights.keep("ema")
        norms = go(model, optimizer, bad=bad, weights=weights)
        found.append((norms, state_of(model, optimizer) | weights.copies["ema"]))
    finite = [norm for norm in norms if math.isfinite(norm)]
    assert min(finite) < OPTIONS.clip < max(finite) and len(finite) == STEPS - len(bad)
    torch.testing.assert_close(found[1], found[0], **CLOSE, equal_nan=True)
    steps = {name: float(t) for name, t in found[1][1].items() if name.endswith("/step")}
    assert set(steps.values()) == {STEPS - len(bad), 0.0}  # the layer without gradients counts none


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_that_is_not_finite_changes_no_bit(fused):
    model = build()
    optimizer, weights = Optimizer(model, OPTIONS, STEPS, fused=fused), Weights(model, lora=False)
    go(model, optimizer, range(3))
    before = kept(model, optimizer)
    for bad in (math.nan, math.inf, -math.inf):
        model.first.weight.grad = torch.full_like(model.first.weight, bad)
        assert not optimizer.step(3).isfinite()
        assert all(p.grad is None for p in weights.current.values())
        assert all(torch.equal(v, before[k]) for k, v in state_of(model, optimizer).items())


def test_an_average_that_stays_is_left_as_it_is_whatever_the_weights_are():
    torch.manual_seed(0)
    copies, weights = ([torch.randn(7), torch.randn(3, 4), torch.randn(0)] for _ in range(2))
    expected = [c.lerp(w, 1 - 0.7) for c, w in zip(copies, weights, strict=True)]
    before = [c.clone() for c in copies]
    blend_unless(torch.tensor(True), copies, [w / 0 for w in weights], 0.7)
    assert all(map(torch.equal, copies, before))
    blend_unless(torch.tensor(False), copies, weights, 0.7)
    torch.testing.assert_close(copies, expected, **CLOSE)


def test_the_cpu_keeps_to_the_loop_and_8_bits_to_torchao():
    assert not Optimizer(build(), OPTIONS, STEPS).fused
    for impl in ("auto", "torch"):
        assert type(Optimizer(build(), Options(impl=impl), STEPS).adam) is torch.optim.AdamW
    pytest.importorskip("torchao")
    assert not Optimizer(build(), Options(kind="adamw_8bit"), STEPS, fused=True).fused


# several ranks


def two_ranks(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    norms_are_those_of_all_ranks(mesh)
    for fused in (False, True):
        model = sharded(mesh)
        optimizer = Optimizer(model, OPTIONS, STEPS, fused=fused)
        weights = Weights(model, lora=False)
        weights.keep("ema")
        norms = go(model, optimizer, range(4), bad=(1,), weights=weights)
        whole = {k: v.full_tensor() for k, v in weights.current.items()}
        average = {k: v.full_tensor() for k, v in weights.copies["ema"].items()}
        if rank == 0:
            torch.save((norms, whole, average), f"{folder}/{fused}.pt")
        checkpoint.save(f"{folder}/checkpoints", 1 + fused, state_of(model, optimizer))
        other = sharded(mesh)  # what one implementation saved, the other goes on from
        changed = Optimizer(other, OPTIONS, STEPS, fused=not fused)
        checkpoint.load(f"{folder}/checkpoints/step_00000{1 + fused}", state_of(other, changed))
        for one, own in ((model, optimizer), (other, changed)):
            go(one, own, range(4, STEPS))
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a.to_local(), b.to_local(), **CLOSE)
    dist.destroy_process_group()


def sharded(mesh):
    model = build()
    for layer in (model.first, model.last):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def norms_are_those_of_all_ranks(mesh):
    torch.manual_seed(1)
    parts = [torch.randn(5, 3), torch.randn(1, 4), torch.randn(7), torch.randn(2)]
    placed = [distribute_tensor(t, mesh, [p]) for t, p in zip(parts, (Shard(0), Shard(0), Replicate()), strict=False)]
    expected = torch.cat([t.flatten() for t in parts]).double().norm()
    torch.testing.assert_close(total_norm([*placed, parts[3]]), expected, rtol=1e-6, atol=0)


def test_sharded_weights_step_skip_and_continue_under_the_other_implementation(tmp_path):
    torch.multiprocessing.spawn(two_ranks, (str(tmp_path),), nprocs=2)
    model = build()
    weights = Weights(model, lora=False)
    weights.keep("ema")
    norms = go(model, Optimizer(model, OPTIONS, STEPS), range(4), bad=(1,), weights=weights)
    for fused in (False, True):
        found, whole, average = torch.load(tmp_path / f"{fused}.pt")
        torch.testing.assert_close(found, norms, rtol=1e-5, atol=0, equal_nan=True)  # both ranks have the same batch
        for name, p in weights.current.items():
            torch.testing.assert_close(whole[name], p.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(average[name], weights.copies["ema"][name], rtol=1e-5, atol=1e-6)


# apex


class Lookalike(torch.optim.Optimizer):
    """Keeps its state where apex's FusedAdam does, for machines without apex: moments by parameter, one count a group.

    The real one is compared in `test_apex_steps_as_torch_does` wherever it is installed.
    """

    def __init__(self, params, lr, bias_correction, betas, eps, adam_w_mode, weight_decay, set_grad_none):
        assert bias_correction and adam_w_mode and set_grad_none
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (a, b), count = group["betas"], group["step"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p] |= {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                first, second = (self.state[p][name] for name in ("exp_avg", "exp_avg_sq"))
                first.mul_(a).add_(p.grad, alpha=1 - a)
                second.mul_(b).addcmul_(p.grad, p.grad, value=1 - b)
                change = first / (1 - a**count) / ((second / (1 - b**count)).sqrt() + group["eps"])
                p.sub_(group["lr"] * (change + group["weight_decay"] * p))


@pytest.fixture
def apex(monkeypatch):
    """The device on which FusedAdam runs here: the real one on a GPU, else the look-alike on the CPU."""
    if APEX:
        return "cuda"
    module = ModuleType("apex.optimizers")
    module.FusedAdam = Lookalike
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    return "cpu"


APEXS = OPTIONS.model_copy(update={"impl": "apex"})


@pytest.mark.parametrize("before, after", [(OPTIONS, APEXS), (APEXS, OPTIONS), (APEXS, APEXS)])
def test_a_run_goes_on_with_the_other_implementation(apex, tmp_path, before, after):
    straight = build(apex)
    go(straight, Optimizer(straight, OPTIONS, STEPS), bad=(2,))
    model = build(apex)
    optimizer = Optimizer(model, before, STEPS)
    go(model, optimizer, range(5), bad=(2,))
    path = checkpoint.save(tmp_path, 5, state_of(model, optimizer))
    again = build(apex)
    optimizer = Optimizer(again, after, STEPS)
    checkpoint.load(path, state_of(again, optimizer))
    go(again, optimizer, range(5, STEPS))
    for a, b in zip(straight.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    steps = {float(parts["step"]) for parts in optimizer.tensors().values()}
    assert steps == {STEPS - 1.0, 0.0}


def test_apex_takes_float32_alone(apex):
    with pytest.raises(UserError, match="apex steps float32 weights, not torch.float64; use model.dtype=float32"):
        Optimizer(build(apex, torch.float64), APEXS, STEPS)


def test_apex_is_refused_where_it_cannot_run():
    check(OPTIONS, torch.device("cpu"))
    with pytest.raises(UserError, match="runs on a GPU alone; use optimizer.impl=torch"):
        check(APEXS, torch.device("cpu"))
    if not APEX:
        with pytest.raises(UserError, match="needs NVIDIA's apex, built from source .* or use optimizer.impl=torch"):
            check(APEXS, torch.device("cuda"))


# what only a GPU can show


@pytest.mark.gpu
@pytest.mark.skipif(not APEX, reason="no apex, or no CUDA device")
def test_apex_steps_as_torch_does():
    found = []
    for options in (OPTIONS, APEXS):
        model = build("cuda")
        optimizer = Optimizer(model, options, STEPS)
        go(model, optimizer, bad=(3,))
        found.append(state_of(model, optimizer))
    assert isinstance(optimizer.adam.fused, FusedAdam)
    for name, expected in found[0].items():
        got = found[1][name].to(expected.device)
        assert (got - expected).norm() <= 1e-6 * expected.norm(), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_updates_on_a_gpu_equal_those_of_the_cpu_and_never_wait():
    found = []
    for device in ("cpu", "cuda"):
        model = build(device)
        optimizer, weights = Optimizer(model, OPTIONS, STEPS), Weights(model, lora=False)
        weights.keep("ema")
        assert optimizer.fused == (device == "cuda")
        go(model, optimizer, bad=(3,), weights=weights)
        state = state_of(model, optimizer) | weights.copies["ema"]
        found.append({name: t.detach().cpu().clone() for name, t in state.items()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    for p in weights.current.values():
        p.grad = torch.ones_like(p)
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = optimizer.step(0)
        weights.blend("ema", 0.7, stay=norm.isfinite().logical_not())
    finally:
        torch.cuda.set_sync_debug_mode("default")
