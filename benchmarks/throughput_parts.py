"""The parts beside the transformer, with random weights of their true shapes: the autoencoder and the text encoder.

decode   the autoencoder makes a picture of each finished image, one at a time, as uint8 on the host.
encode   the text encoder reads each prompt, and under guidance its unconditional twin, references included; the autoencoder makes
         latents of the references. A run does this once for a prompt, whatever the number of its steps.

They run before and after the transformer, which is not on the device then, so they need no memory beside it. Sizes: Qwen3-VL 8B
and Qwen2.5-VL 7B, from their published config.json; the autoencoders' are diffusers' defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from throughput_cases import NEGATIVE, Setting, draw_weights

from qirl.engine import DTYPES

AUTOENCODERS = {"qwen_image_21": "AutoencoderKLQwenImage21", "qwen_image": "AutoencoderKLQwenImage"}
KINDS = {"qwen_image_21": "Qwen3VL", "qwen_image": "Qwen2_5_VL"}
TEXT = {
    "qwen_image_21": dict(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936,
    ),
    "qwen_image": dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        head_dim=128, vocab_size=152064,
    ),
}  # fmt: skip
VISION = {
    "qwen_image_21": dict(
        depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, out_hidden_size=4096, patch_size=16,
        deepstack_visual_indexes=[8, 16, 24],
    ),
    "qwen_image": dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584, patch_size=14),
}  # fmt: skip
# the same, small: for a CPU
TINY_TEXT = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    vocab_size=512,
)  # fmt: skip
_VISION = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64)
TINY_VISION = {
    "qwen_image_21": _VISION | {"deepstack_visual_indexes": [0, 1]},
    "qwen_image": _VISION | {"fullatt_block_indexes": [1]},
}
TINY_AUTOENCODER = {
    "qwen_image_21": dict(base_dim=4, decoder_base_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1),
    "qwen_image": dict(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
}
EDIT_SIDE = 392  # pixels of a source as the encoder of 1.x sees it: CONDITION_IMAGE_SIZE of diffusers, in whole patches


def phases(setting: Setting, device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, run) of decode, then of encode; each part is on the device until the next one is asked for.

    Raises ImportError where diffusers or transformers is missing.
    """
    vae = _autoencoder(setting, device)
    yield "decode", lambda: _decode(vae, setting, device)
    if not setting.references:
        del vae
    encoder, inputs = _encoder(setting, device)
    pictures = range(setting.references * setting.prompts)

    @torch.no_grad()
    def encode():
        for _ in range(setting.prompts):
            for own in inputs:
                encoder(**own, output_hidden_states=True, logits_to_keep=1)
        for _ in pictures:
            vae.encode(torch.zeros(1, _channels(vae), 1, setting.height, setting.width, device=device, dtype=vae.dtype))

    yield "encode", encode


def _channels(vae) -> int:
    """Of its pictures: 3, or 4 with transparency."""
    return getattr(vae.config, "input_channels", None) or vae.encoder.conv_in.in_channels


def _autoencoder(setting: Setting, device: str):
    import diffusers

    small = TINY_AUTOENCODER[setting.family] if setting.size == "tiny" else {}
    with torch.device("meta"):
        vae = getattr(diffusers, AUTOENCODERS[setting.family])(**small)
    torch.nn.Module.to(vae, DTYPES[setting.dtype]).to_empty(device=device)
    draw_weights(vae, 0)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def _decode(vae, setting: Setting, device: str) -> list:
    shape = vae.config.z_dim, 1, setting.height // _downscale(setting), setting.width // _downscale(setting)
    pictures = []
    for _ in range(setting.images):
        latents = torch.randn(1, *shape, device=device, dtype=vae.dtype)
        picture = vae.decode(latents, return_dict=False)[0][0, :, 0].float()
        pictures.append(((picture / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu())
    return pictures


def _downscale(setting: Setting) -> int:
    """Pixels of a latent's side."""
    return 16 if setting.family == "qwen_image_21" else 8


def _encoder(setting: Setting, device: str) -> tuple[torch.nn.Module, list[dict]]:
    """The text encoder and its inputs: of a prompt, and under guidance of its unconditional twin."""
    import transformers

    kind, tiny = KINDS[setting.family], setting.size == "tiny"
    text = TEXT[setting.family] | (TINY_TEXT if tiny else {})
    sections = text["head_dim"] // 2 - 2 * (text["head_dim"] // 6), *[text["head_dim"] // 6] * 2
    text = text | {"rope_scaling": {"rope_type": "default", "mrope_section": list(sections)}}
    ids = {
        f"{name}_token_id": text["vocab_size"] - 1 - i
        for i, name in enumerate(("image", "video", "vision_start", "vision_end"))
    }
    vision = VISION[setting.family] | (TINY_VISION[setting.family] if tiny else {})
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **ids)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[setting.dtype])
    try:
        with torch.device(device):
            model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    finally:
        torch.set_default_dtype(before)
    lengths = [setting.text, NEGATIVE][: 2 if setting.guidance != 1 else 1]
    return model.eval().requires_grad_(False), [_inputs(setting, config, n, device) for n in lengths]


def _inputs(setting: Setting, config, text: int, device: str) -> dict:
    """What the encoder is given of `text` tokens and the setting's references."""
    vision = config.vision_config
    patch, merge = vision.patch_size, vision.spatial_merge_size
    sides = (setting.height, setting.width) if setting.family == "qwen_image_21" else (EDIT_SIDE, EDIT_SIDE)
    rows, columns = (side // (patch * merge) * merge for side in sides)
    one = [1] + [config.image_token_id] * (rows * columns // merge**2)  # text stands between any two images
    ids = torch.tensor([one * setting.references + [1] * max(1, text - setting.references)], device=device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if setting.references:
        values = 3 * vision.temporal_patch_size * patch**2
        given |= {
            "pixel_values": torch.zeros(
                setting.references * rows * columns, values, device=device, dtype=DTYPES[setting.dtype]
            ),
            "image_grid_thw": torch.tensor([[1, rows, columns]] * setting.references, device=device),
            "mm_token_type_ids": (ids == config.image_token_id).long(),
        }
    return given
