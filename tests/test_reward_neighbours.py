"""What a reward gives a sample must not depend on what else is in the call; and every network reads prompts as it was trained."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_rewards import (
    BERT,
    image_reward_state,
    open_clip_state,
    save_clip,
    save_dino,
    save_hps_v3,
    save_siglip,
    tokenizer,
)

from qirl import config_parts as options
from qirl.errors import UserError
from qirl.rewards.parts import embedding, faces, hps_v3, ocr, pixels, preference
from qirl.rewards.parts.faces import Face
from qirl.rewards.protocol import Sample
from qirl.rewards.registry import KINDS

DRAW = np.random.default_rng(0)
LONG = "a red cat a blue dog " * 20
FORMS = {
    "clip": save_clip,
    "clip without a length": lambda folder: save_clip(folder, None),
    "siglip": save_siglip,
    "siglip without a length": lambda folder: save_siglip(folder, None),
}


def picture(*size):
    return DRAW.integers(0, 256, (*size, 3), dtype=np.uint8)


def edits():
    """Samples that differ in all that may matter: the length of the prompt, the size of the image, the number of sources."""
    prompts = ["a red cat", LONG, "cat", 'a "cat" and “dog”', "it's a dog", "a blue dog"]
    sizes = [(32, 32), (32, 32), (40, 64), (40, 64), (64, 40), (64, 40)]
    return [
        Sample(i, i // 2, prompt, picture(*size), sources=tuple(picture(*size) for _ in range(i % 3)))
        for i, (prompt, size) in enumerate(zip(prompts, sizes, strict=True))
    ]


class Corner:
    """A reader of one face per image, whose embedding is its corner's colour."""

    def faces(self, image):
        vector = image[0, 0].astype(np.float32) + 1
        return [Face(float(image.shape[1]), vector / np.linalg.norm(vector))]


