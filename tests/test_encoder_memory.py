"""The memory of autoencoders and of rewards in a plan, against what torch counts when they run and what is really loaded."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_judges import save_judge
from tiny_rewards import BERT, image_reward_state, open_clip_state, save_clip, save_dino, save_hps_v3, tokenizer
from tiny_runs import train_config
from torch.distributed._tools.mem_tracker import MemTracker

from qirl.config import load
from qirl.config_sections import Model, World
from qirl.data.prompts import Prompt
from qirl.errors import UserError
from qirl.families.registry import family_of
from qirl.plan import BEFORE, PHASES, plan
from qirl.rewards.costs import reward_bytes
from qirl.rewards.registry import build

pytestmark = pytest.mark.usefixtures("small_references")
T21, T1, PLUS = (f"QwenImage{part}Pipeline" for part in ("21", "", "EditPlus"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QIRL_CACHE", str(tmp_path / "cache"))


def counted(family, run) -> int:
    """Bytes at the peak of `run()`, the autoencoder's weights included, as torch's tracker counts them."""
    vae = family.pipe().vae.requires_grad_(True)  # the tracker hooks into parameters; gradients are off where they run
    tracker = MemTracker()
    tracker.track_external(vae)
    with tracker:
        run()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize("kind", [T21, T1])
@pytest.mark.parametrize("size", [(64, 64), (192, 320)])
def test_an_autoencoder_needs_what_torch_counts_within_ten_percent(folders, kind, size):
    family = family_of(World(name="prompts"), Model(path=str(folders(kind))))
    prompt = Prompt(0, "x", height=size[0], width=size[1])
    tokens = family.size(prompt)
    latents = torch.randn(tokens[0] * tokens[1], family.channels)
    real = counted(family, lambda: family.decode([latents], [tokens]))
    assert family.autoencoder_bytes(tokens) == pytest.approx(real, rel=0.1)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    real = counted(family, lambda: family.encode([image]))
    assert family.autoencoder_bytes(tokens, encoding=True) == pytest.approx(real, rel=0.1)


def edits(folder):
    Image.new("RGB", (90, 60), "red").save(folder / "a.png")
    rows = [
        {"text": "make it blue", "sources": ["a.png"]},
        {"text": "add a dog", "sources": ["a.png"], "height": 160, "width": 96},
    ]
    (folder / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "edits.jsonl"


@pytest.mark.parametrize("kind", [T21, PLUS])
def test_a_plan_has_the_largest_image_and_the_sources_and_phases_are_not_added_up(folders, tmp_path, kind):
    path, prompts = str(folders(kind)), str(edits(tmp_path))
    world = {"name": "prompts", "task": "edit", "prompts": prompts, "resolution": 64}
    values = {"world": world, "model": {"path": path}, "policy": {"prompts": 2, "group": 2}}
    memory = plan(load("train", values))["memory"]
    family = family_of(World(name="prompts", resolution=64), Model(path=path))
    assert memory[PHASES[2]] == family.autoencoder_bytes((160 // 16, 96 // 16))
    side = (96, 64) if kind == PLUS else (64, 64)  # about as many pixels as a reference has
    assert memory[BEFORE[1]] == pytest.approx(family.autoencoder_bytes((side[0] // 16, side[0] // 16), True), rel=0.3)
    stays = sum(size for name, size in memory.items() if name not in (*PHASES, *BEFORE, "total"))
    assert memory["total"] == stays + max(memory[name] for name in PHASES) > max(memory[name] for name in BEFORE)
    pretraining = plan(load("pretrain", {"world": world, "model": {"path": path}, "pretrain": {"batch": 2}}))["memory"]
    assert pretraining[PHASES[2]] == family.autoencoder_bytes((160 // 16, 96 // 16), encoding=True)


def test_the_miniature_has_no_autoencoder(tiny_model, tmp_path):
    memory = plan(train_config(tmp_path, tiny_model))["memory"]
    assert not {PHASES[2], *BEFORE} & memory.keys()


def saved(state, path):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """Options of a reward of every kind that loads a network of transformers."""
    folder = tmp_path_factory.mktemp("rewards")
    clip, dino, judge = (
        str(p) for p in (save_clip(folder / "clip"), save_dino(folder / "dino"), save_judge(folder / "judge"))
    )
    tokenizer(words=BERT, template="[CLS] $A [SEP]").save_pretrained(folder / "bert")
    qwen, state, hps = save_hps_v3(folder / "hps")
    state |= {"lm_head.weight": torch.zeros(300, 48)}  # which the published file has, and the reward does not load
    head = saved({"0.weight": torch.ones(1, 16), "0.bias": torch.ones(1)}, folder / "head.safetensors")
    return {
        "judge": {"kind": "judge", "model": judge}, "clip": {"kind": "clip_score", "model": clip},
        "pick": {"kind": "pick_score", "model": clip}, "same": {"kind": "similarity", "model": dino},
        "nice": {"kind": "aesthetic", "model": clip, "head": head}, "hps": {"kind": "hps_v2", "model": clip},
        "hps_file": {"kind": "hps_v2", "model": clip, "weights": saved(open_clip_state(), folder / "hps.safetensors")},
        "taste": {"kind": "image_reward", "model": str(folder / "bert"), "weights": saved(image_reward_state(), folder / "i.safetensors")},
        "hps3": {"kind": "hps_v3", "model": str(qwen), "weights": saved(state, hps / "h.safetensors"), "instruction": str(hps / "instruction.txt")},
    }  # fmt: skip


def loaded(reward) -> int:
    """Bytes of the parameters of all modules of a reward."""
    owners = (reward, getattr(reward, "embed", None), getattr(reward, "chat", None))
    modules = [m for own in owners if own is not None for m in vars(own).values() if isinstance(m, torch.nn.Module)]
    return sum(p.nbytes for p in {id(p): p for m in modules for p in m.parameters()}.values())


def test_rewards_need_what_is_loaded_within_ten_percent(rewards):
    options = load("serve", {"rewards": rewards}).rewards
    planned = reward_bytes(options)
    assert list(planned) == [f"reward {name}" for name in rewards]
    for name, reward in zip(rewards, build(options), strict=True):
        assert planned[f"reward {name}"] == pytest.approx(loaded(reward), rel=0.1), name


def test_a_plan_counts_rewards_beside_all_phases_and_on_the_host_where_they_are_put_there(folders, rewards, tmp_path):
    world = {"name": "prompts", "task": "edit", "prompts": str(edits(tmp_path)), "resolution": 64}
    values = {"world": world, "model": {"path": str(folders(T21))}, "policy": {"prompts": 2, "group": 2}}
    bare = plan(load("train", values))["memory"]
    own = {"judge": rewards["judge"], "clip": rewards["clip"] | {"device": "cpu"}, "pixels": {"kind": "diversity"}}
    memory = plan(load("train", values | {"rewards": own}))["memory"]
    assert memory.keys() - bare.keys() == {"reward judge", "host, reward clip"}
    assert memory["total"] == bare["total"] + memory["reward judge"]


def test_missing_and_damaged_weights_of_a_reward_are_told(rewards, tmp_path):
    def of(**changes):
        return reward_bytes(load("serve", {"rewards": {"taste": rewards["taste"] | changes}}).rewards)

    with pytest.raises(UserError, match=r"rewards.taste: .*none.safetensors does not exist; check the path"):
        of(weights=str(tmp_path / "none.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"no header")
    with pytest.raises(UserError, match="bad.safetensors is truncated or damaged"):
        of(weights=str(tmp_path / "bad.safetensors"))
    sharded = tmp_path / "clip"
    sharded.mkdir()
    (sharded / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'
    )
    save_file({"a": torch.zeros(3, 4)}, sharded / "one.safetensors")
    clip = load("serve", {"rewards": {"c": {"kind": "clip_score", "model": str(sharded)}}}).rewards
    with pytest.raises(UserError, match="rewards.c: .*two.safetensors does not exist"):
        reward_bytes(clip)
    save_file({"b": torch.zeros(5)}, sharded / "two.safetensors")
    assert reward_bytes(clip) == {"reward c": 4 * 17}
    (sharded / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="is truncated or no index of shards"):
        reward_bytes(clip)
