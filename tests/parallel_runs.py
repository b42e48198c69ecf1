"""What one of several gloo ranks does in the tests of parallelism, and returns."""

import itertools

import torch

from qirl.config_parallel import Parallel
from qirl.config_sections import Optimizer as Options
from qirl.models import qwen_image, qwen_image_21
from qirl.models.architecture import recompute
from qirl.models.fp8 import use_fp8
from qirl.models.lora import add_lora, put_adapters
from qirl.models.quantised import linears_of, quantise
from qirl.models.qwen_image import QwenImage, QwenImageConfig
from qirl.models.qwen_image_21 import QwenImage21, QwenImage21Config
from qirl.optim import Optimizer
from qirl.packing import Condition, Target, pack_joint, pack_shared
from qirl.parallel import collectives
from qirl.parallel.apply import parallelise, sharding_of
from qirl.parallel.data import Ranks, shard, sharded_as, start
from qirl.parallel.linear import Region
from qirl.parallel.mesh import Axis, turned
from qirl.parallel.sharding import Plan, Sharding
from qirl.run import checkpoint


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


KINDS = ("plain", "biased", "lora", "int8", "fp8")


def mlp(kind: str, ranks: Ranks) -> tuple[torch.nn.Module, Sharding]:
    """A model of one block with one feed-forward, and how it is cut. int8 and fp8 are a base under LoRA."""
    torch.manual_seed(0)
    model, block = torch.nn.Module(), torch.nn.Module()
    if kind == "biased":
        block.img_mlp = qwen_image.FeedForward(16, qwen_image.biased_linear)
    else:
        block.img_mlp = qwen_image_21.FeedForward(32, 64, qwen_image_21.plain_linear)
    model.transformer_blocks = torch.nn.ModuleList([block])
    column, row = ("proj", "gate_layer", "net.0.proj"), ("out", "net.2")
    sharding = Sharding(Plan(*(tuple(f"img_mlp.{name}" for name in names) for names in (column, row))), ranks)
    sharding.cut(model)
    if kind == "int8":
        weights = [layer.weight.data for _, _, layer in linears_of(model)]
        quantise(model, "int8")
        for (_, _, layer), weight in zip(linears_of(model), weights, strict=True):
            layer.fill(weight)
    if kind == "fp8":
        use_fp8(model, torch.device("cpu"), torch.float32)
    if kind in ("lora", "int8", "fp8"):
        put_adapters(model, [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)], 4, 0.5)
        train_adapters(model)
        sharding.cut(model, adapters=True)
    return model, sharding


def train_adapters(model: torch.nn.Module) -> None:
    """Adapters alone are trained, and B is away from zero, the same on every rank."""
    for name, p in model.named_parameters():
        p.requires_grad_(".lora_" in name)
        if ".lora_B" in name:
            p.data = torch.linspace(-1, 1, p.numel(), dtype=p.dtype).sin().view_as(p) * 0.2


def feed_forwards(rank: int, tp: int) -> dict:
    """{(kind, sequence): (y, gradient of x, whole gradients)} of a feed-forward over 5 tokens on `tp` ranks."""
    ranks, found = start(device="cpu", parallel=Parallel(tp=tp)), {}
    for kind, sequence in itertools.product(KINDS, (False, True)[:tp]):
        model, sharding = mlp(kind, ranks)
        module = model.transformer_blocks[0].img_mlp
        if tp > 1:
            Region(ranks.tp, sequence).feed_forward(module, module.net[2] if kind == "biased" else module.out)
        x = torch.linspace(-2, 2, 5 * (16 if kind == "biased" else 32)).cos().view(5, -1).requires_grad_()
        y = module(collectives.split(x, ranks.tp) if sequence else x)
        y = collectives.join(y, ranks.tp, 5) if sequence else y
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        named = dict(model.named_parameters())
        sharding.reduce(named)
        grads = dict(sharding.wholes({n: p.grad for n, p in named.items() if p.grad is not None}))
        found[kind, sequence] = y.detach(), x.grad, grads
    return found


