"""Families of real models against diffusers' own pipelines, on complete pipelines of random weights: the same noise gives
the same latents and the same images."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import pipeline

from qirl.config_sections import Flow, Model, World
from qirl.data import images
from qirl.data.images import Pictures
from qirl.data.prompts import Prompt
from qirl.errors import UserError
from qirl.families import images_of, targets_of
from qirl.families.registry import family_of
from qirl.flow.rollout import rollout
from qirl.kernels.philox import INITIAL, normal, stream
from qirl.models.folders import find_model
from qirl.models.weights import load_model

pytestmark = pytest.mark.usefixtures("small_references")
T21, T1, EDIT, PLUS = (f"QwenImage{part}Pipeline" for part in ("21", "", "Edit", "EditPlus"))
LATENTS = 1e-4  # largest difference after all steps, float32
STEPS = 4


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QIRL_CACHE", str(tmp_path / "cache"))


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def opened(folder, resolution=64):
    return family_of(World(name="prompts", resolution=resolution), Model(path=str(folder)))


def drawn(folder, prompt, guidance, rescale=False, resolution=64):
    """(our latents, our image, the noise they began with)."""
    family, model = opened(folder, resolution), load_model(find_model(str(folder)))
    family.check(prompt)
    family.prepare([prompt], guidance != 1)
    (target,), draws = targets_of(family, [prompt]), stream(3, [prompt.id], [0], 0)
    flow = Flow(steps=STEPS, guidance=guidance, rescale=rescale)
    family.suits(flow)
    family.fits(model.config)
    out = rollout(model, [family.condition(prompt)], [target], draws, flow, negatives=[family.negative(prompt)])
    zeros, tokens = torch.zeros(target.tokens, dtype=torch.int64), torch.arange(target.tokens)
    noise = normal(draws, zeros, tokens, family.channels, 0, INITIAL)
    return out.latents()[0], images_of(family, out.latents(), [target])[0], noise


CASES = {
    "2.1, square": (T21, Prompt(0, "a red 7")),
    "2.1, odd size": (T21, Prompt(1, "a 3 beside a green 4, drawn in ink", height=70, width=130)),
    "2.1, one source": (T21, Prompt(2, "make it yellow", sources=(picture(50, 90),))),
    "2.1, three sources": (T21, Prompt(3, "put all on one table", sources=(picture(40, 40), picture(90, 30), picture(33, 64, 1)))),
    "1.x, square": (T1, Prompt(4, "a red 7")),
    "1.x, odd size": (T1, Prompt(5, "a 3 beside a green 4", height=50, width=120)),
    "Edit": (EDIT, Prompt(6, "make it yellow", sources=(picture(50, 90),), height=64, width=80)),
    "Edit-Plus, one source": (PLUS, Prompt(7, "make it yellow", sources=(picture(50, 90),))),
    "Edit-Plus, three sources": (PLUS, Prompt(8, "all on one table", sources=(picture(40, 40), picture(90, 30), picture(33, 64, 1)))),
}  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("case", CASES)
def test_the_same_noise_gives_the_image_of_diffusers_pipeline(folders, case, guidance):
    kind, prompt = CASES[case]
    folder, pipe = folders(kind), pipeline(folders(kind), kind)
    latents, image, noise = drawn(folder, prompt, guidance, rescale=kind != T21)
    height, width = (side * 16 for side in opened(folder).size(prompt))
    given = dict(prompt=prompt.text, num_inference_steps=STEPS, latents=noise[None], true_cfg_scale=guidance)
    if prompt.sources:
        own = [Image.fromarray(s) for s in prompt.sources]
        given["image"] = own[0] if kind == EDIT else own
    if kind == T21:
        given["output_resolution"] = 64
    if not (kind == T21 and prompt.sources):
        given |= {"height": height, "width": width}
    if guidance != 1:
        given["negative_prompt"] = " "
    theirs = pipe(**given, output_type="latent").images
    assert float((latents - theirs[0]).abs().max()) <= LATENTS
    shown = pipe(**given, output_type="pil").images[0]
    if shown.mode == "RGBA":
        white = Image.new("RGB", shown.size, (255, 255, 255))
        white.paste(shown, mask=shown.getchannel("A"))
        shown = white
    difference = np.abs(image.astype(int) - np.asarray(shown).astype(int))
    assert image.shape == (height, width, 3) and difference.max() <= 1 and image.std() > 1


def test_conditions_are_made_once_and_read_from_disk_afterwards(folders, monkeypatch):
    family, prompt = opened(folders(T21)), CASES["2.1, one source"][1]
    first = family.condition(prompt)
    again = opened(folders(T21))
    monkeypatch.setattr(type(again), "encode_condition", None)  # would fail
    second = again.condition(prompt)
    assert torch.equal(first.text, second.text) and first.layout == second.layout
    assert torch.equal(first.references[0], second.references[0])
    assert again.condition(prompt) is second
    family.release()
    assert family.pipe().text_encoder is None


@pytest.mark.parametrize(
    "kind, prompt, message",
    [
        (T1, Prompt(0, "x", sources=(picture(40, 40),)), "has 1 source images, .* takes 0"),
        (T1, Prompt(0, "7 " * 1100), r"has \d+ tokens, QwenImagePipeline reads 1024; shorten it"),
        (EDIT, Prompt(0, "x"), "has 0 source images, .* takes 1"),
        (PLUS, Prompt(0, "x", sources=(picture(40, 40),) * 11), "has 11 source images, .* takes 1 to 10"),
        (T21, Prompt(0, "x", sources=(picture(4, 900),)), "source 1 of 'x' has 900 x 4 pixels, which is too thin"),
        (T21, Prompt(0, "x", height=20, width=64), "height=20 of 'x' is below one token of 16 pixels"),
    ],
)
def test_prompts_that_a_pipeline_cannot_take_are_refused(folders, kind, prompt, message):
    with pytest.raises(UserError, match=message):
        opened(folders(kind)).check(prompt)


def test_what_does_not_belong_to_a_pipeline_is_refused(folders, tmp_path, tiny_model):
    own = opened(folders(T21))
    with pytest.raises(
        UserError, match="flow.max_shift=1.15, the scheduler .* has max_shift=0.9.*set flow.max_shift=0.9"
    ):
        own.suits(Flow(max_shift=1.15))
    with pytest.raises(UserError, match="takes 16 channels and text of width .* gives 4 and 48"):
        own.fits(load_model(tiny_model).config)
    with pytest.raises(UserError, match="holds a transformer without the encoders"):
        opened(find_model(str(folders(T21))))
    with pytest.raises(UserError, match="world.name=prompts needs model.path"):
        family_of(World(name="prompts"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="is a FluxPipeline; qirl trains QwenImage21Pipeline"):
        opened(tmp_path / "other")
    (tmp_path / "other/model_index.json").write_text('{"_class_name": "QwenImagePipeline"}')
    with pytest.raises(UserError, match="vae/config.json does not exist; copy the pipeline whole"):
        opened(tmp_path / "other")


@pytest.mark.parametrize("case", CASES)
def test_a_sketch_has_the_sizes_of_the_condition_and_reads_no_weights(folders, case, tmp_path):
    kind, prompt = CASES[case]
    family, bare = opened(folders(kind)), tmp_path / "bare"
    for path in folders(kind).rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            (bare / path.relative_to(folders(kind))).parent.mkdir(parents=True, exist_ok=True)
            (bare / path.relative_to(folders(kind))).write_bytes(path.read_bytes())
    outline = opened(bare)
    for negative, whole in ((False, family.condition(prompt)), (True, family.negative(prompt))):
        sketch = outline.sketch(prompt, negative)
        assert sketch.layout == whole.layout and sketch.shared == whole.shared and sketch.text.shape == whole.text.shape
        assert [r.shape for r in sketch.references] == [r.shape for r in whole.references]


def test_a_pipeline_in_the_digits_world_is_told_where_it_belongs(folders):
    from qirl.models.weights import load_config

    digits = family_of(World())
    with pytest.raises(
        UserError, match="the digits world trains Qwen-Image 2.1's transformer, not QwenImage; set world.name=prompts"
    ):
        digits.fits(load_config(find_model(str(folders(T1)))))
    with pytest.raises(UserError, match="set world.text_dim=48, take another model, or set world.name=prompts"):
        digits.fits(load_config(find_model(str(folders(T21)))))


def test_sources_are_read_for_conditions_once_and_not_kept(folders, tmp_path):
    family, path = opened(folders(T21)), tmp_path / "source.png"
    Image.fromarray(picture(40, 60)).save(path)
    prompt = Prompt(0, "make it red", sources=Pictures([path]))
    family.check(prompt)
    family.prepare([prompt], True)
    size, tokens = family.size(prompt), family.condition_tokens(prompt)
    assert all(isinstance(sources, Pictures) for sources in family._sources.values())
    path.unlink()
    images._remembered.cache_clear()
    assert (family.size(prompt), family.condition_tokens(prompt)) == (size, tokens)
    assert family.condition(prompt).tokens == family.condition(prompt).prefix_tokens == tokens
    assert family.negative(prompt).references[0].equal(family.condition(prompt).references[0])
