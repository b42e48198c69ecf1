"""The networks that rewards use, small and of random weights, as transformers or their authors save them."""

from pathlib import Path

import torch

WORDS = ["<pad>", "<end>", "a", "red", "cat", "blue", "dog", "<unk>"]
BERT = "<pad> [CLS] [SEP] a red cat blue dog <unk> <end>".split()  # the words of ImageReward's tokenizer
SIZE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


def tokenizer(length=None, words=WORDS, template="$A <end>", **more):
    """A tokenizer of words; length: its model_max_length, or none."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(w, i) for i, w in enumerate(words) if w in template]
    own.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    limit = {} if length is None else {"model_max_length": length}
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="<end>", **limit, **more)


def save_clip(folder: Path, length=16) -> Path:
    """A CLIP of 16 positions with a tokenizer of `length`."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    config = CLIPConfig(
        text_config=SIZE | dict(vocab_size=8, max_position_embeddings=16, eos_token_id=1, bos_token_id=None, pad_token_id=0),
        vision_config=SIZE | dict(image_size=32, patch_size=8), projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    tokenizer(length).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


def save_siglip(folder: Path, length=16) -> Path:
    """A SigLIP of 16 positions whose embedding of a text depends on its padding."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    text = dict(
        vocab_size=8, max_position_embeddings=16, projection_size=32, pad_token_id=0, eos_token_id=1, bos_token_id=1
    )
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=SIZE | text, vision_config=SIZE | dict(image_size=32, patch_size=8)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "text" in name and weight.ndim > 1:
                weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    tokenizer(length).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_dino(folder: Path, crop=True) -> Path:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    ).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_center_crop=crop
    ).save_pretrained(folder)
    return folder


def drawn(**shapes) -> dict[str, torch.Tensor]:
    """Random tensors by name; those that end in norm.weight stay near 1."""
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=draw) * 0.15 + (1.0 if name.endswith("orm.weight") else 0.0)
        for name, shape in shapes.items()
    }


def layers(prefix: str, **widths: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of linear layers (input, output) and, where both are 0 and n, of a norm of width n."""
    found = {}
    for name, (a, b) in widths.items():
        found[f"{prefix}{name.replace('__', '.')}.weight"] = (b, a) if a else (b,)
        found[f"{prefix}{name.replace('__', '.')}.bias"] = (b,)
    return found


def open_clip_state(width=32, out=16, words=8, positions=16, patch=8, side=4) -> dict[str, torch.Tensor]:
    """The state of a CLIP of two layers in each encoder, by open_clip's names."""
    shapes = {
        "positional_embedding": (positions, width), "text_projection": (width, out), "logit_scale": (),
        "visual.class_embedding": (width,), "visual.positional_embedding": (side**2 + 1, width), "visual.proj": (width, out),
        "visual.conv1.weight": (width, 3, patch, patch), "token_embedding.weight": (words, width),
        **layers("visual.", ln_pre=(0, width), ln_post=(0, width)), **layers("", ln_final=(0, width)),
    }  # fmt: skip
    for tower in ("visual.transformer", "transformer"):
        for i in range(2):
            at = f"{tower}.resblocks.{i}."
            shapes |= layers(at, ln_1=(0, width), ln_2=(0, width), attn__out_proj=(width, width))
            shapes |= layers(at, mlp__c_fc=(width, 64), mlp__c_proj=(64, width))
            shapes |= {f"{at}attn.in_proj_weight": (3 * width, width), f"{at}attn.in_proj_bias": (3 * width,)}
    return drawn(**shapes)


def image_reward_state(width=128, hidden=64, words=10, patch=8, side=4) -> dict[str, torch.Tensor]:
    """The state of an ImageReward of two layers in each encoder, by its own names."""
    see, read = "blip.visual_encoder.", "blip.text_encoder."
    shapes = {
        f"{see}cls_token": (1, 1, width), f"{see}pos_embed": (1, side**2 + 1, width),
        f"{see}patch_embed.proj.weight": (width, 3, patch, patch), f"{see}patch_embed.proj.bias": (width,),
        f"{read}embeddings.word_embeddings.weight": (words, hidden), "blip.vision_proj.weight": (8, width),
        f"{read}embeddings.position_embeddings.weight": (40, hidden), **layers(see, norm=(0, width)),
        **layers(f"{read}embeddings.", LayerNorm=(0, hidden)),
    }  # fmt: skip
    for i in range(2):
        at = f"{see}blocks.{i}."
        shapes |= layers(
            at, norm1=(0, width), norm2=(0, width), attn__qkv=(width, 3 * width), attn__proj=(width, width)
        )
        shapes |= layers(at, mlp__fc1=(width, 96), mlp__fc2=(96, width))
        at = f"{read}encoder.layer.{i}."
        for kind, source in (("attention", hidden), ("crossattention", width)):
            parts = dict(self__query=(hidden, hidden), self__key=(source, hidden), self__value=(source, hidden))
            shapes |= layers(f"{at}{kind}.", **parts, output__dense=(hidden, hidden), output__LayerNorm=(0, hidden))
        shapes |= layers(
            at, intermediate__dense=(hidden, 96), output__dense=(96, hidden), output__LayerNorm=(0, hidden)
        )
    for place, (a, b) in zip((0, 2, 4, 6, 7), ((hidden, 48), (48, 32), (32, 16), (16, 8), (8, 1)), strict=True):
        shapes |= layers("mlp.layers.", **{str(place): (a, b)})
    return drawn(**shapes)


INSTRUCTION = "Is it {text_prompt}? Preference: <|Reward|>"
HPS_WIDTHS = {0: 8, 3: 6, 5: 2}  # of the head's layers, by their places


def save_hps_v3(folder):
    """(folder of a small Qwen2-VL, HPSv3's own state for it, folder with instruction.txt and room for the state)."""
    from tiny_judges import save_judge
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    base = save_judge(folder / "qwen2", "qwen2_vl", width=48, layers=2)
    (folder / "instruction.txt").write_text(INSTRUCTION)
    model = Qwen2VLForConditionalGeneration.from_pretrained(base)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(base)) + 1)
    torch.manual_seed(1)
    state = {n: t.clone() + 0.02 * torch.randn_like(t) for n, t in model.state_dict().items() if n != "lm_head.weight"}
    width = 48
    for place, out in HPS_WIDTHS.items():
        state |= {f"rm_head.{place}.weight": torch.randn(out, width) / 4, f"rm_head.{place}.bias": torch.randn(out) / 4}
        width = out
    return base, state, folder
