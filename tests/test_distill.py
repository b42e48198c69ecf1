"""One step of on-policy distillation with real, tiny models: the facts of the algorithm page, section 6."""

import dataclasses

import pytest
import torch
from distill_runs import config, save_teacher
from tiny_runs import CHANNELS

from qirl.distillation.schedule import order, teacher_of, turn_of
from qirl.distillation.sweep import Guide, cut_samples, node_weight, sweep
from qirl.distillation.trainer import lesson_of, prompts_by_task
from qirl.errors import UserError
from qirl.flow.rollout import DTYPES, mode_table
from qirl.kernels.flow_step import MODES, Noise, Step, flow_step, guide, mean_std
from qirl.kernels.philox import INITIAL, normal
from qirl.models.weights import load_model
from qirl.packing import Target, pack
from qirl.parallel.data import Ranks
from qirl.world import make_world

SDE = {"flow": {"sampler": "sde"}}
EDIT = {"task": "edit"}


@pytest.fixture(scope="module")
def other(tiny_model, tmp_path_factory):
    return save_teacher(tiny_model, tmp_path_factory.mktemp("other"), 1)


@pytest.fixture
def prepare(tiny_model, tmp_path):
    """prepare(teacher options, parts) -> (config, lesson of step 0, student): what a step starts from."""

    def one(options=None, *parts):
        own = config(tmp_path, tiny_model, {"t": {"path": str(tiny_model), **(options or {})}}, *parts)
        world = make_world(own.world)
        lesson = lesson_of(own, world.family, prompts_by_task(own, world), 0, Ranks())
        return own, lesson, load_model(tiny_model, DTYPES[own.model.dtype])

    return one


def run(own, lesson, student, teacher, budget=None, base=None, guidance=None):
    """The whole step: (stats per node, gradients by name)."""
    t = own.distill.teachers["t"]
    guide = Guide(teacher, guidance if guidance is not None else t.guidance, t.rescale)
    pairs = sum(map(len, lesson.nodes))
    packs = cut_samples(lesson, budget or own.distill.micro_tokens)
    stats = sum(sweep(student, guide, lesson.take(m), own.flow, own.distill, 1 / pairs, base) for m in packs)
    grads = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    return stats, grads


def assert_close(got, expected, limit):
    """Relative errors; a gradient that is nothing but rounding is measured against the largest one."""
    assert got.keys() == expected.keys() and got
    largest = max(g.norm() for g in expected.values())
    for name, value in expected.items():
        error = (got[name] - value).norm() / torch.maximum(value.norm(), 1e-4 * largest)
        assert error < limit, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(
    ("options", "parts"),
    [({}, {}), (EDIT, SDE), (EDIT, {"distill": {"nodes": 1}}), ({}, {"distill": {"micro_tokens": 75}})],
    ids=["t2i", "sde edit", "one node", "packs"],
)
def test_a_teacher_that_is_the_student_costs_exactly_nothing_at_any_node(prepare, dtype, parts, options):
    own, lesson, student = prepare(options, parts, {"model": {"dtype": dtype}})
    stats, grads = run(own, lesson, student, student)
    assert stats.shape == (4, 3) and not stats.any()
    assert grads and not any(g.any() for g in grads.values())


def oracle(own, lesson, student, teacher, base=None):
    """Section 6 over stored trajectories: one sample at a time in packs of its own, then one sum, one backward.

    Returns (summed loss, per node mean |v+ - v-|^2 of the teacher): gradients are left in the student.
    """
    t, flow, options = own.distill.teachers["t"], own.flow, own.distill
    pairs, total, spread = sum(map(len, lesson.nodes)), 0.0, torch.zeros(flow.steps, dtype=torch.float64)
    modes = mode_table(lesson.nodes, flow)
    for i, target in enumerate(lesson.targets):
        tokens = target.tokens
        row, token = torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens)
        stream = lesson.stream.rows(torch.tensor([i]))
        one = Target(0, target.height, target.width)
        body = pack([lesson.conditions[target.prompt]], [one])
        null = pack([lesson.negatives[target.prompt]], [one]) if lesson.negatives else None
        x = normal(stream, row, token, CHANNELS, 0, INITIAL).to(student.dtype)
        states = []
        for node in range(flow.steps):  # the trajectory first: no gradient, no teacher
            step = Step(*(lesson.grid[i : i + 1, k] for k in (node, node + 1, 1)), modes[node, i : i + 1], flow.level)
            states.append((x, step))
            with torch.no_grad():
                x, _ = flow_step(x, student(body, x, step.t), row, step, noise=Noise(stream, token, node))
        for node in lesson.nodes[i]:
            x, step = states[node]
            with torch.no_grad():
                u = positive = teacher(body, x, step.t)
                if null is not None:
                    negative = teacher(null, x, step.t)
                    u = guide(positive, negative, t.guidance, t.rescale)
                    spread[node] += ((positive - negative) ** 2).mean().double() / pairs
                v_base = base(body, x, step.t) if base else None
            v = student(body, x, step.t)
            loss = ((v - u) ** 2).mean() + (options.anchor * ((v - v_base) ** 2).mean() if base else 0)
            dt, noise = float(step.t - step.s), 1 - float(step.t if step.t < 1 else step.cap)
            weight = {"one": 1.0, "step": dt}.get(options.weight)
            if weight is None:  # the KL of two sde transitions, written out
                a, time = flow.level, float(step.t)
                weight = (1 + a * a / 2 * (time < 1)) ** 2 * dt * noise / (2 * a * a * time)
            total = total + weight * loss / pairs
    total.backward()
    grads = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    return total.detach(), spread, grads


