"""The networks that rewards use, small and of random weights, as transformers saves them."""

from pathlib import Path

import torch

WORDS = ["<pad>", "<end>", "a", "red", "cat", "blue", "dog", "<unk>"]
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
