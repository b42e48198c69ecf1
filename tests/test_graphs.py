"""Calls that are replayed: padding that nothing sees, the same results and gradients as the model's own, and when."""

import warnings

import pytest
import tiny_runs
import torch
from dense_varlen import DenseVarlen

from qirl.config_sections import Flow
from qirl.errors import UserError
from qirl.flow.rollout import rollout
from qirl.kernels import philox
from qirl.models import graphs
from qirl.models.attention_backends import BACKENDS
from qirl.models.graphs import Graphed, check_graphs, facts
from qirl.models.lora import adapter_off, add_lora
from qirl.models.qwen_image import QwenImage, QwenImageConfig
from qirl.models.qwen_image_21 import QwenImage21
from qirl.packing import Condition, Target, pack
from qirl.policy.packs import Pair, Prefix, lay_out

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TARGETS = [Target(0, 2, 3), Target(0, 2, 3), Target(1, 3, 3)]


def shared_model(lora=False, device="cpu"):
    torch.manual_seed(0)
    model = QwenImage21(tiny_runs.architecture())
    return equipped(model, lora, device)


def joint_model(lora=False, device="cpu"):
    torch.manual_seed(0)
    config = QwenImageConfig(
        in_channels=tiny_runs.CHANNELS, out_channels=tiny_runs.CHANNELS // 4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=tiny_runs.TEXT_DIM, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return equipped(QwenImage(config), lora, device)


def equipped(model, lora, device):
    for block in model.transformer_blocks:
        block.attn.backend = DenseVarlen() if device == "cpu" else None
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    if lora:
        add_lora(model, 2, 2.0, ("to_q", "to_k", "to_v"))
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p)
    return model.to(device)


MODELS = {"2.1": (shared_model, True), "1.x": (joint_model, False)}


