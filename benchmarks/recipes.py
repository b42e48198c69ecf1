"""What `--dry-run` predicts of the recipes for Qwen-Image, on the true shapes and without any weights.

    python benchmarks/recipes.py [RECIPE ...] [--out FILE.md]

Stand-ins of the pipelines are written first: true configs, weight files that are all header, a small tokenizer. A prompt
has here about as many tokens as a sentence of thirty words.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from tiny_judges import tokenizer  # noqa: E402
from tiny_pipelines import SCHEDULER  # noqa: E402

from qirl import config as configuration  # noqa: E402
from qirl.models.qwen_image import QwenImage, QwenImageConfig  # noqa: E402
from qirl.models.qwen_image_21 import QwenImage21, QwenImage21Config  # noqa: E402
from qirl.models.weight_files import NAME  # noqa: E402
from qirl.models.weights import save_config  # noqa: E402
from qirl.paths import configs  # noqa: E402
from qirl.plan import PHASES, plan  # noqa: E402

OTHERS = ("distill", "curate", "sft")  # of other commands than train
PROMPT = (
    "a red seven and a blue four in thick ink on old yellow paper, seen from the side in the light of a winter morning"
)


def stand_in(folder: Path, kind: str) -> Path:
    """A pipeline's folder as far as a plan reads it."""
    first = kind != "QwenImage21Pipeline"
    config = QwenImageConfig() if first else QwenImage21Config()
    with torch.device("meta"):
        model = (QwenImage if first else QwenImage21)(config)
    for part in ("transformer", "vae", "text_encoder", "scheduler"):
        (folder / part).mkdir(parents=True)
    save_config(config, folder / "transformer")
    hollow(model.state_dict(), folder / "transformer")
    vae = {"z_dim": 16, "temperal_downsample": [False, True, True]} if first else {"z_dim": 64}
    (folder / "vae/config.json").write_text(json.dumps(vae))
    (folder / "text_encoder/config.json").write_text(json.dumps({"hidden_size": 3584 if first else 4096}))
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    for part in ("tokenizer", "processor"):
        tokenizer().save_pretrained(folder / part)
        images = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14 if first else 16, "merge_size": 2}
        images["size"] = {"shortest_edge": 3136, "longest_edge": 12845056}
        (folder / part / "preprocessor_config.json").write_text(json.dumps(images))
    return folder


def hollow(state: dict[str, torch.Tensor], folder: Path) -> None:
    """safetensors in bfloat16 with an index, whose headers are true and whose values are holes in the files."""
    split = split_torch_state_dict_into_shards(
        state, filename_pattern=NAME + "{suffix}.safetensors", max_shard_size="2GB"
    )
    (folder / f"{NAME}.safetensors.index.json").write_text(json.dumps({"weight_map": split.tensor_to_filename}))
    for filename, names in split.filename_to_tensors.items():
        header, at = {}, 0
        for name in names:
            end = at + 2 * state[name].numel()
            header[name] = {"dtype": "BF16", "shape": list(state[name].shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / filename).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + at)


def prompt_file(folder: Path, task: str) -> Path:
    """Eight prompts; for edits with one source each."""
    from PIL import Image

    path = folder / f"{task}.jsonl"
    Image.new("RGB", (640, 480)).save(folder / "source.png")
    own = {"sources": ["source.png"]} if task == "edit" else {}
    path.write_text("".join(json.dumps({"text": f"{PROMPT} {i}", **own}) + "\n" for i in range(8)))
    return path


def predicted(name: str, folder: Path) -> dict:
    """The plan of a recipe, on one rank or, for all parameters, on eight."""
    family, task = name.split("/")
    edit = task.startswith("edit")
    kind = {"qwen_image_21": "QwenImage21Pipeline"}.get(family, f"QwenImage{'EditPlus' if edit else ''}Pipeline")
    pipeline = folder / kind
    if not pipeline.exists():
        stand_in(pipeline, kind)
    overrides = [f"model.path={pipeline}", f"world.prompts={prompt_file(folder, 'edit' if edit else 't2i')}"]
    config = configuration.load("train", configs() / f"{name}.yaml", overrides)
    return plan(config, 8 if task.endswith("full") else 1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    every = sorted(f"{p.parent.name}/{p.stem}" for p in configs().glob("qwen_image*/*.yaml") if p.stem not in OTHERS)
    rows = [
        "| recipe | trained | weights | gradients and optimizer | activations | or decoding an image | per GPU |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in options.recipes or every:
            found = predicted(name, Path(folder))
            memory, gib = found["memory"], 2.0**30
            weights = sum(v for k, v in memory.items() if "weights" in k) / gib
            training = (memory["gradients"] + memory["optimizer"]) / gib
            rows.append(
                f"| {name} | {found['parameters']['trainable'] / 1e6:,.0f} M | {weights:.1f} GiB | {training:.1f} GiB | "
                f"{memory['activations'] / gib:.1f} GiB | {memory[PHASES[2]] / gib:.1f} GiB | {memory['total'] / gib:.1f} GiB |"
            )
            print(rows[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
