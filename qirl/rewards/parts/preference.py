"""Rewards by networks that were trained on which of two images people prefer: HPSv2 and ImageReward.

hps_v2        100 times the cosine of image and prompt in a CLIP ViT-H/14 (Wu et al. 2023, HPSv2)
image_reward  (r - MEAN) / STD with r = five linear layers on the first token of a text encoder that attends to the image
              (BLIP ViT-L/16; Xu et al. 2023, ImageReward)

Both are published as pickles, which are not read, since they can run code. Convert them once, where you trust them:

    from safetensors.torch import save_file
    state = torch.load("HPS_v2.1_compressed.pt", map_location="cpu", weights_only=True)["state_dict"]
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, "hps_v2.1.safetensors")

ImageReward.pt is the state itself, without ["state_dict"].
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image

from qirl.config_parts import HpsV2Options, ImageRewardOptions
from qirl.errors import UserError
from qirl.parallel.data import device_of
from qirl.rewards.parts.embedding import ClipScore, Embedder, MeasuredInBatches
from qirl.rewards.protocol import Sample

CHANNEL_MEAN = np.float32([0.48145466, 0.4578275, 0.40821073])  # CLIP's
CHANNEL_STD = np.float32([0.26862954, 0.26130258, 0.27577711])
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of ImageReward on its training set
TOKENS = 35  # of a prompt, in ImageReward
HEAD = 64  # width of an attention head, in both encoders of ImageReward

State = dict[str, torch.Tensor]


def read_state(path: str) -> State:
    """The tensors of a safetensors file. Raises UserError for one that is missing or of another format."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); check the path") from None
    except SafetensorError as error:
        raise UserError(
            f"{path} is no safetensors file ({error}); convert it with torch.load(..., weights_only=True) and "
            "safetensors.torch.save_file, as the documentation of qirl.rewards.parts.preference shows"
        ) from None


def fill(model: torch.nn.Module, state: Mapping[str, torch.Tensor], path: str) -> None:
    """Copies `state` into a model. Raises UserError where tensors are missing or of other shapes; further ones are ignored."""
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of {len(own)} tensors, such as that for {missing[0]}; give the whole weights"
        )
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise UserError(
                f"{path}: the tensor for {name} is {list(state[name].shape)}, the model takes {list(tensor.shape)}; it is "
                "another model's"
            )
    model.load_state_dict({name: state[name] for name in own})


# HPSv2


class HpsEmbedder(Embedder):
    def _load(self, options: HpsV2Options) -> torch.nn.Module:
        from transformers import AutoConfig, AutoModel

        if options.weights is None:
            return AutoModel.from_pretrained(options.model, dtype=torch.float32)
        model = AutoModel.from_config(AutoConfig.from_pretrained(options.model)).float()
        fill(model, clip_names(read_state(options.weights)), options.weights)
        return model

    def _prepared(self, image: np.ndarray) -> dict[str, torch.Tensor]:
        return {"pixel_values": padded(image, self.model.config.vision_config.image_size)}


class HpsV2(ClipScore):
    """Applies to samples with a prompt."""

    options: HpsV2Options
    embedder = HpsEmbedder

    def measure(self, samples: Sequence[Sample]) -> torch.Tensor:
        return 100 * super().measure(samples)


