"""LoRA adapters as peft, diffusers and kohya's scripts write them.

peft: adapter_config.json beside adapter_model.safetensors, keys base_model.model.MODULE.lora_A.weight, one alpha for all.
diffusers: pytorch_lora_weights.safetensors, keys transformer.MODULE.lora_A.weight, peft's fields in the file's metadata,
where alpha is not the rank. kohya: a file with lora_down, lora_up and alpha of each module, dots as underscores.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from qirl.errors import UserError
from qirl.models.adapters import (
    DIFFUSERS_PREFIX,
    DIFFUSERS_WEIGHTS,
    PEFT_CONFIG,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    Adapter,
    LowRank,
)  # fmt: skip
from qirl.models.weights import check_values

METADATA = "lora_adapter_metadata"  # of a diffusers file: peft's fields as JSON, each under DIFFUSERS_PREFIX
_PREFIXES = (PEFT_PREFIX, DIFFUSERS_PREFIX, "diffusion_model.")
_KEY = re.compile(r"(?P<module>.+)\.(?:lora_(?P<part>A|B|down|up)(?:\.default)?\.weight|(?P<alpha>alpha))")
_PARTS = {"A": "a", "down": "a", "B": "b", "up": "b"}
# fields of peft's config that say nothing of the weights, or are read below; any other must be unset
_HARMLESS = {
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r",
    "lora_alpha", "use_rslora", "init_lora_weights", "lora_dropout", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config", "eva_config",
    "loftq_config", "lora_ga_config", "rank_pattern", "alpha_pattern",
}  # fmt: skip
# starts after which the weight is W + scale * B A of an unchanged W; PiSSA and the like change W as well
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


def is_adapter(path: str | Path) -> bool:
    """Whether a file is an adapter, or a folder holds one and no whole model."""
    return _files(Path(path)) is not None


def read_adapter(path: str | Path) -> Adapter:
    """The adapter of a folder or of one .safetensors file.

    Raises UserError for damaged files, values that are not finite, and anything beside plain LoRA.
    """
    config_file, weights_file = _files(Path(path)) or (None, Path(path))
    try:
        config = json.loads(config_file.read_text()) if config_file else None
        with safe_open(weights_file, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        if config is None and METADATA in metadata:
            fields = json.loads(metadata[METADATA])
            config = (
                {k.removeprefix(DIFFUSERS_PREFIX): v for k, v in fields.items()} if isinstance(fields, dict) else []
            )
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or weights_file} does not exist; copy the adapter again") from None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path} holds no readable adapter ({error}); copy it again") from None
    settings = None if config is None else _plain_lora(config, config_file or weights_file)
    found = _modules(tensors, weights_file)
    matrices = {module: _low_rank(module, parts, settings, weights_file) for module, parts in sorted(found.items())}
    return Adapter(matrices, settings and settings.base)


def _files(path: Path) -> tuple[Path | None, Path] | None:
    """(config, weights) of an adapter: a file, peft's or diffusers' names in a folder, or a folder's only weights."""
    if path.is_file():
        return (None, path) if path.suffix == ".safetensors" else None
    if (path / PEFT_CONFIG).is_file():
        return path / PEFT_CONFIG, path / PEFT_WEIGHTS
    if (path / DIFFUSERS_WEIGHTS).is_file():
        return None, path / DIFFUSERS_WEIGHTS
    alone = [] if (path / "config.json").exists() else sorted(path.glob("*.safetensors"))
    return (None, alone[0]) if len(alone) == 1 else None


@dataclass(frozen=True)
class _Settings:
    """What peft's config says of the weights; the patterns give modules a rank or an alpha of their own."""

    rank: int
    alpha: float
    root: bool  # divide alpha by the rank's square root
    base: str | None
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)

    def scale(self, module: str, rank: int, path: Path) -> float:
        wanted = _of_pattern(self.rank_pattern, module, self.rank)
        if rank != wanted:
            raise UserError(f"{path}: '{module}' has rank {rank}, its config says {wanted}; copy the adapter again")
        alpha = _of_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.root else rank)


