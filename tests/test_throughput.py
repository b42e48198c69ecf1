"""The throughput benchmark measures the trainer's own step, on what it says, against what computes the same.

(How fast is not tested here.)
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qirl.costs import Flops, forward_flops
from qirl.errors import UserError
from qirl.models.quantised import FrozenLinear
from qirl.parallel.data import leave_group, local

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import throughput as bench  # noqa: E402
import throughput_baselines as baselines  # noqa: E402
import throughput_parts as parts  # noqa: E402
import throughput_profile as profile  # noqa: E402
from throughput_cases import PIXELS, TRUE, Drawn, changed, random_model  # noqa: E402
from throughput_step import Step, peak_of, step_flops  # noqa: E402

FAMILIES = tuple(TRUE)
# words that make any setting small enough for a test
TINY = ["layers=1", "height=64", "width=96", "text=9", "group=2", "steps=3", "nodes=1", "micro=2"]


@pytest.fixture(scope="module", autouse=True)
def no_group_is_left():
    """bfloat16 over float32 weights makes a process group."""
    yield
    leave_group()


def tiny(family=FAMILIES[0], **changes):
    return dataclasses.replace(bench.HEADLINE, family=family, **{**baselines.SMALL, "lora": 4, **changes})


def measured(tmp_path, *words):
    """(exit code, what the JSON says) of the benchmark on the CPU."""
    out = tmp_path / "throughput.json"
    code = bench.main(["--cpu", "--repetitions", "1", "--out", str(out), *words])
    return code, json.loads(out.read_text())


@pytest.mark.parametrize("kind", bench.BASELINES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora, references", [(4, 0), (0, 2)])
def test_a_baseline_gives_the_gradients_and_images_of_qirl(family, kind, lora, references):
    found = baselines.agreement(tiny(family, lora=lora, references=references), kind, "cpu")
    assert 0 < found.gradients <= baselines.AGREE and 0 < found.latents <= baselines.AGREE


def test_a_baseline_that_computes_something_else_is_told(monkeypatch):
    monkeypatch.setattr(baselines, "model_time", lambda t, dtype: t.to(dtype) * 0.99)
    with pytest.raises(AssertionError, match="gradients differ by .* from qirl's"):
        baselines.agreement(tiny(), "same", "cpu")


@pytest.mark.parametrize("kind", bench.BASELINES)
def test_a_baseline_trains_float32_weights_in_bfloat16_as_qirl_does(kind):
    baseline = baselines.Baseline(tiny(lora=0, dtype="bfloat16"), kind, "cpu")
    assert baseline.settle(float("inf"))["batch"] in (1, 2)
    assert sum(len(batch.lengths) for _, batch in baseline.parts) == baseline.setting.images * baseline.setting.nodes
    before = [local(p).clone() for p in baseline.model.parameters()]
    assert baseline.rollout().dtype == torch.float32
    baseline.update()
    after = [local(p) for p in baseline.model.parameters()]
    assert {p.dtype for p in after} == {torch.float32}
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    baseline.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{"lora": 0}, {"references": 1}, {"guidance": 1.0, "micro": 1}], ids=str)
def test_the_tokens_and_flops_of_a_row_are_those_that_the_transformer_runs(family, changes):
    """MFU of what is not run would be too high."""
    setting, seen = tiny(family, **changes), []
    with Step(setting, "cpu") as step:
        step.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0]))
        for name, phase in step.phases().items():
            seen.clear()
            phase.run()
            packs = [pack for pack in seen if pack is not None]
            assert phase.tokens == sum(pack.tokens for pack in packs)
            forward = sum((forward_flops(step.architecture, pack) for pack in packs), Flops())
            if name == "rollout":
                assert phase.flops == forward
            elif not setting.lora:
                assert phase.flops == forward * 3
            else:  # no gradients of the frozen weights
                assert forward.matmul < phase.flops.matmul < 3 * forward.matmul
                assert phase.flops.attention == 2 * forward.attention


def test_a_row_says_what_was_measured(tmp_path, capsys):
    code, found = measured(tmp_path, "references1", *TINY, "--parts", "--profile")
    assert code == 0 and found["left_out"] == [] and found["matmul_tflops"]["float32"] > 0
    [row] = found["rows"]
    core, every = row["median_s"], row["median_s"] | row["parts"]["median_s"]
    step = core["rollout"] + core["update"]
    assert row["images_per_s"] == pytest.approx(2 / step)
    assert row["images_per_s_whole"] == pytest.approx(2 / (step + every["decode"] + every["encode"]))
    assert sum(row["share"].values()) == pytest.approx(1) and set(row["share"]) == {
        "rollout", "update", "decode", "encode",
    }  # fmt: skip
    assert row["mfu"] is None and row["peak_gib"] is None  # nothing is known of this processor
    assert row["trained_parameters"] < row["parameters"] and row["tflops"]["forward"] > 0
    for kind in bench.BASELINES:
        own = row["baselines"][kind]
        assert own["error"]["gradients"] <= baselines.AGREE and own["batch"] <= 2
        assert min(own["ratio"].values()) > 0 and own["images_per_s"] > 0
    assert row["baselines"]["peers"]["overrides"] == list(baselines.PEERS)
    for name, own in row["profile"].items():
        assert own["ms"]["matrix products"] > 0 and (name == "forward" or own["ms"][profile.OWN] > 0)
        assert own["busy_ms"] == pytest.approx(sum(own["ms"].values()))
    shown = capsys.readouterr().out
    assert "references1" in shown and "same: " in shown and "matrix products" in shown
    assert (tmp_path / "throughput.md").read_text() in shown


def test_mfu_is_of_the_peak_that_was_given(tmp_path):
    _, found = measured(tmp_path, "full", *TINY, "--baselines", "none", "--peak", "0.5")
    [row] = found["rows"]
    assert row["mfu"]["update"] == pytest.approx(row["tflops"]["update"] / 0.5)
    assert row["trained_parameters"] == row["parameters"] and "baselines" not in row


def test_a_setting_that_cannot_be_run_does_not_stop_the_others(tmp_path, capsys):
    code, found = measured(tmp_path, "headline", *TINY, "micro=2,4", "model.no_such=1", "--baselines", "none")
    assert code == 1 and all("unknown option 'model.no_such'" in row["refused"] for row in found["rows"])
    code, found = measured(tmp_path, "headline", *TINY, "nodes=1,9", "--baselines", "none")
    assert code == 0 and ["refused" in row for row in found["rows"]] == [False, True]
    assert "nodes=9: not measured: policy.timesteps.count=9" in capsys.readouterr().out


def test_a_package_that_is_missing_is_named_and_qirl_is_measured_without_it(tmp_path):
    """A machine with torch alone."""
    program = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('diffusers', 'transformers', 'peft', 'accelerate'):\n"
        "            raise ModuleNotFoundError(f'No module named {name}')\n"
        "sys.meta_path.insert(0, Missing())\n"
        "sys.path.insert(0, 'benchmarks')\n"
        "import throughput\n"
        "raise SystemExit(throughput.main(sys.argv[1:]))\n"
    )
    out = tmp_path / "throughput.json"
    words = ["--cpu", "--repetitions", "1", "--out", str(out), "headline", *TINY, "--parts"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [row] = json.loads(out.read_text())["rows"]
    assert row["images_per_s"] > 0 and "images_per_s_whole" not in row
    for own in (*row["baselines"].values(), row["parts"]):
        assert own == {"refused": "ModuleNotFoundError: No module named diffusers"}


def test_a_time_too_short_for_any_setting_is_one_line(tmp_path, capsys):
    code, found = measured(tmp_path, "headline", "full", *TINY, "--seconds", "2")
    assert code == 2 and found["rows"] == []
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "--seconds 2 is too little" in line and "headline" in line and "full" in line


def test_what_would_end_too_late_is_left_out_and_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "COST", dict.fromkeys(bench.COST, 1e9))
    code, found = measured(tmp_path, "headline", *TINY, "--seconds", "1000")
    assert code == 0 and found["rows"][0]["images_per_s"] > 0 and "baselines" not in found["rows"][0]
    assert [one["setting"].rpartition(": ")[2] for one in found["left_out"]] == list(bench.BASELINES)
    assert "left out for want of time" in capsys.readouterr().out


def test_what_a_setting_took_decides_what_the_next_may_take():
    budget = bench.Budget(1000)
    assert budget.expected(8.0) == bench.FIRST + 8.0 / bench.REACHED
    budget.learn(8.0, built=5.0, seconds=45.0)  # 40 s for 8 s of products: 5 times
    assert budget.expected(2.0) == pytest.approx(2 * 5.0 + 10.0)
    assert 0 < budget.left <= 1000


def test_words_choose_settings_and_change_them():
    small = [s.name for s in bench.chosen(["headline", "full", "micro=2,8", "flow.level=0.5"], cpu=False)]
    assert small == [f"{n} micro={m} flow.level=0.5" for n in ("headline", "full") for m in (2, 8)]
    assert [s.name for s in bench.chosen([], cpu=False)] == [s.name for s in bench.SETTINGS]
    [one] = bench.chosen(["1024", "guidance=1", "layers=3", "model.attention=cudnn"], cpu=False)
    assert (one.guidance, one.layers, one.overrides) == (1.0, 3, ("model.attention=cudnn",))
    assert {s.size for s in bench.chosen([], cpu=True)} == {"tiny"}


@pytest.mark.parametrize(
    "words, told",
    [
        (["heading"], "no setting 'heading'"), (["headline", "mikro=2"], "did you mean 'micro'"),
        (["headline", "micro=two"], "micro=two is no int"), (["headline", "height=500"], "use 480 or 512"),
        (["headline", "family=qwen"], "qwen_image"), (["headline", "text=0"], "text=0"),
        (["headline", "--baselines", "all"], "--baselines all"),
    ],
)  # fmt: skip
def test_a_word_that_means_nothing_is_refused_in_one_line(words, told, capsys):
    assert bench.main(["--cpu", *words]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert told in line


def test_every_setting_is_a_run_and_the_true_models_have_their_true_sizes():
    millions = {}
    for setting in bench.SETTINGS:
        known = dataclasses.replace(setting, overrides=())  # an option may need what this machine lacks
        assert known.config("unused").policy.group == setting.group
        with torch.device("meta"):
            millions[setting.name] = sum(p.numel() for p in bench_model(known).parameters()) // 10**6
    assert millions["headline"] - 84 == pytest.approx(7115, abs=100)  # without adapters
    assert 20_000 < millions["1.x"] < 21_000
    # a forward of eight images of 512 x 512 is 124 TFLOP; a step is 20 of 16 images and the update of 32 pairs, twice each
    assert step_flops(bench.HEADLINE) == pytest.approx(124e12 * (2 * 20 + 4 * 3), rel=0.1)


def bench_model(setting):
    from qirl.models.weights import new_model

    return new_model(setting.architecture())


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_keep_the_size_of_what_goes_through(family):
    """Else a step would be measured on infinities, whose products some devices compute faster."""
    setting = tiny(family, base="int8")
    config, architecture = setting.config("unused"), setting.architecture()
    model = random_model(architecture, config, "cpu", torch.float32)
    frozen = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    assert frozen and all(m.weight.abs().amax() == 127 for m in frozen)
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and not isinstance(m, FrozenLinear)]
    x = torch.randn(64, weights[0].shape[1])
    assert 0.5 < (x @ weights[0].T).std() < 2
    assert not any(p.isnan().any() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_conditions_are_drawn_once_and_fit_the_model(family):
    setting = tiny(family, references=2)
    drawn, (prompt, other) = Drawn(setting, setting.architecture(), torch.bfloat16), (Prompts(0), Prompts(1))
    condition = drawn.condition(prompt)
    assert condition is drawn.condition(prompt) and not torch.equal(condition.text, drawn.condition(other).text)
    assert condition.tokens == setting.text + 2 * setting.tokens and condition.text.dtype == torch.bfloat16
    assert condition.shared is (family == "qwen_image_21")
    assert drawn.size(prompt) == (setting.height // PIXELS, setting.width // PIXELS)


@dataclasses.dataclass(frozen=True)
class Prompts:
    id: int


@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_run_on_the_setting(family, references):
    setting, seen = tiny(family, references=references), {}
    for name, run in parts.phases(setting, "cpu"):
        seen[name] = run()
    pictures = seen["decode"]
    assert len(pictures) == setting.images
    assert all(p.shape[1:] == (setting.height, setting.width) and p.dtype == torch.uint8 for p in pictures)
    assert "encode" in seen


def test_the_true_encoders_give_what_the_true_transformers_take():
    widths = {"qwen_image_21": "context_in_dim", "qwen_image": "joint_attention_dim"}
    for family, field in widths.items():
        assert parts.TEXT[family]["hidden_size"] == getattr(TRUE[family](), field)
        assert parts.VISION[family]["out_hidden_size"] == parts.TEXT[family]["hidden_size"]


@pytest.mark.parametrize(
    "name, kind",
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t> >", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_32", "attention"),
        ("_forward_kernel", profile.OWN),
        ("_backward_kernel", profile.OWN),
        ("void tokens_kernel<Step>(Step, long, int)", profile.OWN),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<direct_copy_kernel>>",
            "copies",
        ),
        ("Memcpy HtoD (Pageable -> Device)", "copies"),
        (
            "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>>",
            "elementwise",
        ),
        ("void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float>>", "elementwise"),
        ("triton_poi_fused_add_0", "elementwise"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevComm*)", "collectives"),
        ("something_else", profile.OTHER),
    ],
)
def test_a_kernel_is_counted_by_what_it_does(name, kind):
    assert profile.kind_of(name) == kind


def test_the_peak_is_that_of_the_card():
    assert peak_of("NVIDIA H100 80GB HBM3", "bfloat16") == peak_of("NVIDIA H200", "bfloat16") == 989e12
    assert peak_of("NVIDIA H200", "float32") == 67e12
    assert peak_of("NVIDIA H100 PCIe", "bfloat16") is peak_of(None, "bfloat16") is None


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert bench.main([]) == 2 and "--cpu" in capsys.readouterr().err


def test_a_setting_refuses_what_no_image_has():
    with pytest.raises(UserError, match="use 32 or 64"):
        changed(bench.HEADLINE, ["height=33"])