@pytest.mark.parametrize("options", [{}, EDIT], ids=["t2i", "edit"])
def test_the_loss_of_a_guided_copy_is_the_guidance_gap(prepare, options):
    own, lesson, student = prepare({**options, "guidance": 4}, {"model": {"dtype": "float64"}})
    stats, _ = run(own, lesson, student, student)
    _, spread, _ = oracle(own, lesson, student, student)
    assert spread.min() > 0
    torch.testing.assert_close(stats[:, 1], (4 - 1) ** 2 * spread, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, {}),
        ({"guidance": 3, "rescale": True}, {"distill": {"nodes": 2, "weight": "step"}}),
        ({**EDIT, "guidance": 3}, {**SDE, "distill": {"weight": "sde"}}),
        (EDIT, {**SDE, "distill": {"nodes": 1, "anchor": 0.5}}),
        ({"guidance": 2}, {"distill": {"micro_tokens": 53, "anchor": 0.5}}),
    ],
    ids=["plain", "rescaled nodes", "sde edit", "anchored nodes", "packs"],
)
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float64", 1e-10)])
def test_backward_node_by_node_equals_that_of_the_summed_loss(prepare, tiny_model, other, options, parts, dtype, limit):
    """The limits are for products that are summed in another order: the loop runs every sample in a pack of its own."""
    own, lesson, student = prepare(options, {"model": {"dtype": dtype}}, parts)
    teacher = load_model(other, DTYPES[dtype])
    base = load_model(tiny_model, DTYPES[dtype]) if own.distill.anchor else None
    with torch.no_grad():
        for p in student.parameters():  # away from the base
            p.add_(0.02 * torch.ones_like(p))
    stats, got = run(own, lesson, student, teacher, base=base)
    total, _, expected = oracle(own, lesson, student, teacher, base)
    assert float(total) == pytest.approx(float(stats[:, 0].sum()), rel=limit)
    assert_close(got, expected, limit)


def test_gradients_do_not_depend_on_how_samples_are_cut(prepare, other):
    own, lesson, student = prepare({"guidance": 2}, {"model": {"dtype": "float64"}, "distill": {"nodes": 3}})
    teacher = load_model(other, torch.float64)
    assert [len(cut_samples(lesson, budget)) for budget in (24, 40, 60, 10_000)] == [6, 3, 2, 1]
    stats, expected = run(own, lesson, student, teacher)
    for budget in (24, 40, 60):
        own_stats, got = run(own, lesson, student, teacher, budget)
        torch.testing.assert_close(own_stats, stats, rtol=1e-10, atol=0)
        assert_close(got, expected, 1e-10)


def test_no_gradient_reaches_a_state_or_the_teacher(prepare, other):
    own, lesson, student = prepare({"guidance": 2}, {"distill": {"anchor": 0.1}})
    teacher, base = load_model(other), load_model(other)
    seen = []

    def watch(module, inputs):
        seen.append([x.requires_grad for x in inputs if isinstance(x, torch.Tensor)])

    student.register_forward_pre_hook(watch)
    _, grads = run(own, lesson, student, teacher, base=base)
    assert len(seen) == 1 + 4 and not any(sum(seen, []))  # the prefix, then a forward per node
    assert all(p.requires_grad and p.grad is None for model in (teacher, base) for p in model.parameters())
    assert any(g.any() for g in grads.values())


