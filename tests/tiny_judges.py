"""Vision-language models of random weights as transformers builds them, and rated pictures of real handwriting for them."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from qirl.data.digits import INKS, PAPERS, bank, paint
from qirl.data.words import DigitSpec, describe

RUBRIC = "Does the image show {request}? Answer with <score>digit</score>."
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLOURS = ("red", "green", "blue", "yellow")


def tokenizer():
    """Byte-level BPE with every digit apart, as the Qwen tokenizers have it, trained on what the judge reads and writes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    pieces = Regex(r"[0-9]|<[a-z/]+>|[^\s\w]+| ?[A-Za-z]+|\s+")
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    own.decoder = decoders.ByteLevel()
    corpus = [RUBRIC, "user\nassistant\nImage: Edited image: Source image 1:", "<think></think><score>1</score>"] * 4
    corpus += [describe(DigitSpec((d,), ink, "black", "colour")) for d in range(10) for ink in INKS if ink != "white"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    own.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=own, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def save_judge(
    folder: Path,
    family: str = "qwen3_vl",
    width: int = 128,
    layers: int = 3,
    seed: int = 0,
    patch: int = 4,
    merge: int = 2,
) -> Path:
    """A model folder: random weights, tokenizer, chat template, image processor. patch: pixels of one of its sides."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessorPil,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
    )

    words = tokenizer()
    ids = {
        name: words.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    end, pad = words.eos_token_id, words.pad_token_id
    tokens = dict(
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    text = dict(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.06, bos_token_id=None, eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=width, intermediate_size=2 * width, num_heads=4, patch_size=patch, spatial_merge_size=merge,
        temporal_patch_size=1, out_hidden_size=width, initializer_range=0.06,
    )  # fmt: skip
    section = [width // 4 // 2 - 2 * (width // 4 // 6), width // 4 // 6, width // 4 // 6]
    torch.manual_seed(seed)
    if family == "qwen3_vl":
        rope = {"rope_type": "default", "mrope_section": section, "mrope_interleaved": True}
        text |= dict(head_dim=width // 4, rope_scaling=rope)
        vision |= dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **tokens))
    elif family == "qwen2_vl":
        text |= dict(rope_scaling={"rope_type": "default", "mrope_section": section})
        seen = dict(depth=2, embed_dim=width, hidden_size=width, num_heads=4, patch_size=4, temporal_patch_size=1)
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=seen, **tokens))
    else:
        text |= dict(rope_scaling={"rope_type": "default", "mrope_section": section})
        vision |= dict(window_size=16, fullatt_block_indexes=[0, 1])
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, pad
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=1, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def picture(digit: int, ink: str, part: str, u: float, shift: tuple[int, int] = (0, 0)) -> np.ndarray:
    """uint8 [16, 16, 3]: one of the part's glyphs of a digit, on black, moved by `shift` pixels."""
    strokes = bank(part)
    cover = np.roll(strokes.cover([strokes.pick(digit, u)]), shift, (0, 1))
    return paint(cover, INKS[ink], PAPERS["black"])


def save_records(folder: Path, train: int, validation: int, seed: int = 0) -> Path:
    """records.jsonl: so many prompts "a red 7", each with four pictures: right (5), another colour (3), another digit (2),
    both (1). Pictures of validation are by handwriting that training does not see."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rubric.txt").write_text(RUBRIC)
    draw, lines = np.random.default_rng(seed), []
    for n in range(train + validation):
        split = "train" if n < train else "validation"
        digit, ink = int(draw.integers(10)), str(draw.choice(COLOURS))
        others = [d for d in range(10) if d != digit], [c for c in COLOURS if c != ink]
        for k, (right_digit, right_ink) in enumerate([(True, True), (True, False), (False, True), (False, False)]):
            shown = (
                digit if right_digit else int(draw.choice(others[0])),
                ink if right_ink else str(draw.choice(others[1])),
            )
            name = f"{n}_{k}.png"
            Image.fromarray(picture(*shown, "reward" if split == "train" else "judge", draw.random())).save(
                folder / name
            )
            request = describe(DigitSpec((digit,), ink, "black", "colour"))
            seen = describe(DigitSpec((shown[0],), shown[1], "black", "colour"))
            lines.append(
                {"images": [name], "rubric": str(folder / "rubric.txt"), "prompt": request,
                 "score": (5, 3, 2, 1)[k], "reasoning": seen, "split": split}
            )  # fmt: skip
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