def moves(rank: int) -> list:
    """Per collective: what comes out of 5 rows on two ranks, and what its backward gives, each rank weighing by 1 + rank."""
    axis, found = start(device="cpu", parallel=Parallel(tp=2)).tp, {}
    whole = torch.arange(10.0).view(5, 2)
    own = collectives.own_rows(whole, axis)
    for name, x, run in (
        ("copy", whole, lambda x: collectives.copy(x, axis)),
        ("reduce", whole, lambda x: collectives.reduce(x, axis)),
        ("split", whole, lambda x: collectives.split(x, axis)),
        ("join", own, lambda x: collectives.join(x, axis, 5)),
        ("gather", own, lambda x: collectives.gather(x, axis, 5)),
        ("scatter", whole, lambda x: collectives.scatter(x, axis)),
        ("columns", whole[:, rank : rank + 1], lambda x: collectives.gather_columns(x, axis, False)),
        ("partial columns", whole[:, rank : rank + 1], lambda x: collectives.gather_columns(x, axis, True)),
    ):  # fmt: skip
        x = x.clone().requires_grad_()
        y = run(x)
        y.backward(torch.full_like(y, 1.0 + rank))
        found[name] = y.detach(), x.grad
    return found


def models() -> dict:
    """A small transformer of each family with its packs and inputs: {family: (model, packs, latents, t)}."""
    sizes = dict(num_layers=3, attention_head_dim=16, num_attention_heads=4, axes_dims_rope=(4, 6, 6))
    single = QwenImage21Config(in_channels=6, out_channels=6, context_in_dim=10, mlp_ratio=2, **sizes)
    dual = QwenImageConfig(in_channels=8, out_channels=2, joint_attention_dim=10, **sizes)
    found = {}
    for name, model, pack in (
        ("single", lambda: QwenImage21(single), pack_shared), ("dual", lambda: QwenImage(dual), pack_joint),
    ):  # fmt: skip
        torch.manual_seed(0)
        model = model()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        channels = model.config.in_channels
        draw = lambda n, c: torch.randn(n, c, dtype=torch.float64)  # noqa: E731
        conditions = [
            Condition(draw(5, 10), (draw(6, channels),), (("text", 5), ("image", 2, 3))),
            Condition(draw(3, 10), (), (("text", 3),)),
        ]
        targets = [Target(0, 2, 3), Target(0, 3, 3), Target(1, 2, 2)]
        tokens = sum(t.tokens for t in targets)
        packs = [pack(conditions, targets)]
        if name == "single":  # behind the seam, the prefix is a pack of its own
            packs += [pack(conditions, []), pack(conditions, targets, prefix=False)]
        found[name] = model, packs, draw(tokens, channels), torch.rand(len(targets))
    return found


def prepared(model, ranks, sequence: bool, dtype, lora: bool, recomputed: str = "none"):
    """The model of `models` as a run makes it: cut, with adapters, and parallel."""
    sharding = sharding_of(model.config, ranks)
    sharding.cut(model.to(dtype))
    recompute(model, recomputed)
    if lora:
        add_lora(model, 3, 6.0, ("to_q", "to_k", "to_v", "to_out.0"))
        train_adapters(model)
    sharding.cut(model, adapters=True)
    return parallelise(model, ranks, sequence), sharding


