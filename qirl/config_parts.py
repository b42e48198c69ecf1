"""Options of the ready-made components, kind by kind."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from qirl.config_sections import DEVICE, Section, option, require


def between(value: float, low: float, high: float) -> float:
    """Where `value` lies from `low` (0) to `high` (1), clipped to [0, 1]; NaN stays NaN."""
    return value if value != value else min(1.0, max(0.0, (value - low) / (high - low)))


class Affine(Section):
    """A measure becomes a score by its two ends: `low` is 0, `high` is 1, what lies beyond is clipped."""

    low: float = option(0.0, "what scores 0")
    high: float = option(1.0, "what scores 1; may lie below `low` where less is better")

    @model_validator(mode="after")
    def _two_ends(self):
        require(self.low != self.high, f"low={self.low:g} and high={self.high:g} are the same; they must differ")
        return self

    def score(self, value: float) -> float:
        """The measure `value` in [0, 1]; NaN stays NaN."""
        return between(value, self.low, self.high)


class Weights(Affine):
    """A measure by a network of transformers."""

    model: str | None = option(None, "folder of its weights, as transformers saves it")
    device: str = option("auto", "where it runs: auto (where the run computes), cpu, cuda, cuda:1, ...", pattern=DEVICE)
    batch: int = option(32, "images at a time", ge=1)

    @model_validator(mode="after")
    def _has_a_model(self):
        require(self.model is not None, f"a reward of kind {self.kind} needs `model`: the folder of its weights")
        return self


class ClipScoreOptions(Weights):
    kind: Literal["clip_score"] = option("clip_score", "how well image and prompt agree: cosine of CLIP embeddings")
    high: float = option(0.4, "cosine that scores 1: CLIPScore multiplies by 2.5")


class PickScoreOptions(Weights):
    kind: Literal["pick_score"] = option("pick_score", "what people would pick: scaled cosine of PickScore's CLIP")
    low: float = option(16.0, "scaled cosine that scores 0")
    high: float = option(26.0, "scaled cosine that scores 1")


class HpsV2Options(Weights):
    kind: Literal["hps_v2"] = option("hps_v2", "what people would pick: 100 times the cosine of HPSv2's CLIP")
    model: str | None = option(None, "folder of a CLIP ViT-H/14 as transformers saves it, with its tokenizer")
    weights: str | None = option(
        None, "HPSv2's own weights as a safetensors file, by open_clip's names; none: those of `model`"
    )
    low: float = option(10.0, "100 times the cosine that scores 0")
    high: float = option(40.0, "100 times the cosine that scores 1")


class ImageRewardOptions(Weights):
    kind: Literal["image_reward"] = option("image_reward", "what people would pick: ImageReward's BLIP, about -2 to 2")
    model: str | None = option(None, "folder of its tokenizer, bert-base-uncased")
    weights: str | None = option(None, "its weights as a safetensors file, by the names of ImageReward.pt")
    low: float = option(-3.0, "reward that scores 0")
    high: float = option(3.0, "reward that scores 1")

    @model_validator(mode="after")
    def _has_weights(self):
        require(self.weights is not None, "a reward of kind image_reward needs `weights`: its safetensors file")
        return self


class HpsV3Options(Weights):
    kind: Literal["hps_v3"] = option("hps_v3", "what people would pick: HPSv3's Qwen2-VL, about 0 to 15")
    model: str | None = option(None, "folder of Qwen2-VL-7B-Instruct as transformers saves it")
    weights: str | None = option(None, "HPSv3's own weights, HPSv3.safetensors")
    instruction: str | None = option(
        None, "text file with HPSv3's instruction, {text_prompt} in it, and its token <|Reward|>"
    )
    batch: int = option(8, "images at a time", ge=1)
    low: float = option(0.0, "mean that scores 0")
    high: float = option(15.0, "mean that scores 1")

    @model_validator(mode="after")
    def _has_its_files(self):
        for name in ("weights", "instruction"):
            require(getattr(self, name) is not None, f"a reward of kind hps_v3 needs `{name}`: a file of HPSv3")
        return self


class AestheticOptions(Weights):
    kind: Literal["aesthetic"] = option("aesthetic", "a linear head on CLIP's image embedding that rates from 1 to 10")
    head: str | None = option(None, "file of the head's weights (.safetensors or .pth)")
    low: float = option(1.0, "rating that scores 0")
    high: float = option(10.0, "rating that scores 1")

    @model_validator(mode="after")
    def _has_a_head(self):
        require(self.head is not None, "a reward of kind aesthetic needs `head`: the file of the head's weights")
        return self


class SimilarityOptions(Weights):
    kind: Literal["similarity"] = option(
        "similarity", "edits: cosine of the output's and the first source's DINO or CLIP embedding"
    )


class OutsideOptions(Affine):
    kind: Literal["outside"] = option("outside", "edits: is the source kept outside of metadata['mask']")
    measure: Literal["ssim", "lpips"] = option(
        "ssim", "structural similarity, or LPIPS (torchmetrics with torchvision; then low=0.5, high=0)"
    )


class ArtifactOptions(Affine):
    kind: Literal["artifacts"] = option("artifacts", "no periodic artifacts: strongest spectral peak over its ring")
    low: float = option(40.0, "decibels that score 0")
    high: float = option(20.0, "decibels that score 1")


class DiversityOptions(Affine):
    kind: Literal["diversity"] = option("diversity", "distance to the prompt's other images that are scored with it")
    high: float = option(0.5, "RMS pixel distance, in [0, 1], that scores 1")


class OcrOptions(Section):
    kind: Literal["ocr"] = option("ocr", "is the text that was asked for written in the image")
    form: Literal["edit_distance", "exact"] = option(
        "edit_distance",
        "1 - edit distance / length of each text, or the share of texts that stand there letter by letter",
    )
    case: bool = option(False, "whether capital letters count")
    threads: int = option(1, "threads of one reader", ge=1)


class FaceOptions(Affine):
    kind: Literal["face_identity"] = option(
        "face_identity", "edits: are the faces of the source the same people in the output"
    )
    backend: Literal["opencv", "insightface"] = option(
        "opencv", "YuNet and SFace in OpenCV (permissive), or an insightface model pack such as AuraFace"
    )
    detector: str | None = option(None, "opencv: file of the detector (face_detection_yunet_*.onnx)")
    embedder: str | None = option(None, "opencv: file of the embedder (face_recognition_sface_*.onnx)")
    pack: str | None = option(None, "insightface: folder of the model pack")
    smallest: float = option(
        0.02, "a face less wide than this share of the image's shorter side is no face", ge=0, lt=1
    )
    weight: Literal["equal", "size"] = option("equal", "whether every source face counts alike, or by its width")
    surplus: float = option(0.0, "what each further face in the output takes off", ge=0, le=1)
    low: float = option(0.0, "cosine that scores 0; `qirl.rewards.parts.faces.fit` finds both from pairs")
    high: float = option(0.8, "cosine that scores 1")

    @model_validator(mode="after")
    def _has_weights(self):
        if self.backend == "opencv":
            require(
                self.detector is not None and self.embedder is not None,
                "face_identity needs `detector` and `embedder`: the files of YuNet and SFace",
            )
        else:
            require(self.pack is not None, "face_identity with insightface needs `pack`: the folder of a model pack")
        return self


PARTS = (
    ClipScoreOptions, PickScoreOptions, HpsV2Options, HpsV3Options, ImageRewardOptions, AestheticOptions,
    SimilarityOptions, OutsideOptions, ArtifactOptions, DiversityOptions, OcrOptions, FaceOptions,
)  # fmt: skip
