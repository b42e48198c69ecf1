"""One adapter in every form that is written for such models, each read by its own library and by qirl: the same weights."""

import json
import shutil

import pytest
import torch
from diffusers import QwenImage21Transformer2DModel
from diffusers.loaders import QwenImageLoraLoaderMixin
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from qirl.config_sections import Lora
from qirl.errors import UserError
from qirl.models.adapter_files import is_adapter, read_adapter
from qirl.models.adapters import DIFFUSERS_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS, save_adapter
from qirl.models.lora import add_lora, merged_state
from qirl.models.weights import load_model

LORA = Lora(rank=3, alpha=7.0, targets=("to_q", "gate_layer", "to_out.0"))
SIZE = dict(
    in_channels=16, out_channels=16, num_layers=2, attention_head_dim=32, num_attention_heads=2, context_in_dim=48,
    axes_dims_rope=(8, 12, 12),
)  # fmt: skip
CLOSE = dict(rtol=0, atol=1e-6)  # float32


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    QwenImage21Transformer2DModel(**SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def state(base):
    """A trained adapter on the base, as an export sees it."""
    model = add_lora(load_model(base), LORA.rank, LORA.alpha, LORA.targets)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def merged(state):
    return merged_state(state, LORA.alpha / LORA.rank)


@pytest.fixture
def saved(tmp_path, state, base):
    save_adapter(state, LORA, str(base), tmp_path / "adapter")
    return tmp_path / "adapter"


class Pipe(QwenImageLoraLoaderMixin):
    """What a pipeline's loader needs of it; the encoders have no part in an adapter."""

    def __init__(self, folder):
        self.transformer, self.hf_device_map = QwenImage21Transformer2DModel.from_pretrained(folder), None
        self.components = {"transformer": self.transformer}


def adapted(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model with a peft adapter, merged by peft."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            (adapter,) = module.lora_A
            found[f"{name}.weight"] = module.base_layer.weight + module.get_delta_weight(adapter)
    return found


def assert_merged(found: dict[str, torch.Tensor], merged: dict[str, torch.Tensor]) -> None:
    assert len(found) == SIZE["num_layers"] * len(LORA.targets)
    for name, value in found.items():
        torch.testing.assert_close(value, merged[name], **CLOSE)


def read(path, base) -> dict[str, torch.Tensor]:
    """The weights as qirl reads the adapter at `path`."""
    assert is_adapter(path)
    model = load_model(base)
    adapter, weights = read_adapter(path).fitted(model, path), dict(model.named_parameters())
    return {f"{n}.weight": weights[f"{n}.weight"] + m.scale * m.b @ m.a for n, m in adapter.matrices.items()}


def test_an_exported_adapter_is_loaded_by_a_pipeline_with_its_defaults(saved, base, merged):
    pipe = Pipe(base)
    pipe.load_lora_weights(saved)
    assert_merged(adapted(pipe.transformer), merged)


def test_an_exported_adapter_is_loaded_by_a_diffusers_model(saved, base, merged):
    model = QwenImage21Transformer2DModel.from_pretrained(base)
    model.load_lora_adapter(saved, use_safetensors=True)
    assert_merged(adapted(model), merged)


def test_an_exported_adapter_is_loaded_by_peft(saved, base, merged):
    model = PeftModel.from_pretrained(load_model(base), saved)
    assert_merged(adapted(model.base_model.model), merged)


def test_both_files_of_an_export_are_read(saved, base, merged):
    assert_merged(read(saved, base), merged)
    assert_merged(read(saved / DIFFUSERS_WEIGHTS, base), merged)
    (saved / PEFT_CONFIG).unlink()
    assert read_adapter(saved).base is None
    assert_merged(read(saved, base), merged)


def test_what_diffusers_writes_is_read(tmp_path, saved, base, merged):
    """From a model (keys without a prefix) and from a pipeline (alpha in the file's metadata)."""
    model = QwenImage21Transformer2DModel.from_pretrained(base)
    config = json.loads((saved / PEFT_CONFIG).read_text())
    model.add_adapter(LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=config["target_modules"]))
    tensors = {
        k.removeprefix("base_model.model.").replace(".weight", ".default.weight"): v
        for k, v in load_file(saved / PEFT_WEIGHTS).items()
    }
    missing = model.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys
    model.save_lora_adapter(tmp_path / "model")
    assert_merged(read(tmp_path / "model", base), merged)
    from peft import get_peft_model_state_dict

    Pipe.save_lora_weights(
        tmp_path / "pipe",
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    assert_merged(read(tmp_path / "pipe", base), merged)


@pytest.mark.parametrize(
    "prefix, joined", [("lora_unet_", "_"), ("lora_transformer_", "_"), ("diffusion_model.", "."), ("", ".")]
)
def test_kohyas_form_is_read(tmp_path, state, base, merged, prefix, joined):
    tensors = {}
    for name, value in state.items():
        if ".lora_" in name:
            module, part = name.removesuffix(".default.weight").rsplit(".lora_", 1)
            stem = prefix + module.replace(".", joined)
            tensors[f"{stem}.lora_{ {'A': 'down', 'B': 'up'}[part] }.weight"] = value
            tensors[f"{stem}.alpha"] = torch.tensor(LORA.alpha)
    save_file(tensors, tmp_path / "style.safetensors", metadata={"ss_network_module": "networks.lora"})
    assert_merged(read(tmp_path / "style.safetensors", base), merged)
    assert_merged(read(tmp_path, base), merged)  # the only weights of a folder


def test_ranks_and_alphas_of_single_modules_are_read_as_peft_reads_them(tmp_path, base):
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["to_q", "to_k"], rank_pattern={"to_k": 4, r"0\.attn\.to_q": 1},
        alpha_pattern={"1.attn.to_q": 9}, use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(2)
    model = get_peft_model(load_model(base), config)
    model.save_pretrained(tmp_path)
    expected, found = adapted(model.base_model.model), read(tmp_path, base)
    assert found.keys() == expected.keys() and {len(m.a) for m in read_adapter(tmp_path).matrices.values()} == {1, 2, 4}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **CLOSE)


def test_what_is_no_adapter_of_a_transformer_is_refused(tmp_path, saved, base):
    def said(change) -> str:
        tensors = load_file(saved / DIFFUSERS_WEIGHTS)
        change(tensors)
        save_file(tensors, tmp_path / "changed.safetensors")
        with pytest.raises(UserError) as error:
            read(tmp_path / "changed.safetensors", base)
        return str(error.value)

    key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    assert "adapts the text encoder too ('text_encoder.x')" in said(
        lambda t: t.update({"text_encoder.x": torch.ones(1)})
    )
    assert "to_q.lora_A.weight' is missing" in said(lambda t: t.pop(key))
    assert "no product of two matrices" in said(lambda t: t.update({key: torch.ones(2, 64)}))
    assert "values that are NaN" in said(lambda t: t[key].fill_(torch.nan))
    assert "no LoRA matrix" in said(lambda t: t.update({"transformer.x.hada_w1_a": torch.ones(1)}))
    assert "alpha' has 2 numbers" in said(lambda t: t.update({key.replace("lora_A.weight", "alpha"): torch.ones(2)}))
    other = key.replace("to_q", "to_w")
    assert "to_w', which the base does not have" in said(
        lambda t: t.update({other: torch.ones(3, 64), other.replace("_A", "_B"): torch.ones(64, 3)})
    )
    assert "the base has [64, 64] there" in said(lambda t: t.update({key: torch.ones(3, 32)}))
    shutil.copy(saved / DIFFUSERS_WEIGHTS, tmp_path / "second.safetensors")
    assert not is_adapter(tmp_path) and not is_adapter(base)  # two files: which?
