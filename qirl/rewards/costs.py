"""What the rewards of a config hold in memory: the weights that run in this process, by the headers of their files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from qirl.config_parts import HpsV2Options, HpsV3Options, ImageRewardOptions, Weights
from qirl.config_rewards import JudgeOptions, RewardOptions
from qirl.errors import UserError
from qirl.models.weights import tensor_shapes

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
IMAGE_REWARD = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.layers.")  # its file may hold more


def reward_bytes(options: Mapping[str, RewardOptions]) -> dict[str, int]:
    """{"reward NAME": bytes} of the local models among rewards, "host, reward NAME" for one that is put on the CPU.

    What a model holds while it scores is not counted, nor are weights that are no safetensors, rewards behind servers, Python
    functions, and networks of OpenCV and ONNX. Raises UserError for weights that are missing or damaged.
    """
    found = {}
    for name, own in options.items():
        if size := _bytes(name, own):
            found[f"host, reward {name}" if getattr(own, "device", "auto") == "cpu" else f"reward {name}"] = size
    return found


def _bytes(name: str, own: RewardOptions) -> int:
    half = 2 if torch.cuda.is_available() else 4  # bytes of a number of what is in bfloat16 on a GPU
    if isinstance(own, JudgeOptions):
        return 0 if own.servers else half * _numbers(name, Path(own.model))
    if isinstance(own, HpsV3Options):
        return half * _numbers(name, Path(own.weights), lambda tensor: not tensor.startswith("lm_head."))
    if isinstance(own, ImageRewardOptions):
        return 4 * _numbers(name, Path(own.weights), lambda tensor: tensor.startswith(IMAGE_REWARD))
    if isinstance(own, HpsV2Options) and own.weights is not None:
        return 4 * _numbers(name, Path(own.weights))
    return 4 * _numbers(name, Path(own.model)) if isinstance(own, Weights) else 0


def _numbers(name: str, path: Path, used: Callable[[str], bool] = lambda tensor: True) -> int:
    """The numbers in the tensors (those `used`) of a file or of a folder of transformers; 0 where it holds no safetensors."""
    files = _files(path) if path.is_dir() else [path] if path.suffix == ".safetensors" else []
    for file in files:
        if not file.is_file():
            raise UserError(f"rewards.{name}: {file} does not exist; check the path")
    return sum(math.prod(shape) for file in files for key, shape in tensor_shapes(file).items() if used(key))


def _files(folder: Path) -> list[Path]:
    """The weight files that transformers reads of a folder."""
    index = folder / INDEX
    if not index.exists():
        return [folder / SINGLE] if (folder / SINGLE).exists() else []
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is truncated or no index of shards; copy it again") from None
