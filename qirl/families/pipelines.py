"""What the families of diffusers' pipelines share: parts that are loaded when they are needed and are on the device only
while they run, and conditions that are made once per prompt and kept on disk.

Conditioning is the pipeline's own code (`encode_prompt`); a pipeline object without its transformer runs it. Checked against diffusers 0.42.1.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from qirl.config_sections import Flow, Model
from qirl.config_sections import World as Options
from qirl.data.images import MOST_ASPECT, content_hash
from qirl.data.prompts import Prompt
from qirl.errors import UserError
from qirl.families.kept import read_condition, read_layout, write_condition
from qirl.packing import Condition
from qirl.run import cache

INDEX = "model_index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float32}
REMEMBERED = 512  # conditions in memory; all are on disk


def dimensions(area: int, ratio: float) -> tuple[int, int]:
    """(height, width) in pixels, multiples of 32, of about `area` pixels with this width over height; as diffusers has it."""
    width = math.sqrt(area * ratio)
    return round(width / ratio / 32) * 32, round(width / 32) * 32


class PipelineFamily:
    """See `qirl.families.Family`. folder: a pipeline as diffusers saves it; device: where its parts run."""

    name: str
    encoder: str  # class of the text encoder in transformers
    autoencoder: str  # its class in diffusers
    patch: int  # latents of a token's side
    shared: bool  # conditions are prefixes that targets share
    most_sources: int
    least_sources = 0

    def __init__(self, folder: Path, options: Options, model: Model, device: torch.device):
        for package in ("diffusers", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise UserError(f"{folder} needs {package}: pip install 'qirl[pipelines]'")
        self.folder, self.resolution, self.unconditional = folder, options.resolution, options.negative
        self.dtype, self.device = DTYPES[model.dtype], device
        self.vae_config = read_json(folder / "vae/config.json")
        self._pipe: Any = None
        self._outline: Any = None  # the same for sketches
        self.sketching = False
        self._condition = lru_cache(REMEMBERED)(lambda key: read_condition(self._folder(*key), self.shared))
        self._sources: dict[str, Sequence[np.ndarray]] = {}  # by their hash; files are read when they are asked for

    @property
    def channels(self) -> int:
        return self.vae_config["z_dim"] * self.patch**2

    @property
    def pixels(self) -> int:
        """Pixels of a token's side."""
        return self._downscale() * self.patch

    def _downscale(self) -> int:
        raise NotImplementedError

    # sizes and checks

    def size(self, prompt: Prompt) -> tuple[int, int]:
        own = self.resolution, self.resolution
        if prompt.sources:
            height, width = prompt.source_sizes[-1]
            own = dimensions(self.resolution**2, width / height)
        height, width = prompt.height or own[0], prompt.width or own[1]
        return max(1, self._floor(height) // self.pixels), max(1, self._floor(width) // self.pixels)

    def _floor(self, side: int) -> int:
        """What the pipeline makes of a side in pixels."""
        return side // self.pixels * self.pixels

    def check(self, prompt: Prompt) -> None:
        count = len(prompt.sources)
        if not self.least_sources <= count <= self.most_sources:
            wanted = (
                f"{self.least_sources}"
                if self.least_sources == self.most_sources
                else f"{self.least_sources} to {self.most_sources}"
            )
            raise UserError(f"prompt '{short(prompt.text)}' has {count} source images, {self.folder} takes {wanted}")
        for number, (height, width) in enumerate(prompt.source_sizes, start=1):
            thin = max(height, width) > MOST_ASPECT * min(height, width)
            if thin or min(dimensions(self.resolution**2, width / height)) < 32:
                raise UserError(
                    f"source {number} of '{short(prompt.text)}' has {width} x {height} pixels, which is too thin to be edited "
                    f"at world.resolution={self.resolution}; crop it"
                )
        for name, side in (("height", prompt.height), ("width", prompt.width)):
            if side is not None and self._floor(side) < self.pixels:
                raise UserError(
                    f"{name}={side} of '{short(prompt.text)}' is below one token of {self.pixels} pixels; raise it"
                )

    def fits(self, config) -> None:
        """Raises UserError for a transformer of another pipeline than this one's."""
        text = self.text_width()
        width = getattr(config, "context_in_dim", None) or getattr(config, "joint_attention_dim", None)
        if (config.in_channels, width) != (self.channels, text):
            raise UserError(
                f"the transformer takes {config.in_channels} channels and text of width {width}, {self.folder} gives "
                f"{self.channels} and {text}; take both from one pipeline"
            )

    def text_width(self) -> int:
        config = read_json(self.folder / "text_encoder/config.json")
        return config.get("text_config", config)["hidden_size"]

    def suits(self, flow: Flow) -> None:
        """Raises UserError where `flow` shifts time in another way than the pipeline's scheduler."""
        config = read_json(self.folder / "scheduler/scheduler_config.json")
        pairs = (
            ("base_shift", "base_shift", 0.5), ("max_shift", "max_shift", 1.15), ("base_tokens", "base_image_seq_len", 256),
            ("max_tokens", "max_image_seq_len", 4096), ("terminal", "shift_terminal", None),
        )  # fmt: skip
        for ours, theirs, default in pairs:
            value = config.get(theirs, default) or 0
            if not math.isclose(getattr(flow, ours), value, rel_tol=1e-9):
                raise UserError(
                    f"flow.{ours}={getattr(flow, ours):g}, the scheduler of {self.folder} has {theirs}={value:g}: the model was "
                    f"trained with that; set flow.{ours}={value:g}"
                )
        if (
            not config.get("use_dynamic_shifting", False)
            or config.get("time_shift_type", "exponential") != "exponential"
        ):
            raise UserError(
                f"{self.folder}/scheduler does not shift time exponentially by image size; take Qwen-Image's own"
            )

    def architecture(self, options) -> Any:
        raise UserError("model.path is missing: this family trains published models, so name a pipeline's folder")

    def encoder_bytes(self) -> int:
        """Of its files, as if all were in the dtype that they are loaded in from 16 bits."""
        size = sum(path.stat().st_size for path in (self.folder / "text_encoder").glob("*.safetensors"))
        stated = read_json(self.folder / "text_encoder/config.json").get("dtype", "bfloat16")
        return size * self.dtype.itemsize // (4 if stated == "float32" else 2)

    def facts(self) -> dict[str, Any]:
        return {"family": self.name, "pipeline": str(self.folder.resolve())}

    # conditions

    def condition(self, prompt: Prompt) -> Condition:
        return self._condition(self._key(prompt))

    def condition_tokens(self, prompt: Prompt) -> int:
        return sum(math.prod(size) for _, *size in read_layout(self._folder(*self._key(prompt))))

    def negative(self, prompt: Prompt) -> Condition:
        return self._condition(self._key(prompt, negative=True))

    def _key(self, prompt: Prompt, negative: bool = False) -> tuple[str, str, str]:
        """(text, hash of the sources, hash of all that decides the condition) of a prompt, or of its twin."""
        text, pictures = self.unconditional if negative else prompt.text, prompt.source_hash
        self._sources[pictures] = prompt.sources
        return text, pictures, cache.content_key(self._identity(), text, pictures)

    @lru_cache(1)  # noqa: B019 - a family lives as long as its run
    def _identity(self) -> list:
        """The parts that make conditions: configs by content, weights by name, size and time."""
        files = sorted(p for part in ("text_encoder", "vae", *self._readers()) for p in (self.folder / part).rglob("*"))
        stated = [
            [p.relative_to(self.folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns]
            for p in files
            if p.is_file()
        ]
        return [self.name, self.resolution, str(self.dtype), stated, _diffusers()]

    def _readers(self) -> Sequence[str]:
        """Subfolders of what turns text and images into the encoder's inputs."""
        raise NotImplementedError

    def prepare(self, prompts: Sequence[Prompt], negatives: bool) -> None:
        """Makes all conditions that the cache lacks, and frees the text encoder."""
        keys = [self._key(p) for p in prompts]
        keys += [self._key(p, negative=True) for p in prompts] if negatives else []
        for key in dict.fromkeys(keys):
            self._folder(*key)
        self.release()

    def _folder(self, text: str, pictures: str, key: str) -> Path:
        """Where the condition lies in the cache; it is made where it is not there."""
        return cache.cached_folder("condition", key, lambda path: self._write(path, text, self._sources[pictures]))

    def _write(self, path: Path, text: str, sources: Sequence[np.ndarray]) -> None:
        with torch.no_grad():
            write_condition(path, self.encode_condition(text, sources))

    def encode_condition(self, text: str, sources: Sequence[np.ndarray]) -> Condition:
        """By the pipeline's encoder and autoencoder. Raises UserError for what does not fit them."""
        raise NotImplementedError

    # the parts

    def pipe(self):
        """diffusers' pipeline without transformer and text encoder; the autoencoder on the host."""
        if self._pipe is None:
            vae = None if self.sketching else self.part("diffusers", self.autoencoder, "vae")
            self._pipe = self._assembled(vae)
        return self._pipe

    def _assembled(self, vae):
        """The pipeline's object around an autoencoder, or around none."""
        raise NotImplementedError

    def sketch(self, prompt: Prompt, negative: bool = False) -> Condition:
        with self._sketches():
            return self.encode_condition(self.unconditional if negative else prompt.text, prompt.sources)

    @contextlib.contextmanager
    def _sketches(self) -> Iterator[None]:
        """In the block the encoder gives zeros of the right shape, and images give latents of zeros: no weights are read."""
        before, self._pipe, self.sketching = self._pipe, self._outline, True
        try:
            self.pipe().text_encoder = Blank(self.text_width())
            yield
        finally:
            self._outline, self._pipe, self.sketching = self._pipe, before, False

    def part(self, module: str, name: str, subfolder: str):
        """A part of the pipeline by its class. Raises UserError where it is missing or does not load."""
        try:
            kind = getattr(importlib.import_module(module), name)
            dtype = {"dtype": self.dtype} if module == "transformers" else {"torch_dtype": self.dtype}
            return kind.from_pretrained(self.folder / subfolder, **dtype).eval().requires_grad_(False)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"{self.folder / subfolder} holds no {name} ({error}); copy the pipeline whole") from None

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """The text encoder, by far the largest part, is on the device for the block, and on the host until `release`."""
        pipe = self.pipe()
        if pipe.text_encoder is None:
            pipe.text_encoder = self.part("transformers", self.encoder, "text_encoder")
        with self.on_device(pipe.text_encoder):
            yield

    def release(self) -> None:
        """Frees the text encoder; it is loaded again if a new prompt comes."""
        self.pipe().text_encoder = None

    @contextlib.contextmanager
    def on_device(self, module: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """Moves a part to the device for the block."""
        try:
            yield module.to(self.device)
        finally:
            module.to("cpu")

    # images

    def encode(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Once per image: latents are kept on disk."""
        return [self._latents(image) for image in images]

    def _latents(self, image: np.ndarray) -> torch.Tensor:
        from safetensors.torch import load_file, save_file

        def write(path: Path) -> None:
            save_file(
                {"latents": self.encode_image(image, *image.shape[:2]).contiguous()}, path / "latents.safetensors"
            )

        key = cache.content_key(self._identity(), content_hash(image))
        return load_file(cache.cached_folder("latents", key, write) / "latents.safetensors")["latents"]

    @torch.no_grad()
    def decode(self, latents: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        pipe, images = self.pipe(), []  # one at a time: sizes differ
        with self.on_device(pipe.vae) as vae:
            for own, (height, width) in zip(latents, sizes, strict=True):
                pixels = (side * self.pixels for side in (height, width))
                grid = pipe._unpack_latents(own[None].float(), *pixels, pipe.vae_scale_factor)
                grid = grid.to(self.device, vae.dtype)
                mean, std = self._statistics(grid)
                decoded = vae.decode(grid * std + mean, return_dict=False)[0][:, :, 0].nan_to_num(0.0)
                images.append(as_rgb(pipe.image_processor.postprocess(decoded.float().cpu(), output_type="np")[0]))
        return images

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(
            torch.tensor(self.vae_config[name]).view(1, -1, 1, 1, 1).to(like)
            for name in ("latents_mean", "latents_std")
        )

    @torch.no_grad()
    def encode_image(self, image, height: int, width: int) -> torch.Tensor:
        """Latents [tokens, channels], float32 on the host, of a PIL image or uint8 [H, W, 3], scaled to height x width."""
        if self.sketching:
            return torch.zeros(height // self.pixels * (width // self.pixels), self.channels)
        pipe = self.pipe()
        with self.on_device(pipe.vae) as vae:
            prepared = pipe.image_processor.preprocess(self.picture(image), height, width).unsqueeze(2)
            grid = vae.encode(prepared.to(self.device, vae.dtype)).latent_dist.mode()
            mean, std = self._statistics(grid)
            grid = (grid - mean) / std
        _, channels, _, rows, columns = grid.shape
        return pipe._pack_latents(grid, 1, channels, rows, columns)[0].float().cpu()

    def picture(self, image):
        """An image as the pipeline's own call gives it to its parts."""
        from PIL import Image

        return Image.fromarray(image) if isinstance(image, np.ndarray) else image


class Blank(torch.nn.Module):
    """A text encoder without weights: hidden states of zeros."""

    dtype = torch.float32

    def __init__(self, width: int):
        super().__init__()
        self.width, self.model = width, torch.nn.Module()
        self.model.norm = torch.nn.Identity()

    def forward(self, input_ids: torch.Tensor, **_):
        return SimpleNamespace(hidden_states=[torch.zeros(*input_ids.shape, self.width, device=input_ids.device)])


def as_rgb(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of floats in [0, 1] [H, W, 3 or 4], on white where it is transparent."""
    pixels = (image * 255).round().astype(np.uint8)
    if pixels.shape[-1] == 3:
        return pixels
    from PIL import Image

    picture = Image.fromarray(pixels, "RGBA")
    white = Image.new("RGB", picture.size, (255, 255, 255))
    white.paste(picture, mask=picture.getchannel("A"))
    return np.asarray(white)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; copy the pipeline whole") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); copy it again") from None


def _diffusers() -> str:
    import diffusers

    return diffusers.__version__


def short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