def part(kind, folder):
    """A reward of a kind, with small weights in `folder`."""
    if kind in ("clip_score", "pick_score"):
        own, name = {
            "clip_score": (options.ClipScoreOptions, "ClipScore"),
            "pick_score": (options.PickScoreOptions, "PickScore"),
        }[kind]
        return getattr(embedding, name)("x", own(model=str(save_clip(folder)), low=-30, high=30))
    if kind == "hps_v2":
        save_file({n: t.contiguous() for n, t in open_clip_state().items()}, folder / "h.safetensors")
        own = options.HpsV2Options(
            model=str(save_clip(folder)), weights=str(folder / "h.safetensors"), low=-100, high=100
        )
        return preference.HpsV2("x", own)
    if kind == "hps_v3":
        base, state, _ = save_hps_v3(folder)
        save_file({n: t.contiguous() for n, t in state.items()}, folder / "h.safetensors")
        files = {"weights": str(folder / "h.safetensors"), "instruction": str(folder / "instruction.txt")}
        return hps_v3.HpsV3("x", options.HpsV3Options(model=str(base), low=-50, high=50, **files))
    if kind == "image_reward":
        tokenizer(words=BERT, template="[CLS] $A [SEP]").save_pretrained(folder)
        save_file({n: t.contiguous() for n, t in image_reward_state().items()}, folder / "i.safetensors")
        own = options.ImageRewardOptions(model=str(folder), weights=str(folder / "i.safetensors"), low=-50, high=50)
        return preference.ImageReward("x", own)
    if kind == "aesthetic":
        torch.manual_seed(0)
        save_file({"0.weight": torch.randn(1, 16), "0.bias": torch.zeros(1)}, folder / "head.safetensors")
        head = str(folder / "head.safetensors")
        return embedding.Aesthetic(
            "x", options.AestheticOptions(model=str(save_clip(folder)), head=head, low=-9, high=9)
        )
    if kind == "similarity":
        return embedding.Similarity("x", options.SimilarityOptions(model=str(save_dino(folder, crop=False)), low=-1))
    if kind == "face_identity":
        own = options.FaceOptions(detector="d", embedder="e", high=1.0)
        return faces.FaceIdentity("x", own, Corner())
    build = {
        "outside": lambda: pixels.Outside("x", options.OutsideOptions(low=-1)),
        "artifacts": lambda: pixels.Artifacts("x", options.ArtifactOptions(low=100, high=-100)),
        "diversity": lambda: pixels.Diversity("x", options.DiversityOptions()),
        "ocr": lambda: ocr.Ocr("x", options.OcrOptions()),
    }
    return build[kind]()


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"judge", "server"}))
def test_a_score_does_not_depend_on_the_other_samples_of_the_call(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(hps_v3, "PIXELS", 1024)  # the tiny model's patches are 4 pixels
    reward, given = part(kind, tmp_path), edits()
    together, backwards = reward(given), reward(given[::-1])[::-1]
    alone = [reward([sample])[0] for sample in given]
    if kind == "diversity":  # a distance inside the prompt's group: the other groups must not matter
        alone = [row for i in range(0, len(given), 2) for row in reward(given[i : i + 2])]
    assert any(together)
    for rows in (together, backwards):
        assert [row.keys() for row in rows] == [row.keys() for row in alone]
        for row, own in zip(rows, alone, strict=True):
            assert row.get("x", 0) == pytest.approx(own.get("x", 0), abs=1e-5)  # float32 in another order
    values = [row["x"] for row in together if row]
    assert kind in ("ocr", "diversity") or len(values) < 2 or np.ptp(values) > 1e-4  # the score is not the same for all


def cosine(folder, form, sample):
    """The cosine of one pair, its prompt as transformers' documentation of the model has it prepared."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model, reader = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = reader([sample.prompt], truncation=True, max_length=16, return_tensors="pt")["input_ids"]
    if form.startswith("siglip"):  # its last position is read: all 16 are filled, and no mask
        ids = torch.nn.functional.pad(ids, (0, 16 - ids.shape[1]), value=reader.pad_token_id)
    pixel = AutoImageProcessor.from_pretrained(folder, backend="pil")(
        [Image.fromarray(sample.image)], return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        both = model.get_text_features(input_ids=ids), model.get_image_features(pixel_values=pixel)
    text, image = (out if isinstance(out, torch.Tensor) else out.pooler_output for out in both)
    return torch.cosine_similarity(text, image).item()


@pytest.mark.parametrize("form", FORMS)
def test_prompts_are_read_as_the_model_was_trained_on_them(form, tmp_path):
    folder = FORMS[form](tmp_path)
    reward = embedding.ClipScore("c", options.ClipScoreOptions(model=str(folder), low=-1.0, high=1.0, batch=2))
    given = [Sample(i, i, prompt, picture(40, 48)) for i, prompt in enumerate(["a red cat", LONG, "dog", "a blue dog"])]
    wanted = [(cosine(folder, form, sample) + 1) / 2 for sample in given]
    for rows in (reward(given), [reward([sample])[0] for sample in given], reward(given[::-1])[::-1]):
        assert [row["c"] for row in rows] == pytest.approx(wanted, abs=1e-5)


def test_robertas_positions_begin_after_those_of_padding():
    from transformers import RobertaConfig, RobertaModel

    size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=8)
    model = RobertaModel(RobertaConfig(max_position_embeddings=18, pad_token_id=1, **size))
    length = embedding.positions(model)
    assert length == 16
    model(torch.full((1, length), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, length + 1), 5))


@pytest.mark.parametrize("height,width", [(3, 40), (40, 3), (1, 40), (3, 3)])
def test_a_thin_image_is_not_taken_for_one_with_its_channels_first(height, width, tmp_path):
    reward = embedding.ClipScore("c", options.ClipScoreOptions(model=str(save_clip(tmp_path)), low=-1.0, high=1.0))
    thin = Sample(0, 0, "a cat", picture(height, width))
    assert reward([thin])[0]["c"] == pytest.approx((cosine(tmp_path, "clip", thin) + 1) / 2, abs=1e-5)


def test_a_model_that_answers_in_words_is_no_clip(tmp_path):
    from tiny_judges import save_judge

    save_judge(tmp_path, width=32, layers=1)
    with pytest.raises(UserError, match="is no CLIP model"):
        embedding.ClipScore("c", options.ClipScoreOptions(model=str(tmp_path)))
