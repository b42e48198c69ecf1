"""HPSv2 and ImageReward against their formulas, written out on the tensors that their authors publish."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_rewards import BERT, image_reward_state, open_clip_state, save_clip, save_dino, tokenizer
from torch.nn.functional import gelu, layer_norm, linear

from qirl.config import load
from qirl.config_parts import HpsV2Options, ImageRewardOptions
from qirl.errors import UserError
from qirl.rewards.parts.preference import HpsV2, ImageReward, clip_names, cropped, padded
from qirl.rewards.protocol import Sample
from qirl.rewards.registry import build

DRAW = np.random.default_rng(0)
PROMPTS = ["a red cat", "a blue dog " * 20, "cat"]
MEAN, STD = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])


def samples(prompts, *sizes):
    images = [DRAW.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return [Sample(i, 0, prompt, image) for i, (prompt, image) in enumerate(zip(prompts, images, strict=True))]


def saved(state, path):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return str(path)


def attention(query, key, value, heads, mask=None):
    """softmax(q k / sqrt(d) + mask) v of [T, D], [S, D], [S, D]."""
    q, k, v = (x.reshape(len(x), heads, -1).transpose(0, 1) for x in (query, key, value))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return ((scores if mask is None else scores + mask).softmax(-1) @ v).transpose(0, 1).reshape(len(query), -1)


# HPSv2


def clip_features(state, image, ids):
    """(image, text) unit vectors of a CLIP, image normalised [3, H, W], by open_clip's names."""

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def tower(x, name, mask=None):
        for i in range(2):
            at = f"{name}.resblocks.{i}"
            y = linear(norm(x, f"{at}.ln_1"), state[f"{at}.attn.in_proj_weight"], state[f"{at}.attn.in_proj_bias"])
            y = attention(*y.chunk(3, -1), 2, mask)
            x = x + linear(y, state[f"{at}.attn.out_proj.weight"], state[f"{at}.attn.out_proj.bias"])
            y = gelu(linear(norm(x, f"{at}.ln_2"), state[f"{at}.mlp.c_fc.weight"], state[f"{at}.mlp.c_fc.bias"]))
            x = x + linear(y, state[f"{at}.mlp.c_proj.weight"], state[f"{at}.mlp.c_proj.bias"])
        return x

    patches = torch.nn.functional.conv2d(image[None], state["visual.conv1.weight"], stride=8)[0].flatten(1).T
    x = torch.cat([state["visual.class_embedding"][None], patches]) + state["visual.positional_embedding"]
    seen = norm(tower(norm(x, "visual.ln_pre"), "visual.transformer")[0], "visual.ln_post") @ state["visual.proj"]
    causal = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    words = state["token_embedding.weight"][ids] + state["positional_embedding"][: len(ids)]
    read = norm(tower(words, "transformer", causal), "ln_final")[ids.index(1)] @ state["text_projection"]
    return seen / seen.norm(), read / read.norm()


def ids_of(prompt):
    words = {"a": 2, "red": 3, "cat": 4, "blue": 5, "dog": 6}
    return [words[w] for w in prompt.split()][:15] + [1]


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """(folder of a CLIP, other weights by open_clip's names, their file)."""
    folder = save_clip(tmp_path_factory.mktemp("hps"))
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("quick_gelu", "gelu"))
    state = open_clip_state()
    return folder, state, saved(state, folder / "hps.safetensors")


def test_hps_v2_is_the_scaled_cosine_of_open_clips_tensors(hps):
    folder, state, weights = hps
    reward = HpsV2("h", HpsV2Options(model=str(folder), weights=weights, low=-100, high=100, batch=2))
    given = samples(PROMPTS, (32, 32), (32, 32), (32, 32))
    for sample, row in zip(given, reward(given), strict=True):
        pixels = (torch.from_numpy(sample.image) / 255 - MEAN) / STD
        image, text = clip_features(state, pixels.permute(2, 0, 1), ids_of(sample.prompt))
        assert row["h"] * 200 - 100 == pytest.approx(100 * float(image @ text), abs=1e-3)  # float32, of 200
    assert reward([Sample(0, 0, " ", given[0].image)]) == [{}]


def test_hps_v2_of_a_folder_is_that_of_its_file(hps, tmp_path):
    from transformers import CLIPModel

    folder, state, weights = hps
    model = CLIPModel.from_pretrained(folder)
    model.load_state_dict(clip_names(state))
    model.save_pretrained(tmp_path)
    tokenizer(16).save_pretrained(tmp_path)
    given = samples(PROMPTS, (32, 32), (20, 40), (50, 30))
    from_folder, from_file = (
        HpsV2("h", HpsV2Options(low=-100, high=100, **own))(given)
        for own in (dict(model=str(tmp_path)), dict(model=str(folder), weights=weights))
    )
    assert [row["h"] for row in from_folder] == pytest.approx([row["h"] for row in from_file], abs=1e-6)