def _of_pattern(pattern: dict, module: str, default: float) -> float:
    """peft's rule: a key is a regular expression of the end of a module's path."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _plain_lora(config, path: Path) -> _Settings:
    """Raises UserError, naming the field, unless the weights are W + scale * B A."""
    if not isinstance(config, dict):
        raise UserError(f"{path} is no JSON object; copy the adapter again")
    if config.get("peft_type") not in (None, "LORA"):
        raise UserError(f"{path}: peft_type={config['peft_type']!r} is not LoRA; merge the adapter into a model")
    start = config.get("init_lora_weights")
    if not any(start is plain or start == plain and isinstance(start, str) for plain in _PLAIN_STARTS):
        raise UserError(
            f"{path}: init_lora_weights={start!r} changes the base as well; convert the adapter (peft: save_pretrained with "
            "path_initial_model_for_weight_conversion), or merge it into a model"
        )
    for name in sorted(config.keys() - _HARMLESS):
        if config[name] not in (None, False, "none", {}, [], ""):
            raise UserError(f"{path}: {name}={config[name]!r} is not supported; merge the adapter into a model")
    root, base = config.get("use_rslora") or False, config.get("base_model_name_or_path")
    if type(root) is not bool:
        raise UserError(f"{path}: use_rslora={root!r} must be true or false; copy the adapter again")
    if base is not None and type(base) is not str:
        raise UserError(f"{path}: base_model_name_or_path={base!r} must be text; copy the adapter again")
    rank_pattern, alpha_pattern = (_pattern(config, f"{name}_pattern", path) for name in ("rank", "alpha"))
    for label, rank in {"r": config.get("r"), **{f"rank_pattern.{k}": v for k, v in rank_pattern.items()}}.items():
        if type(rank) is not int or rank < 1:
            raise UserError(f"{path}: {label}={rank!r} must be a whole number of at least 1; copy the adapter again")
    alphas = {"lora_alpha": config.get("lora_alpha"), **{f"alpha_pattern.{k}": v for k, v in alpha_pattern.items()}}
    for label, alpha in alphas.items():
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise UserError(f"{path}: {label}={alpha!r} must be a number; copy the adapter again")
    return _Settings(config["r"], float(config["lora_alpha"]), root, base, rank_pattern, alpha_pattern)


def _pattern(config: dict, name: str, path: Path) -> dict:
    pattern = config.get(name) or {}
    try:
        for key in pattern if isinstance(pattern, dict) else [None]:
            re.compile(key)
    except (re.error, TypeError):
        raise UserError(
            f"{path}: {name}={pattern!r} must give numbers by module names; copy the adapter again"
        ) from None
    return pattern


def _modules(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """{"a", "b" and perhaps "alpha"} of each adapted module."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if key.startswith(("text_encoder", "lora_te")):
            raise UserError(
                f"{path} adapts the text encoder too ('{key}'), which stays as it is here; leave that part out"
            )
        if match is None:
            raise _odd(key, path)
        check_values(path, key, value)
        module = match["module"]
        prefix = next((p for p in _PREFIXES if module.startswith(p)), "")
        parts = found.setdefault(module.removeprefix(prefix), {})
        parts["alpha" if match["alpha"] else _PARTS[match["part"]]] = value
    for module, parts in found.items():
        if not {"a", "b"} <= parts.keys():
            raise _odd(f"{module}.lora_{'B' if 'a' in parts else 'A'}.weight", path)
    if not found:
        raise _odd("lora_A.weight", path)
    return found


def _odd(key: str, path: Path) -> UserError:
    return UserError(f"{path}: '{key}' is missing or no LoRA matrix of a transformer; copy it again")


def _low_rank(module: str, parts: dict[str, torch.Tensor], settings: _Settings | None, path: Path) -> LowRank:
    a, b, alpha = parts["a"], parts["b"], parts.get("alpha")
    if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or not len(a):
        raise UserError(f"{path}: '{module}' is {list(b.shape)} times {list(a.shape)}, no product of two matrices")
    if alpha is not None:
        if alpha.numel() != 1:
            raise UserError(f"{path}: '{module}.alpha' has {alpha.numel()} numbers, not one; copy the adapter again")
        return LowRank(a, b, float(alpha) / len(a))
    return LowRank(a, b, settings.scale(module, len(a), path) if settings else 1.0)
