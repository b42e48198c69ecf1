"""Complete Qwen-Image pipelines of random weights, small enough for tests, in the folders that diffusers writes."""

import json
from pathlib import Path

import torch
from tiny_judges import save_judge
from transformers import AutoTokenizer

from qirl.families.vision_language import TextAndImages

WIDTH = 48  # of the text encoders
SCHEDULER = dict(
    base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02,
    use_dynamic_shifting=True, time_shift_type="exponential",
)  # fmt: skip
CLASSES = {
    "QwenImage21Pipeline": "qwen3_vl",
    "QwenImagePipeline": "qwen2_5_vl",
    "QwenImageEditPipeline": "qwen2_5_vl",
    "QwenImageEditPlusPipeline": "qwen2_5_vl",
}


def parts(folder: Path, kind: str) -> dict:
    """The models of a pipeline, drawn from a seed."""
    import diffusers

    torch.manual_seed(0)
    if kind == "QwenImage21Pipeline":
        vae = diffusers.AutoencoderKLQwenImage21(
            base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1, -0.2, 0.0, 0.3],
            latents_std=[1.0, 2.0, 0.5, 1.5],
        )  # fmt: skip
        transformer = diffusers.QwenImage21Transformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, attention_head_dim=32, num_attention_heads=2, context_in_dim=WIDTH,
            axes_dims_rope=(8, 12, 12),
        )  # fmt: skip
    else:
        vae = diffusers.AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1, -0.2, 0.0, 0.3],
            latents_std=[1.0, 2.0, 0.5, 1.5],
        )  # fmt: skip
        transformer = diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=32, num_attention_heads=2,
            joint_attention_dim=WIDTH, axes_dims_rope=(8, 12, 12), zero_cond_t=kind == "QwenImageEditPlusPipeline",
        )  # fmt: skip
    with torch.no_grad():
        for model, spread in ((vae, 0.3), (transformer, 0.02)):  # so that images follow their latents
            for parameter in model.parameters():
                parameter.add_(spread * torch.randn_like(parameter))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    return {"vae": vae.eval(), "transformer": transformer.eval(), "scheduler": scheduler}


def save_pipeline(folder: Path, kind: str) -> Path:
    """The folder of a pipeline of class `kind`, as its save_pretrained writes it."""
    big = {"patch": 16, "merge": 2} if kind == "QwenImage21Pipeline" else {}
    save_judge(folder / "text_encoder", CLASSES[kind], width=WIDTH, layers=2, **big)
    for name in ("tokenizer", "processor"):
        reader = TextAndImages.load(folder / "text_encoder")
        reader.tokenizer.save_pretrained(folder / name)
        if kind == "QwenImage21Pipeline":  # one token of the text is 32 x 32 pixels of a reference, at any size
            reader.image_processor.patch_size, reader.image_processor.merge_size = 16, 2
            reader.image_processor.size = {"shortest_edge": 64, "longest_edge": 4096 * 4096}
        reader.image_processor.save_pretrained(folder / name)
    for name, part in parts(folder, kind).items():
        part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind, "_diffusers_version": "0.42.1"}))
    return folder


def pipeline(folder: Path, kind: str, transformer: Path | None = None):
    """diffusers' own pipeline of the folder, all of it; the combined processor stands without torchvision's videos."""
    import diffusers
    import transformers

    encoder = {"qwen3_vl": "Qwen3VLForConditionalGeneration", "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration"}
    index = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        "text_encoder": getattr(transformers, encoder[CLASSES[kind]]).from_pretrained(folder / "text_encoder"),
    }
    if kind == "QwenImage21Pipeline":
        index["vae"] = diffusers.AutoencoderKLQwenImage21.from_pretrained(folder / "vae")
        model = diffusers.QwenImage21Transformer2DModel
    else:
        index["vae"] = diffusers.AutoencoderKLQwenImage.from_pretrained(folder / "vae")
        index["tokenizer"] = AutoTokenizer.from_pretrained(folder / "tokenizer")
        model = diffusers.QwenImageTransformer2DModel
    if kind != "QwenImagePipeline":
        index["processor"] = TextAndImages.load(folder / "processor")
    index["transformer"] = model.from_pretrained(transformer or folder / "transformer")
    pipe = getattr(diffusers, kind)(**index)
    pipe.set_progress_bar_config(disable=True)
    return pipe