@pytest.mark.parametrize(
    "size,kept", [((64, 32), (32, 16)), ((20, 32), (20, 32)), ((3, 400), (1, 32)), ((32, 32), (32, 32))]
)
def test_hps_v2_scales_the_longer_side_and_pads_with_black(size, kept):
    found = padded(np.full((*size, 3), 255, np.uint8), 32)[0].permute(1, 2, 0) * STD + MEAN
    top, left = (32 - kept[0]) // 2, (32 - kept[1]) // 2
    wanted = torch.zeros(32, 32, 3)
    wanted[top : top + kept[0], left : left + kept[1]] = 1
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


# ImageReward


def reward_of(state, image, ids):
    """The reward of a normalised image [3, H, W] and a prompt's tokens, by the names of ImageReward.pt."""
    see, read = "blip.visual_encoder.", "blip.text_encoder."

    def dense(x, name):
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name, eps):
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    kernel, bias = state[f"{see}patch_embed.proj.weight"], state[f"{see}patch_embed.proj.bias"]
    patches = torch.nn.functional.conv2d(image[None], kernel, bias, stride=8)[0].flatten(1).T
    x = torch.cat([state[f"{see}cls_token"][0], patches]) + state[f"{see}pos_embed"][0]
    for i in range(2):
        at = f"{see}blocks.{i}"
        x = x + dense(
            attention(*dense(norm(x, f"{at}.norm1", 1e-6), f"{at}.attn.qkv").chunk(3, -1), 2), f"{at}.attn.proj"
        )
        x = x + dense(gelu(dense(norm(x, f"{at}.norm2", 1e-6), f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
    seen = norm(x, f"{see}norm", 1e-6)

    def attend(x, source, at):
        query, key, value = (dense(y, f"{at}.self.{n}") for y, n in ((x, "query"), (source, "key"), (source, "value")))
        return norm(dense(attention(query, key, value, 1), f"{at}.output.dense") + x, f"{at}.output.LayerNorm", 1e-12)

    embedded = f"{read}embeddings."
    x = state[f"{embedded}word_embeddings.weight"][ids] + state[f"{embedded}position_embeddings.weight"][: len(ids)]
    x = norm(x, f"{embedded}LayerNorm", 1e-12)
    for i in range(2):
        at = f"{read}encoder.layer.{i}"
        x = attend(attend(x, x, f"{at}.attention"), seen, f"{at}.crossattention")
        y = dense(gelu(dense(x, f"{at}.intermediate.dense")), f"{at}.output.dense")
        x = norm(x + y, f"{at}.output.LayerNorm", 1e-12)
    out = x[0]
    for place in (0, 2, 4, 6, 7):
        out = dense(out, f"mlp.layers.{place}")
    return (float(out) - 0.16717362830052426) / 1.0333394966054072


def bert_ids(prompt):
    return [1] + [BERT.index(w) for w in prompt.split()][:33] + [2]


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_reward")
    tokenizer(words=BERT, template="[CLS] $A [SEP]").save_pretrained(folder)
    state = image_reward_state()
    return folder, state, saved(state, folder / "image_reward.safetensors")


def test_image_reward_is_its_published_formula(image_reward):
    folder, state, weights = image_reward
    reward = ImageReward("i", ImageRewardOptions(model=str(folder), weights=weights, low=-50, high=50, batch=2))
    given = samples(PROMPTS, (32, 32), (32, 32), (32, 32))
    wanted = []
    for sample in given:
        pixels = (torch.from_numpy(sample.image) / 255 - MEAN) / STD
        wanted.append(reward_of(state, pixels.permute(2, 0, 1), bert_ids(sample.prompt)))
    assert [row["i"] * 100 - 50 for row in reward(given)] == pytest.approx(wanted, abs=1e-4)
    assert np.std(wanted) > 0.01  # far above the tolerance: the formula is sensitive to what it is given
    assert reward([Sample(0, 0, "", given[0].image)]) == [{}]


def test_image_reward_sees_the_image_and_reads_the_prompt(image_reward):
    folder, _, weights = image_reward
    reward = ImageReward("i", ImageRewardOptions(model=str(folder), weights=weights, low=-50, high=50))
    image, other = (DRAW.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(2))
    a, b, c = reward([Sample(0, 0, "a cat", image), Sample(1, 0, "a cat", other), Sample(2, 0, "a dog", image)])
    assert len({round(row["i"], 6) for row in (a, b, c)}) == 3


@pytest.mark.parametrize("size", [(32, 48), (47, 32), (35, 32), (64, 64), (3, 90)])
def test_image_reward_cuts_the_middle_of_the_scaled_image(size):
    from PIL import Image

    image = DRAW.integers(0, 256, (*size, 3), dtype=np.uint8)
    found = cropped(image, 32)[0].permute(1, 2, 0) * STD + MEAN
    scaled = [int(32 * side / min(size)) for side in size]
    whole = np.asarray(Image.fromarray(image).resize(scaled[::-1], Image.Resampling.BICUBIC))
    top, left = (int(round((side - 32) / 2.0)) for side in scaled)
    wanted = torch.from_numpy(whole[top : top + 32, left : left + 32] / 255).float()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


# both


def test_weights_in_sixteen_bits_are_read(image_reward, hps, tmp_path):
    for folder, state, _, own, kind in ((*image_reward, ImageRewardOptions, ImageReward), (*hps, HpsV2Options, HpsV2)):
        half = saved({name: tensor.half() for name, tensor in state.items()}, tmp_path / f"{kind.__name__}.safetensors")
        row = kind("x", own(model=str(folder), weights=half, low=-100, high=100))(samples(["a cat"], (32, 32)))[0]
        assert 0 < row["x"] < 1


def test_weights_that_do_not_fit_are_told(hps, image_reward, tmp_path):
    folder, state, _ = image_reward
    clip, clip_state, _ = hps

    def of(state, name="x.safetensors", kind=ImageReward):
        path = tmp_path / name
        saved(state, path) if isinstance(state, dict) else path.write_bytes(state)
        own, model = (ImageRewardOptions, folder) if kind is ImageReward else (HpsV2Options, clip)
        return kind("x", own(model=str(model), weights=str(path)))

    first = "mlp.layers.0.weight"
    for kind, whole in ((ImageReward, state), (HpsV2, clip_state)):
        with pytest.raises(UserError, match="x.pt is no safetensors file .*convert it with torch.load"):
            of(b"\x80\x02}q\x00.", "x.pt", kind)
        name = [n for n in whole if n.endswith("mlp.c_fc.bias") or n.endswith("1.output.dense.bias")][-1]
        with pytest.raises(UserError, match="x.safetensors lacks 1 of .* tensors, such as that for"):
            of({n: t for n, t in whole.items() if n != name}, kind=kind)
        with pytest.raises(UserError, match=re.escape("is [3], the model takes [")):
            of(whole | {name: torch.zeros(3)}, kind=kind)
    with pytest.raises(UserError, match="is no ImageReward"):
        of(clip_state)
    for wrong in (
        {n: t for n, t in state.items() if not n.startswith("mlp.")},
        state | {"mlp.layers.7.weight": torch.zeros(2, 8)},
    ):
        with pytest.raises(UserError, match="the head has no layers|end in 2 numbers, not in one"):
            of(wrong)
    with pytest.raises(UserError, match="the model takes"):
        of(state | {first: torch.zeros(48, 63)})
    with pytest.raises(UserError, match="cannot be read"):
        ImageReward("x", ImageRewardOptions(model=str(folder), weights="/no/such.safetensors"))
    with pytest.raises(UserError, match="has no tokenizer"):
        ImageReward("x", ImageRewardOptions(model=str(tmp_path), weights=str(folder / "image_reward.safetensors")))
    with pytest.raises(UserError, match="is no CLIP model; kind hps_v2 needs one"):
        HpsV2("x", HpsV2Options(model=str(save_dino(tmp_path / "dino"))))


def test_both_are_built_from_a_config(hps, image_reward):
    (clip, _, hps_weights), (folder, _, weights) = hps, image_reward
    given = {
        "h": {"kind": "hps_v2", "model": str(clip), "weights": hps_weights},
        "i": {"kind": "image_reward", "model": str(folder), "weights": weights},
    }
    rewards = build(load("serve", {"rewards": given}).rewards)
    assert [reward.components for reward in rewards] == [("h",), ("i",)]
    for reward in rewards:
        assert all(0 <= value <= 1 for value in reward(samples(["a cat"], (40, 30)))[0].values())
    with pytest.raises(UserError, match="kind image_reward needs `weights`"):
        load("serve", {"rewards": {"i": {"kind": "image_reward", "model": "m"}}})
