"""Which modules a LoRA adapts by name, and which adapters are taken for plain LoRA."""

import json

import pytest
import torch
from safetensors.torch import save_file

from qirl.errors import UserError
from qirl.models.adapter_files import read_adapter
from qirl.models.adapters import PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS
from qirl.models.lora import TARGETS, add_lora
from qirl.models.qwen_image_21 import QwenImage21, QwenImage21Config

SIZE = QwenImage21Config(
    in_channels=16, out_channels=16, num_layers=2, attention_head_dim=32, num_attention_heads=2, context_in_dim=64,
    axes_dims_rope=(8, 12, 12),
)  # fmt: skip


def trained(targets):
    model = add_lora(QwenImage21(SIZE), 4, 8, targets)
    return {n.split(".lora_")[0].split(".", 2)[2] for n, _ in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize(
    "targets, modules",
    [
        (("to_q", "to_k"), {"attn.to_q", "attn.to_k"}),
        (("attn.to_q", "attn.to_k", "proj"), {"attn.to_q", "attn.to_k", "img_mlp.proj"}),
        (("attn.to_out.0", "img_mlp.out"), {"attn.to_out.0", "img_mlp.out"}),
        (TARGETS, {f"attn.to_{x}" for x in ("q", "k", "v", "out.0")} | {f"img_mlp.{x}" for x in ("proj", "gate_layer", "out")}),
    ],
)  # fmt: skip
def test_targets_are_the_ends_of_paths_as_in_pefts_lists(targets, modules):
    assert trained(targets) == modules


@pytest.mark.parametrize(
    "targets, message",
    [
        (("to_q", "to_kk"), "called 'to_kk'; did you mean 'to_k'"),
        (("to_(q",), "called 'to_\\(q'; did you mean 'to_q'"),
        (("attn.to_w",), "called 'attn.to_w'; did you mean 'attn.to_"),
        (("o_q",), "called 'o_q'"),
        (("img_in",), "called 'img_in'"),
    ],
)
def test_a_target_that_names_nothing_is_refused_with_the_nearest(targets, message):
    with pytest.raises(UserError, match=message):
        add_lora(QwenImage21(SIZE), 4, 8, targets)


def adapter(folder, **changes):
    from peft import LoraConfig

    LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"]).save_pretrained(str(folder))
    config = json.loads((folder / PEFT_CONFIG).read_text()) | changes
    (folder / PEFT_CONFIG).write_text(json.dumps(config))
    save_file({f"{PEFT_PREFIX}x.lora_{k}.weight": torch.zeros(2, 2) for k in "AB"}, folder / PEFT_WEIGHTS)
    return folder


@pytest.mark.parametrize(
    "changes, scale", [({}, 2.0), ({"use_rslora": True}, 4 / 2**0.5), ({"init_lora_weights": "gaussian"}, 2.0)]
)
def test_plain_adapters_as_peft_writes_them_are_read(tmp_path, changes, scale):
    assert read_adapter(adapter(tmp_path, **changes)).matrices["x"].scale == pytest.approx(scale)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base as well; convert"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base as well"),
        ({"init_lora_weights": "olora"}, "changes the base as well"),
        ({"init_lora_weights": "corda"}, "changes the base as well"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not LoRA"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"rank_pattern": {"x": 4}}, "'x' has rank 2, its config says 4"),
        ({"rank_pattern": {"x": 0}}, "rank_pattern.x=0 must be a whole number of at least 1"),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern=.* must give numbers by module names"),
        ({"alpha_pattern": {"x": "4"}}, "alpha_pattern.x='4' must be a number"),
        ({"use_rslora": "yes"}, "use_rslora='yes' must be true or false"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path=3 must be text"),
        ({"modules_to_save": ["img_in"]}, "modules_to_save=.* is not supported"),
        ({"from_the_future": 3}, "from_the_future=3 is not supported"),
        ({"r": 0}, "r=0 must be a whole number of at least 1"),
        ({"r": "8"}, "r='8' must be a whole number"),
        ({"lora_alpha": None}, "lora_alpha=None must be a number"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_field(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_adapter(adapter(tmp_path, **changes))