def padded(image: np.ndarray, size: int) -> torch.Tensor:
    """float32 [1, 3, size, size] of uint8 [H, W, 3] as HPSv2 takes it: the longer side scaled to `size`, the rest black."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
    scale = size / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    if scale != 1:
        pixels = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    pixels = torch.nn.functional.pad(pixels, (left, size - width - left, top, size - height - top))
    mean, std = (torch.from_numpy(own)[:, None, None] for own in (CHANNEL_MEAN, CHANNEL_STD))
    return (pixels - mean) / std


CLIP_NAMES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # as transformers spells it
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def clip_names(state: Mapping[str, torch.Tensor]) -> State:
    """open_clip's state of a CLIP by transformers' names: projections transposed, queries, keys and values apart."""
    found: State = {}
    for name, tensor in state.items():
        if name in ("visual.proj", "text_projection"):
            tensor = tensor.T
        name = renamed(name, CLIP_NAMES)
        if "in_proj_" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            found[name] = tensor
    return found


def renamed(name: str, table: Sequence[tuple[str, str]]) -> str:
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    return name


# ImageReward


class ImageReward(MeasuredInBatches):
    """Applies to samples with a prompt, whose first TOKENS tokens count."""

    options: ImageRewardOptions

    def __init__(self, name: str, options: ImageRewardOptions):
        super().__init__(name, options)
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise UserError(f"kind {options.kind} needs transformers ({error}): pip install 'qirl[rewards]'") from None
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        except (OSError, ValueError) as error:
            raise UserError(f"{options.model} has no tokenizer that transformers can load: {error}") from None
        self.device, self._one = device_of(options.device, "device"), threading.Lock()
        self.vision, self.text, self.head = blip(read_state(options.weights), options.weights, self.device)

    def _batch(self, samples: Sequence[Sample]) -> torch.Tensor:
        size = self.vision.config.image_size
        pixels = torch.cat([cropped(sample.image, size) for sample in samples]).to(self.device)
        tokens = self.tokenizer(
            [sample.prompt for sample in samples], padding="max_length", max_length=TOKENS, truncation=True,
            padding_side="right", return_token_type_ids=False, return_tensors="pt",
        ).to(self.device)  # fmt: skip
        with self._one:
            seen = self.vision(pixels).last_hidden_state
            out = self.text(**tokens, encoder_hidden_states=seen).last_hidden_state[:, 0]
            return ((self.head(out)[:, 0] - MEAN) / STD).cpu()


def cropped(image: np.ndarray, size: int) -> torch.Tensor:
    """float32 [1, 3, size, size] of uint8 [H, W, 3] as ImageReward takes it: the shorter side scaled to `size`, cut to the
    middle."""
    height, width = image.shape[:2]
    short = min(height, width)
    height, width = size * height // short, size * width // short
    scaled = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    top, left = round((height - size) / 2), round((width - size) / 2)
    pixels = np.asarray(scaled.crop((left, top, left + size, top + size)), np.float32) / 255
    return torch.from_numpy((pixels - CHANNEL_MEAN) / CHANNEL_STD).permute(2, 0, 1)[None]


BLIP_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"^norm\.", "post_layernorm."),
)


def blip(state: State, path: str, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """(image encoder, text encoder, head) of an ImageReward, all sizes by the shapes of its tensors.

    Raises UserError for weights that are incomplete or another model's.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    seen, read, last = (under(state, own) for own in ("blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."))
    try:
        width, _, patch, _ = seen["patch_embed.proj.weight"].shape
        side = math.isqrt(seen["pos_embed"].shape[1] - 1)
        vision_config = BlipVisionConfig(
            hidden_size=width, num_attention_heads=width // HEAD, num_hidden_layers=_count(seen, r"blocks\.(\d+)\."),
            intermediate_size=len(seen["blocks.0.mlp.fc1.bias"]), patch_size=patch, image_size=patch * side,
            layer_norm_eps=1e-6,
        )  # fmt: skip
        # is_decoder is what gives it cross-attention; its mask stays that of an encoder
        words, hidden = read["embeddings.word_embeddings.weight"].shape
        text_config = BlipTextConfig(
            vocab_size=words, hidden_size=hidden, encoder_hidden_size=width, num_attention_heads=hidden // HEAD,
            num_hidden_layers=_count(read, r"encoder\.layer\.(\d+)\."), is_decoder=True, bos_token_id=None,
            eos_token_id=None, intermediate_size=len(read["encoder.layer.0.intermediate.dense.bias"]),
            max_position_embeddings=len(read["embeddings.position_embeddings.weight"]),
        )  # fmt: skip
        head = head_of(last, hidden)
        if head[-1].out_features != 1:
            raise ValueError(f"mlp.layers end in {head[-1].out_features} numbers, not in one")
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path} is no ImageReward ({error!r}); give the state of ImageReward.pt, by its names"
        ) from None
    vision, text = BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)
    fill(vision, {renamed(name, BLIP_NAMES): tensor for name, tensor in seen.items()}, path)
    fill(text, read, path)
    fill(head, last, path)
    return tuple(part.float().eval().to(device) for part in (vision, text, head))


def head_of(
    state: State, width: int, activation: Callable[[], torch.nn.Module] = torch.nn.Identity
) -> torch.nn.Sequential:
    """Linear layers from `width` on, at the places that the state's names give them, an activation after all but the last.

    What else stands between them (dropout) does nothing when it is read. Raises ValueError where there is none.
    """
    places = sorted({int(name.split(".")[0]) for name in state})
    if not places:
        raise ValueError("the head has no layers")
    layers = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(places[-1] + 1)))
    for place in places:
        layers[place] = torch.nn.Linear(width, width := len(state[f"{place}.weight"]))
        if place != places[-1]:
            layers[place + 1] = activation()
    return layers


def under(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _count(state: State, pattern: str) -> int:
    return 1 + max((int(match[1]) for name in state if (match := re.match(pattern, name))), default=-1)