def passes(model, sharding, packs, latents, t) -> list:
    """[(velocity, {name: whole gradient})] of a pack with its prefix, and of one behind the seam."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    seen = []
    for seam in (False, True)[: len(packs)]:
        model.zero_grad()
        past = model(packs[1]) if seam else ()
        leaves = [tuple(x.detach().requires_grad_() for x in pair) for pair in past]
        out = model(packs[2 if seam else 0], latents, t, leaves or None)
        out.square().sum().backward()
        if seam:
            torch.autograd.backward([x for p in past for x in p], [x.grad for p in leaves for x in p])
        sharding.reduce(named)
        grads = {n: p.grad for n, p in named.items() if p.grad is not None}
        seen.append((out.detach(), dict(sharding.wholes(grads))))
    return seen


CASES = [  # family, dtype, lora, recomputed
    ("single", torch.float64, False, "none"),
    ("single", torch.float64, True, "block"),
    ("single", torch.float32, False, "attention"),
    ("dual", torch.float64, False, "block"),
    ("dual", torch.float64, True, "none"),
    ("dual", torch.float32, False, "none"),
]


def transformers(rank: int, tp: int, sequences: tuple[bool, ...]) -> dict:
    """{(case, sequence): what `passes` finds} on `tp` ranks."""
    ranks = start(device="cpu", parallel=Parallel(tp=tp))
    found = {}
    for case in CASES:
        family, dtype, lora, recomputed = case
        for sequence in sequences:
            model, packs, latents, t = models()[family]
            model, sharding = prepared(model, ranks, sequence, dtype, lora, recomputed)
            found[case, sequence] = passes(model, sharding, packs, latents.to(dtype), t)
    return found


LAYOUTS = {  # options of `parallel`, and whether FSDP wraps one data parallel rank as well
    "dp2 tp2": (dict(tp=2), False),
    "dp4": (dict(), False),
    "tp2": (dict(tp=2, sequence=True), False),
    "tp2 in FSDP": (dict(tp=2), True),
    "one": (dict(), False),
}


class Training:
    """A transformer of `models` in float64 with its optimizer, trained on its own velocity, in a layout."""

    def __init__(self, family: str, layout: str):
        options, always_mesh = LAYOUTS[layout]
        self.ranks = start(always_mesh, "cpu", Parallel(**options))
        model, packs, latents, t = models()[family]
        lora = family == "dual"
        sequence = options.get("sequence", False)
        self.model, self.sharding = prepared(model, self.ranks, sequence, torch.float64, lora)
        shard(self.model, self.ranks, torch.float64)
        self.named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = Optimizer(self.model, Options(lr=1e-2, clip=0.5, eps=1e-2), 9, sharding=self.sharding)
        self.inputs = packs[0], latents, t

    def update(self) -> float:
        (self.model(*self.inputs).square().sum() / self.ranks.world).backward()
        self.sharding.reduce(self.named)
        return float(self.optimizer.step(0))

    def tensors(self) -> dict:
        return {"weights": self.sharding.views(self.named), "adam": self.optimizer.tensors()}

    def wholes(self) -> dict[str, torch.Tensor]:
        """Weights and moments, whole."""
        moments = self.optimizer.tensors()
        found = {n: w.clone() for n, w in self.sharding.wholes(self.named)}
        for part in ("exp_avg", "exp_avg_sq"):
            state = {n: sharded_as(self.named[n], own_part(tensors[part])) for n, tensors in moments.items()}
            found |= {f"{n}/{part}": w.clone() for n, w in self.sharding.wholes(state)}
        return found


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def layouts_in_turn(rank: int, folder: str, turns: list[tuple[str | None, str]]) -> dict:
    """Per family and turn (checkpoint or None, layout): what was loaded, or trained from the start for one update; the norm and
    the weights of the update that follows. Every turn's checkpoint is FOLDER/FAMILY/LAYOUT."""
    found = {}
    for family in ("single", "dual"):
        for source, layout in turns:
            run = Training(family, layout)
            if source is None:
                run.update()
            else:
                with torch.no_grad():
                    for tensor in run.named.values():
                        tensor.zero_()
                checkpoint.load(f"{folder}/{family}/{source}/step_000001", run.tensors())
            checkpoint.save(f"{folder}/{family}/{layout}", 1, run.tensors())
            before = run.wholes()
            found[family, (source, layout)] = before, run.update(), run.wholes()
    return found
