"""HPSv3 against transformers' Qwen2-VL and its head, written out; random weights under both spellings of their names."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_judges import save_judge
from tiny_rewards import HPS_WIDTHS, INSTRUCTION, save_hps_v3
from torch.nn.functional import linear, relu
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from qirl.config_parts import HpsV3Options
from qirl.errors import UserError
from qirl.rewards.parts import hps_v3
from qirl.rewards.parts.hps_v3 import HpsV3
from qirl.rewards.protocol import Sample


@pytest.fixture(scope="module", autouse=True)
def small_images():
    patch = pytest.MonkeyPatch()
    patch.setattr(hps_v3, "PIXELS", 16 * 8 * 8)  # the tiny model's patches are 4 pixels, merged 2 x 2
    yield
    patch.undo()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(folder of Qwen2-VL, HPSv3's own state, folder of its files)."""
    return save_hps_v3(tmp_path_factory.mktemp("hps"))


def reward(parts, state=None, **changes):
    folder, whole, own = parts
    save_file({n: t.contiguous() for n, t in (state or whole).items()}, own / "h.safetensors")
    given = dict(model=str(folder), weights=str(own / "h.safetensors"), instruction=str(own / "instruction.txt"))
    return HpsV3("x", HpsV3Options(**given | dict(low=-50, high=50) | changes))


def samples(*prompts):
    draw = np.random.default_rng(0)
    sizes = [(40, 24), (16, 48), (33, 33), (64, 64)]
    images = [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return [Sample(i, 0, prompt, image) for i, (prompt, image) in enumerate(zip(prompts, images, strict=False))]


def expected(parts, sample, prompt):
    """The formula: the head on the last state at the token of its own."""
    folder, state, _ = parts
    words = AutoTokenizer.from_pretrained(folder)
    words.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    model.resize_token_embeddings(len(words))
    model.load_state_dict({n: t for n, t in state.items() if not n.startswith("rm_head")}, strict=False)
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    images.size = {"shortest_edge": 1024, "longest_edge": 1024}
    seen = images([sample.image], return_tensors="pt")
    count = int(seen["image_grid_thw"].prod()) // 4
    text = (
        f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"
        f"{INSTRUCTION.replace('{text_prompt}', prompt)}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = words(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = model.model(
            input_ids=ids, pixel_values=seen["pixel_values"], image_grid_thw=seen["image_grid_thw"],
            mm_token_type_ids=(ids == words.convert_tokens_to_ids("<|image_pad|>")).long(),
        ).last_hidden_state  # fmt: skip
        x = states[0, ids[0].tolist().index(words.convert_tokens_to_ids("<|Reward|>"))]
        for place in HPS_WIDTHS:
            x = linear(x, state[f"rm_head.{place}.weight"], state[f"rm_head.{place}.bias"])
            x = relu(x) if place != 5 else x
    return float(x[0])


def test_the_score_is_the_mean_of_the_head_at_its_token(parts):
    given = samples("a red 7", "a blue <|Reward|> dog and a long tail of words", "cat")
    found = reward(parts, batch=2)(given)
    prompts = ["a red 7", "a blue ‹|Reward|› dog and a long tail of words", "cat"]
    wanted = [expected(parts, sample, prompt) for sample, prompt in zip(given, prompts, strict=True)]
    assert [100 * row["x"] - 50 for row in found] == pytest.approx(wanted, abs=2e-4) and np.ptp(wanted) > 1e-3
    assert reward(parts)(samples(" ")) == [{}]


def test_the_names_of_older_transformers_are_the_same_model(parts):
    _, state, _ = parts
    older = {
        n.replace("model.visual.", "visual.").replace("model.language_model.", "model."): t for n, t in state.items()
    }
    assert older.keys() != state.keys()
    given = samples("a red 7", "cat")
    assert reward(parts, older)(given) == reward(parts)(given)


def test_what_is_no_hps_v3_is_refused(parts, tmp_path):
    folder, state, own = parts
    with pytest.raises(UserError, match="lacks 1 of .* tensors, such as that for visual.merger.mlp.2.bias"):
        reward(parts, {n: t for n, t in state.items() if n != "model.visual.merger.mlp.2.bias"})
    with pytest.raises(UserError, match="rm_head ends in 6 numbers, not in mean and spread"):
        reward(parts, {n: t for n, t in state.items() if not n.startswith("rm_head.5")})
    with pytest.raises(UserError, match="is no HPSv3 .*the head has no layers"):
        reward(parts, {n: t for n, t in state.items() if not n.startswith("rm_head")})
    with pytest.raises(UserError, match="makes <|Reward|> number"):
        words = "model.language_model.embed_tokens.weight"
        reward(parts, state | {words: state[words][:-1]})
    (tmp_path / "i.txt").write_text("Is it {text_prompt}?")
    with pytest.raises(UserError, match="i.txt must hold {text_prompt} and, once, <.Reward.>"):
        reward(parts, instruction=str(tmp_path / "i.txt"))
    with pytest.raises(UserError, match="is a qwen3_vl model; it must be one of qwen2_vl"):
        reward(parts, model=str(save_judge(tmp_path / "other")))
    with pytest.raises(ValueError, match="kind hps_v3 needs `instruction`"):
        HpsV3Options(model="m", weights="w")
