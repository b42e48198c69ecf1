"""Settings of the throughput benchmark: true shapes, a model of random weights made on the device, random conditions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from qirl import config as configuration
from qirl.config import TrainConfig
from qirl.data.prompts import Prompt
from qirl.engine import DTYPES, equip
from qirl.errors import UserError, nearest
from qirl.models.architecture import Transformer
from qirl.models.lora import TARGETS
from qirl.models.quantised import LARGEST, FrozenLinear, quantise
from qirl.models.qwen_image import QwenImageConfig
from qirl.models.qwen_image_21 import QwenImage21Config
from qirl.models.weights import Config, new_model
from qirl.packing import Condition

PIXELS = 16  # of a token's side, in both families
NEGATIVE = 8  # tokens of the unconditional twin's text
# widths and layers of the published models are the defaults of their configs
TRUE: dict[str, type] = {"qwen_image_21": QwenImage21Config, "qwen_image": QwenImageConfig}
# their proportions, small: for a CPU
TINY = {
    "qwen_image_21": dict(
        in_channels=16, out_channels=16, num_layers=4, attention_head_dim=32, num_attention_heads=4, context_in_dim=128,
        axes_dims_rope=(4, 14, 14),
    ),
    "qwen_image": dict(
        in_channels=16, out_channels=4, num_layers=4, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=128, axes_dims_rope=(4, 14, 14),
    ),
}  # fmt: skip
# linear layers of the blocks that get an adapter: all of 2.1's, those of attention in 1.x (as configs/ have it)
ADAPTED = {
    "qwen_image_21": TARGETS,
    "qwen_image": (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One RL step: `prompts` groups of `group` images of height x width pixels, each trained at `nodes` of `steps` nodes.

    references: images of the target's size in each prompt, beside `text` tokens. lora: its rank, 0 trains all parameters.
    base: of the weights that LoRA leaves frozen, as model.base. micro: targets in one pack of the update; batch: images in
    one pack of the rollout. layers: None for all of the model's. size: true or tiny. overrides: of the run's config.
    """

    name: str
    family: str = "qwen_image_21"
    size: str = "true"
    layers: int | None = None
    height: int = 512
    width: int = 512
    references: int = 0
    text: int = 256
    prompts: int = 1
    group: int = 16
    steps: int = 10
    nodes: int = 2
    guidance: float = 4.0
    dtype: str = "bfloat16"
    lora: int = 64
    base: str = "dtype"
    checkpointing: str = "none"
    micro: int = 4
    batch: int = 16
    overrides: tuple[str, ...] = ()

    def __post_init__(self):
        for field, known in (("family", TRUE), ("size", ("true", "tiny"))):
            value = getattr(self, field)
            if value not in known:
                raise UserError(f"{field}={value} is none of {', '.join(known)}{nearest(value, known)}")
        step = 2 * PIXELS  # 2.1 takes references of whole text tokens, 2 x 2 latents each
        for field in ("height", "width"):
            value = getattr(self, field)
            if value < step or value % step:
                below = max(step, value // step * step)
                raise UserError(f"{field}={value} is not a multiple of {step} pixels; use {below} or {below + step}")
        for field in ("text", "prompts", "micro", "batch"):
            if getattr(self, field) < 1:
                raise UserError(f"{field}={getattr(self, field)} is below 1; use 1 or more")

    @property
    def grid(self) -> tuple[int, int]:
        """Latent tokens of an image, (height, width)."""
        return self.height // PIXELS, self.width // PIXELS

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def images(self) -> int:
        return self.prompts * self.group

    def architecture(self) -> Config:
        layers = {} if self.layers is None else {"num_layers": self.layers}
        return TRUE[self.family](**(TINY[self.family] if self.size == "tiny" else {}) | layers)

    def config(self, out: str, seed: int = 0) -> TrainConfig:
        """The config of the run that is measured. Raises UserError for overrides that it does not know or cannot take."""
        carried = 0 if self.family == "qwen_image_21" else self.text + self.references * self.tokens
        twice = 2 if self.guidance != 1 else 1
        values = {
            "run": {"out": out, "seed": seed},
            "world": {"name": "prompts"},
            "model": {
                "path": "random weights", "dtype": self.dtype, "base": self.base, "checkpointing": self.checkpointing,
                "lora": {"rank": self.lora, "alpha": float(max(1, self.lora)), "targets": ADAPTED[self.family]},
            },
            "flow": {
                "steps": self.steps, "guidance": float(self.guidance), "rescale": self.family == "qwen_image",
                "rollout_tokens": self.batch * self.tokens * twice,
            },
            "policy": {
                "prompts": self.prompts, "group": self.group, "timesteps": {"count": self.nodes},
                "micro_tokens": self.micro * (self.tokens + carried),
            },
        }  # fmt: skip
        return configuration.load("train", values, list(self.overrides))


def changed(setting: Setting, words: Sequence[str]) -> list[Setting]:
    """The setting with words such as micro=8 (its own fields; micro=2,4 gives two settings) or model.attention=flash.

    Raises UserError for a field that there is not, or a value of another type.
    """
    fields = {f.name: f.type for f in dataclasses.fields(Setting)} | {"layers": "int"}
    choices, dotted = [], []
    for word in words:
        name, equals, text = word.partition("=")
        if "." in name and equals:
            dotted.append(word)
        elif name in fields.keys() - {"name", "overrides"} and equals:
            choices.append([(name, _value(name, fields[name], part)) for part in text.split(",")])
        else:
            raise UserError(f"'{word}' is no FIELD=VALUE of a setting{nearest(name, fields)}, nor SECTION.OPTION=VALUE")
    found = []
    for chosen in itertools.product(*choices):
        told = " ".join([setting.name, *(f"{name}={value}" for name, value in chosen), *dotted])
        overrides = (*setting.overrides, *dotted)
        found.append(dataclasses.replace(setting, **dict(chosen), name=told, overrides=overrides))
    return found


def _value(name: str, kind: str, text: str):
    try:
        return {"int": int, "float": float}.get(kind, str)(text)
    except ValueError:
        raise UserError(f"{name}={text} is no {kind}") from None


def random_model(architecture: Config, config: TrainConfig, device, dtype: torch.dtype) -> Transformer:
    """A transformer with random weights in `dtype`, made on the device tensor by tensor, as the run would equip it."""
    with torch.device("meta"):
        model = new_model(architecture).to(dtype)
        if config.model.base in LARGEST:
            quantise(model, config.model.base)
    model = model.to_empty(device=device)
    draw_weights(model, config.run.seed)
    return equip(model, config)


@torch.no_grad()
def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Random values for all weights, where they lie. Norms are 1, biases 0; products keep the size of their input."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                _draw(module, name, weight)


def _draw(module: torch.nn.Module, name: str, weight: torch.Tensor) -> None:
    if isinstance(module, FrozenLinear):
        if name == "weight":
            values = torch.empty(weight.shape, device=weight.device).normal_(0, weight.shape[1] ** -0.5)
            module.fill(values)
        elif name == "bias":
            weight.zero_()
    elif weight.ndim == 2:
        weight.normal_(0, weight.shape[1] ** -0.5)
    else:
        weight.fill_(0 if name == "bias" else 1)


class Drawn:
    """Stands for a family whose parts are not there: prompts have random conditions of the setting's shape, on the host."""

    def __init__(self, setting: Setting, architecture: Config, dtype: torch.dtype, seed: int = 0):
        self.setting, self.architecture, self.dtype, self.seed = setting, architecture, dtype, seed
        self.name, self.shared = setting.family, setting.family == "qwen_image_21"
        self.channels, self.pixels, self.rescale = architecture.in_channels, PIXELS, not self.shared
        self.latent_channels = architecture.latent_channels
        self.condition = lru_cache(None)(lambda prompt: self._draw(prompt.id, setting.text))
        self.negative = lru_cache(None)(lambda prompt: self._draw(prompt.id, min(NEGATIVE, setting.text)))

    def size(self, prompt: Prompt) -> tuple[int, int]:
        return self.setting.grid

    def _draw(self, number: int, text: int) -> Condition:
        """A quarter of the text, then the references, then the rest (2.1); or text, then references (1.x)."""
        generator = torch.Generator().manual_seed(self.seed + number)
        width = getattr(self.architecture, "context_in_dim", None) or self.architecture.joint_attention_dim
        gauss = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        references = tuple(gauss(self.setting.tokens, self.channels) for _ in range(self.setting.references))
        images = [("image", *self.setting.grid)] * self.setting.references
        before = text // 4 if self.shared else text
        layout = (("text", before), *images, ("text", text - before)) if self.shared else (("text", text), *images)
        return Condition(gauss(text, width).to(self.dtype), references, layout, self.shared)


def prompts(setting: Setting) -> list[tuple[Prompt, int]]:
    """The prompts of a step, as PromptSampler.step gives them."""
    return [(Prompt(i, f"prompt {i}"), 0) for i in range(setting.prompts)]


def model_dtype(config: TrainConfig, master: torch.dtype) -> torch.dtype:
    """What the weights are made in: frozen ones as they compute, trained ones as their optimizer wants them."""
    return DTYPES[config.model.dtype] if config.model.frozen else master
