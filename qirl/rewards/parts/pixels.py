"""Rewards read off the pixels: what an edit keeps outside its mask, periodic artifacts, diversity inside a group.

outside     SSIM (Wang et al. 2004), averaged over the pixels outside the mask; or LPIPS (Zhang et al. 2018) after the
            source is pasted inside it
artifacts   `qirl.evaluation.artifacts.periodic_peak`
diversity   mean RMS distance to the other images of the same prompt in the call: what the image adds to its group
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from qirl.config_parts import ArtifactOptions, DiversityOptions, OutsideOptions
from qirl.errors import UserError
from qirl.evaluation.artifacts import periodic_peak
from qirl.rewards.protocol import Sample, Scores


class Outside:
    """Applies to edits of one source of the output's size. metadata['mask']: [H, W], true where the edit may be; without
    one the whole image counts. Raises UserError for a mask of another size, or one that leaves nothing."""

    def __init__(self, name: str, options: OutsideOptions):
        self.components, self.options = (name,), options
        try:
            from torchmetrics.functional.image import structural_similarity_index_measure

            self.ssim = structural_similarity_index_measure
            if options.measure == "lpips":
                from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

                self.lpips = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
        except (ImportError, RuntimeError) as error:
            raise UserError(
                f"rewards.{name}: measure {options.measure} needs torchmetrics{' and torchvision' * (options.measure == 'lpips')} "
                f"({error}); where they cannot be had, run it in an environment of its own behind `qirl reward serve`"
            ) from None

    def __call__(self, samples: Sequence[Sample]) -> list[Scores]:
        return [{self.components[0]: self.options.score(self.measure(s))} if self.applies(s) else {} for s in samples]

    def applies(self, sample: Sample) -> bool:
        return bool(sample.sources) and sample.sources[0].shape == sample.image.shape

    def measure(self, sample: Sample) -> float:
        keep = ~mask_of(sample)
        output, source = (
            torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
            for image in (sample.image, sample.sources[0])
        )
        if self.options.measure == "lpips":
            with torch.no_grad():
                return float(self.lpips(torch.where(torch.from_numpy(keep), output, source), source))
        _, whole = self.ssim(output, source, data_range=1.0, return_full_image=True)
        return float(whole[0].mean(0)[torch.from_numpy(keep)].mean())


def mask_of(sample: Sample) -> np.ndarray:
    """bool [H, W]."""
    height, width = sample.image.shape[:2]
    if "mask" not in sample.metadata:
        return np.zeros((height, width), bool)
    mask = np.asarray(sample.metadata["mask"]).astype(bool)
    if mask.shape != (height, width):
        raise UserError(
            f"the mask of sample {sample.id} is {mask.shape}, its image {height} x {width}; they must be of one size"
        )
    if mask.all():
        raise UserError(f"the mask of sample {sample.id} covers the whole image: nothing is left to keep")
    return mask


class Artifacts:
    """Applies to images of 8 x 8 pixels or more."""

    def __init__(self, name: str, options: ArtifactOptions):
        self.components, self.options = (name,), options

    def __call__(self, samples: Sequence[Sample]) -> list[Scores]:
        return [
            {self.components[0]: self.options.score(periodic_peak(s.image))} if min(s.image.shape[:2]) >= 8 else {}
            for s in samples
        ]


class Diversity:
    """Applies where the prompt has other images in the same call: let a micro-group hold whole groups
    (flow.rollout_tokens), or an image is compared with fewer."""

    def __init__(self, name: str, options: DiversityOptions):
        self.components, self.options = (name,), options

    def __call__(self, samples: Sequence[Sample]) -> list[Scores]:
        groups, rows = defaultdict(list), [{} for _ in samples]
        for place, sample in enumerate(samples):
            groups[sample.prompt_id, sample.image.shape].append(place)
        for places in groups.values():
            if len(places) > 1:
                flat = np.stack([samples[i].image.reshape(-1) for i in places]).astype(np.float64) / 255
                for k, place in enumerate(places):
                    others = np.delete(flat, k, 0)
                    distance = np.sqrt(((others - flat[k]) ** 2).mean(1)).mean()
                    rows[place][self.components[0]] = self.options.score(float(distance))
        return rows
