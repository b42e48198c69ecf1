"""A judge in this process: `reading.Chat` over transformers. One request at a time; slow, and exact."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from qirl.parallel.data import device_of
from qirl.rewards.vlm.processor import Processor, load_judge
from qirl.rewards.vlm.reading import Written


class LocalChat:
    def __init__(
        self, model: torch.nn.Module, processor: Processor, reasoning_tokens: int = 512, temperature: float = 0.7
    ):
        self.model, self.processor = model.eval(), processor
        self.limit, self.temperature = reasoning_tokens, temperature
        self._one = threading.Lock()

    @classmethod
    def load(
        cls, folder: str | Path, pixels: int, reasoning_tokens: int, temperature: float, device: str = "auto"
    ) -> LocalChat:
        """A model folder on a device, as `device_of` takes it; in bfloat16 on a GPU. Raises UserError as that and `load_judge`
        do."""
        place = device_of(device, "device")
        processor = Processor.load(folder, pixels)
        model = load_judge(folder, torch.bfloat16 if place.type == "cuda" else torch.float32).to(place)
        return cls(model, processor, reasoning_tokens, temperature)

    async def write(self, messages, images: Sequence[np.ndarray], prefix: str, stop: str, seed: int) -> Written:
        return await asyncio.to_thread(self._write, messages, images, prefix, stop, seed)

    async def digits(self, messages, images: Sequence[np.ndarray], prefix: str) -> list[float]:
        return await asyncio.to_thread(self.next_digits, messages, images, prefix)

    @torch.no_grad()
    def next_digits(self, messages, images, prefix: str) -> list[float]:
        return self.next_tokens(messages, images, prefix)[self.processor.digits].tolist()

    @torch.no_grad()
    def next_tokens(self, messages, images, prefix: str) -> torch.Tensor:
        """Log-probabilities of every token as the next one, float32 [vocabulary] on the host."""
        inputs = self.processor.batch([self.processor.encode(messages, images, prefix)], self.model.device)
        with self._one:
            logits = self.model(**inputs, logits_to_keep=1).logits[0, -1]
        return torch.log_softmax(logits.float(), -1).cpu()

    @torch.no_grad()
    def _write(self, messages, images, prefix: str, stop: str, seed: int) -> Written:
        tokenizer = self.processor.tokenizer
        inputs = self.processor.batch([self.processor.encode(messages, images, prefix)], self.model.device)
        drawn = dict(do_sample=self.temperature > 0) | ({"temperature": self.temperature} if self.temperature else {})
        with self._one, torch.random.fork_rng(devices=[self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            out = self.model.generate(
                **inputs, **drawn, max_new_tokens=self.limit, stop_strings=[stop], tokenizer=tokenizer, top_k=0, top_p=1.0,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        new = out[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=False)
        before, found, _ = text.partition(stop)
        if found:
            return Written(before, True)
        end = tokenizer.eos_token or ""
        before, found, _ = text.partition(end) if end else (text, "", "")
        return Written(before, bool(found))