class Rerun:
    """A recorder for a CPU: what is captured runs again, on the same static tensors."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, run):
        self.captured += 1
        run()

        def replay():
            self.replayed += 1
            run()

        return replay


def graphed(model, device):
    return Graphed(model, Rerun if device == "cpu" else None)


def conditions(shared, lengths, seed=0, references=False):
    generator = torch.Generator().manual_seed(seed)
    gauss = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    found = []
    for n in lengths:
        images = (gauss(4, tiny_runs.CHANNELS),) if references else ()
        layout = (("text", n), ("image", 2, 2)) if references else ()
        found.append(Condition(gauss(n, tiny_runs.TEXT_DIM), images, layout, shared))
    return found


def inputs(body, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(body.target_tokens, tiny_runs.CHANNELS, generator=generator)
    return x.to(device), torch.rand(len(body.lengths), generator=generator).to(device)


def results(model, call):
    """What the call gives, and the gradients of the parameters that it leaves."""
    model.zero_grad(set_to_none=True)
    outs = call()
    return [x.detach().clone() for x in outs], [p.grad.clone() for p in model.parameters() if p.grad is not None]


def close(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("references", [False, True], ids=["text", "a reference"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing(name, references):
    make, shared = MODELS[name]
    model, own = make(), conditions(shared, (3, 5), references=references)

    def run(pad):
        body = pack(own, TARGETS, pad=pad)
        v = model(body, *inputs(body, 1))
        v.square().sum().backward()
        return [v]

    plain, padded = (results(model, lambda pad=pad: run(pad)) for pad in (1, 16))
    close(padded, plain)
    tokens = [pack(own, TARGETS, pad=pad).tokens for pad in (1, 16)]
    text = [t - sum(t.tokens for t in TARGETS) - (0 if shared else references * 12) for t in tokens]
    assert text[1] % 16 == 0 and text[1] > text[0]
    full = pack(conditions(shared, (10, 6)), [Target(0, 2, 3), Target(1, 2, 3)], pad=16)
    assert full.tokens == 32 + 12  # a whole multiple is padded too: packs of one shape have as many sequences


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_replayed_calls_give_the_models_own_results_and_gradients(name, lora, device):
    """Prompts of other lengths in every round, which share graphs; the first round is not captured."""
    make, shared = MODELS[name]
    model = make(lora, device)
    runner = graphed(model, device)

    def run(call, texts, seed):
        body = pack(conditions(shared, texts, seed), TARGETS, device=device, pad=runner.pad)
        v = call(body, *inputs(body, seed, device))
        v.square().sum().backward()
        v = call(body, *inputs(body, seed + 1, device))  # gradients add up
        v.square().sum().backward()
        return [v]

    for seed, texts in enumerate([(3, 5), (4, 2), (1, 7)]):
        mine = results(model, lambda texts=texts, seed=seed: run(runner, texts, seed))
        close(mine, results(model, lambda texts=texts, seed=seed: run(model, texts, seed)))
    if device == "cpu":
        assert (runner.passing.captured, runner.passing.replayed) == (
            2,
            10,
        )  # forward and backward, five calls after one


@pytest.mark.parametrize("device", DEVICES)
def test_the_seam_of_an_update_is_replayed_prefix_and_all(device):
    model = shared_model(True, device)
    runner = graphed(model, device)

    def run(call, seed):
        own = conditions(True, (3 + seed, 6), seed)
        pairs = [Pair(i, 0, i // 3, 2, 3) for i in range(6)]
        layouts = lay_out(own, pairs, 6, lambda s, n: (s, n), pad=runner.pad)
        assert len(layouts) == 2 and layouts[0].seam
        for layout in layouts:
            prefix, outs = Prefix(call, layout, device), []
            for members in layout.packs:
                body = layout.body(members, device)
                outs.append(call(body, *inputs(body, seed, device), prefix.leaves))
                outs[-1].square().sum().backward()
            prefix.backward()
        return outs

    for seed in range(3):
        close(results(model, lambda seed=seed: run(runner, seed)), results(model, lambda seed=seed: run(model, seed)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_a_rollout_by_graphs_draws_the_same_images(name, device):
    make, shared = MODELS[name]
    model = make(device=device).eval()
    runner = graphed(model, device)
    draws = philox.stream(0, [0, 0, 1], [0, 1, 0], 0, device)
    for seed in range(2):
        own, null = conditions(shared, (3, 5 + seed), seed), conditions(shared, (1,))[0]
        mine, plain = (
            rollout(m, own, TARGETS, draws, Flow(steps=4, guidance=2.0), negatives=[null, null]).x0
            for m in (runner, model)
        )
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)


def test_adapters_that_are_switched_off_have_graphs_of_their_own():
    model = shared_model(lora=True)
    runner = graphed(model, "cpu")
    body = pack(conditions(True, (3, 5)), TARGETS, pad=runner.pad)
    for _ in range(3):
        with torch.no_grad(), adapter_off(model):
            off = runner(body, *inputs(body, 0)), model(body, *inputs(body, 0))
        with torch.no_grad():
            on = runner(body, *inputs(body, 0)), model(body, *inputs(body, 0))
        assert torch.equal(*off) and torch.equal(*on) and not torch.equal(off[0], on[0])
    assert len(runner.calls) == 2


def test_results_are_the_callers_own_and_a_later_backward_is_refused():
    model = shared_model()
    runner = graphed(model, "cpu")
    body = pack(conditions(True, (3, 5)), TARGETS, pad=runner.pad)
    (x, t), (other, _) = inputs(body, 0), inputs(body, 1)
    runner(body, x, t)
    first = runner(body, x, t)
    kept = first.detach().clone()
    runner(body, other, t)
    assert torch.equal(first, kept)
    with pytest.raises(AssertionError, match="replayed again before its backward"):
        first.sum().backward()
    last = runner(body, x, t)
    with torch.no_grad():
        for _ in range(2):
            runner(body, x, t)
    with pytest.raises(AssertionError, match="another graph was replayed before"):
        last.sum().backward()


def test_shapes_that_never_come_again_are_told_and_few_graphs_are_kept():
    model = shared_model()
    runner = graphed(model, "cpu")
    sizes = [Target(0, 1, n) for n in range(1, 70)]
    with torch.no_grad(), pytest.warns(UserWarning, match="64 packs in a row.*run.graphs=false"):
        for target in sizes:
            body = pack(conditions(True, (3,)), [target], pad=runner.pad)
            runner(body, *inputs(body, 0))
    assert len(runner.calls) == graphs.KEPT and runner.passing.captured == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner(body, *inputs(body, 0))


def test_where_graphs_cannot_be_had_it_is_said_with_the_alternative():
    with pytest.raises(UserError, match="run.graphs=true needs a CUDA device; or set run.graphs=false"):
        check_graphs(shared_model(), sharded=False)
    with pytest.raises(UserError, match="not for judges"):
        check_graphs(torch.nn.Linear(2, 2), sharded=False)


def test_a_pack_says_what_may_differ_inside_one_graph():
    packs = lambda: [pack(conditions(True, (n, 4)), TARGETS, pad=16) for n in (3, 5)]  # noqa: E731
    one, other = (facts(body, BACKENDS["flash"]) for body in packs())
    assert one[0] == other[0]
    assert [x.shape for x in one[1]] == [x.shape for x in other[1]]
    assert any(not torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    one, other = (facts(body, BACKENDS["cpu"]) for body in packs())
    assert one[0] != other[0]  # its kernels take lengths from the host
