"""HPSv3 (Ma et al. 2025): which of two images people prefer, by Qwen2-VL with a head on one token of its own.

The model reads image and instruction; a head of three linear layers, with ReLU between them, turns the last hidden state
at the token <|Reward|> into mean and spread of the preference. The score is the mean, about 0 to 15. The image is scaled
to 256 patches of 28 x 28 pixels, the size that it was trained with.

The instruction is part of the trained model, and is read from a file: INSTRUCTION and prompt_with_special_token of HPSv3's
hpsv3/dataset/data_collator_qwen.py, one after the other, where {text_prompt} stands for the prompt.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from qirl.config_parts import HpsV3Options
from qirl.errors import UserError
from qirl.parallel.data import device_of
from qirl.rewards.parts.embedding import MeasuredInBatches
from qirl.rewards.parts.preference import fill, head_of, read_state, renamed, under
from qirl.rewards.protocol import Sample
from qirl.rewards.vlm.processor import Processor
from qirl.rewards.vlm.rubric import escape

PIXELS = 256 * 28 * 28
TOKEN, PROMPT = "<|Reward|>", "{text_prompt}"
# names of transformers before and after the vision tower and the language model became siblings
NAMES = ((r"^model\.(visual|language_model)\.", r"\1."), (r"^model\.(?=layers|embed_tokens|norm)", "language_model."))


class HpsV3(MeasuredInBatches):
    """Applies to samples with a prompt."""

    options: HpsV3Options

    def __init__(self, name: str, options: HpsV3Options):
        super().__init__(name, options)
        self.instruction = read_instruction(options.instruction)
        self.processor = Processor.load(options.model, PIXELS, families=("qwen2_vl",), least=PIXELS)
        self.processor.tokenizer.add_special_tokens({"additional_special_tokens": [TOKEN]})
        self.token = self.processor.tokenizer.convert_tokens_to_ids(TOKEN)
        self.device, self._one = device_of(options.device, "device"), threading.Lock()
        self.model, self.head = load(options.model, options.weights, self.token, self.device)

    def _batch(self, samples: Sequence[Sample]) -> torch.Tensor:
        encoded = []
        for sample in samples:
            text = self.instruction.replace(PROMPT, escape(sample.prompt))
            message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
            encoded.append(self.processor.encode([message], [sample.image]))
        inputs = self.processor.batch(encoded, self.device)
        with self._one:
            states = self.model(**inputs).last_hidden_state
            return self.head(states[inputs["input_ids"] == self.token].float())[:, 0].cpu()


def read_instruction(path: str) -> str:
    """Raises UserError for a file that cannot be read, or that lacks the prompt's or the head's place."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); check the path") from None
    if PROMPT not in text or text.count(TOKEN) != 1:
        raise UserError(
            f"{path} must hold {PROMPT} and, once, {TOKEN}; see the documentation of qirl.rewards.parts.hps_v3"
        )
    return text


def load(folder: str, weights: str, token: int, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(model, head) of HPSv3's weights; bfloat16 on a GPU, the head always float32.

    Raises UserError for weights that are incomplete or another model's.
    """
    from transformers import AutoModel

    state = {renamed(name, NAMES): tensor for name, tensor in read_state(weights).items()}
    try:
        model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
        words = len(state["language_model.embed_tokens.weight"])
        head = head_of(under(state, "rm_head."), model.config.get_text_config().hidden_size, torch.nn.ReLU)
        if head[-1].out_features != 2:
            raise ValueError(f"rm_head ends in {head[-1].out_features} numbers, not in mean and spread")
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{weights} is no HPSv3 on {folder} ({error!r}); give HPSv3.safetensors and Qwen2-VL") from None
    if token >= words:
        raise UserError(
            f"{weights} has {words} tokens, {folder} makes {TOKEN} number {token}; give Qwen2-VL's tokenizer"
        )
    model.resize_token_embeddings(words, mean_resizing=False)
    fill(model, state, weights)
    fill(head, under(state, "rm_head."), weights)
    return model.eval().to(device), head.float().eval().to(device)