def test_memory_is_that_of_one_node(prepare, other):
    """Bytes that autograd holds at once, for 2 and for 8 nodes."""

    def most(steps: int) -> int:
        own, lesson, student = prepare({}, {"flow": {"steps": steps}})
        held = {"now": 0, "most": 0}

        class Kept:
            def __init__(self, tensor):
                self.tensor, self.size = tensor, tensor.nbytes
                held["now"] += self.size
                held["most"] = max(held.values())

            def __del__(self):
                held["now"] -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            run(own, lesson, student, load_model(other))
        assert held["now"] == 0
        return held["most"]

    assert most(8) == most(2) > 0


def test_the_sde_weight_is_the_kl_of_two_transitions(prepare):
    own, lesson, _ = prepare({}, {"model": {"dtype": "float64"}})
    lengths = tuple(t.tokens for t in lesson.targets)
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    x, v, other = torch.randn(3, sum(lengths), CHANNELS, dtype=torch.float64)
    for node in range(4):
        mode = torch.full((len(lengths),), MODES.index("sde"))
        step = Step(*(lesson.grid[:, k].double() for k in (node, node + 1, 1)), mode, 0.7)
        squared = ((v - other) ** 2).view(len(lengths), -1).mean(1)
        ode = dataclasses.replace(step, mode=torch.zeros_like(mode))  # states by ode are weighted alike
        weighted = node_weight("sde", ode) * squared
        means = [mean_std(x, own, row, step) for own in (v, other)]
        divergence = ((means[0][0] - means[1][0]) ** 2).view(len(lengths), -1).mean(1) / (2 * means[0][1] ** 2)
        torch.testing.assert_close(weighted, divergence, rtol=1e-12, atol=0)


def test_some_nodes_are_drawn_per_sample_towards_high_noise(tmp_path, tiny_model):
    own = config(tmp_path, tiny_model, {"t": tiny_model}, {"flow": {"steps": 8}, "distill": {"nodes": 1, "group": 200}})
    world = make_world(own.world)
    lesson = lesson_of(own, world.family, prompts_by_task(own, world), 0, Ranks())
    count = torch.bincount(torch.tensor(lesson.nodes).flatten(), minlength=8) / len(lesson.nodes)
    expected = lesson.grid[0, :8].double() ** 2
    assert {len(nodes) for nodes in lesson.nodes} == {1}
    assert (count - expected / expected.sum()).abs().max() < 4 * (0.25 / len(lesson.nodes)) ** 0.5  # 4 standard errors


def test_the_teacher_follows_from_the_step_alone():
    shares = {"a": 1, "b": 3, "c": 2}
    steps = [teacher_of(step, shares) for step in range(60)]
    assert {name: steps.count(name) for name in shares} == {"a": 10, "b": 30, "c": 20}
    assert all(steps[i] == teacher_of(i, dict(shares)) for i in reversed(range(60)))  # no state: any order, any time
    assert max(len(run) for run in "".join(steps).replace("a", " ").replace("c", " ").split()) <= 2  # spread evenly
    assert [teacher_of(step, {"x": 1, "y": 1}) for step in range(4)] == ["x", "y", "x", "y"]
    assert order({"only": 5}) == ["only"] * 5


def test_a_teacher_goes_through_its_prompts_without_gaps():
    """Prompts by the run's own step would show every second prompt only to a teacher that has every second step."""
    shares = {"a": 2, "b": 3}
    for name in shares:
        turns = [turn_of(step, shares) for step in range(50) if teacher_of(step, shares) == name]
        assert turns == list(range(len(turns)))


def test_noise_never_returns_and_prompts_are_those_of_the_task(tmp_path, tiny_model):
    teachers = {"t": tiny_model, "e": {"path": str(tiny_model), **EDIT}}
    own = config(tmp_path, tiny_model, teachers)
    world = make_world(own.world)
    prompts = prompts_by_task(own, world)
    ids = {task: {p.id for ps in sampler.by_category.values() for p in ps} for task, sampler in prompts.items()}
    seen = set()
    for step in range(6):
        lesson = lesson_of(own, world.family, prompts, step, Ranks())
        keys = list(zip(lesson.stream.prompt.tolist(), lesson.stream.sample.tolist(), strict=True))
        assert {prompt for prompt, _ in keys} <= ids["t2i" if step % 2 == 0 else "edit"]
        assert bool(lesson.conditions[0].references) == (step % 2 == 1)
        assert len(set(keys)) == 6 and not seen & set(keys)
        seen |= set(keys)


def test_a_budget_below_one_sample_is_refused_with_the_number(prepare):
    _, lesson, _ = prepare()
    with pytest.raises(UserError, match="smaller than one sample of (1[7-9]|2[01]) tokens"):
        cut_samples(lesson, 16)
