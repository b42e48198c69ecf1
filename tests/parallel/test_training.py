"""Runs of both families on several gloo ranks, in tensor, sequence and data parallel layouts, against one process."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import BASE, FLOAT64, SDE, merge

# a large epsilon: AdamW then does not blow up the rounding of gradients near zero into whole steps
COMMON = {"run": {"steps": 2, "samples_every": 1, "monitor_prompts": 3}, "optimizer": {"eps": 1e-2}}
LORA = {"model": {"lora": {"rank": 2}}}
SEAM = {"policy": {"micro_tokens": 50, "kl": 0.1}}
TWO = {"tp": {"tp": 2}, "sequence": {"tp": 2, "sequence": True}}
FOUR = {"dp": {"dp": 4}, "dp x tp": {"dp": 2, "tp": 2}, "dp x sequence": {"dp": 2, "tp": 2, "sequence": True}}


def cases(tiny: Path, single: Path, dual: Path, prompts: dict[str, Path]) -> dict[str, tuple[dict, str]]:
    digits = lambda *parts: merge(BASE, COMMON, {"model": {"path": str(tiny)}}, *parts)  # noqa: E731

    def pictures(folder: Path, task: str, *parts: dict) -> dict:
        world = {"name": "prompts", "prompts": str(prompts[task]), "resolution": 64, "task": task, "text_dim": 64}
        lora = {"model": {"path": str(folder), "lora": {"targets": ["to_q", "to_out.0"]}}}
        return merge(BASE, COMMON, {"world": world, "flow": {"steps": 3}}, lora, *parts)

    return {
        "nft": (digits(FLOAT64, {"optimizer": {"ema": 0.5}}), "colours"),
        "grpo behind the seam": (digits(FLOAT64, SDE, SEAM), "colours"),
        "grpo LoRA": (digits(FLOAT64, SDE, LORA, {"policy": {"kl": 0.1}}), "patchy"),
        "nft float32": (digits(), "luck"),
        "1.x nft": (pictures(dual, "t2i", FLOAT64, {"flow": {"guidance": 3.0}}), "luck"),
        "1.x grpo LoRA": (pictures(dual, "t2i", FLOAT64, SDE, LORA), "luck"),
        "edits nft": (pictures(single, "edit", FLOAT64), "luck"),
    }


DEFAULT = {
    "nft": "tp", "grpo behind the seam": "sequence", "grpo LoRA": "sequence", "nft float32": "tp", "1.x nft": "sequence",
    "1.x grpo LoRA": "tp", "edits nft": "sequence",
}  # fmt: skip
NAMES = list(cases(*(Path("x"),) * 3, {"t2i": Path("x"), "edit": Path("x")}))


def in_layout(cases: dict, folder: Path, parallel: dict) -> dict:
    own = {"parallel": parallel}
    return {name: (merge(v, own, {"run": {"out": str(folder / name)}}), r) for name, (v, r) in cases.items()}


def observe(folder: Path, ranks: int, runs: dict, **environment: str) -> dict:
    """What `tiny_runs.observe_all` sees of `runs` on so many ranks of one torchrun."""
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(runs))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *torchrun, tiny_runs.__file__, "observe", str(folder / "cases.json"), str(folder / "seen.pt")],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return torch.load(folder / "seen.pt")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("prompts"), np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (64, 48, 3), dtype=np.uint8)).save(folder / "a.png")
    lines = {
        "t2i": [{"text": "a red 7"}, {"text": "three cats", "height": 96, "width": 32}],
        "edit": [{"text": "make it red", "sources": ["a.png"]}, {"text": "turn it", "sources": ["a.png"]}],
    }
    for name, own in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
    return {name: folder / f"{name}.jsonl" for name in lines}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, folders, prompts):
    """runs(name, layout) -> (what is observed of the case, its run folder); layouts of TWO and FOUR, or "one"."""
    work, found = tmp_path_factory.mktemp("layouts"), {}
    own = cases(tiny_model, folders("QwenImage21Pipeline"), folders("QwenImagePipeline"), prompts)
    cache = str(tmp_path_factory.getbasetemp() / "cache")

    def get(name: str, layout: str):
        chosen = [n for n in NAMES if layout == "one" or (DEFAULT.get(n) == layout) == (DEFAULT.get(name) == layout)]
        key = f"{layout}, {chosen[0]}"
        if key not in found:
            parallel = {**TWO, **FOUR}.get(layout, {})
            ranks = 1 if layout == "one" else 2 if layout in TWO else 4
            some = in_layout({n: own[n] for n in chosen}, work / key, parallel)
            found[key] = observe(work / key, ranks, some, QIRL_CACHE=cache)
        return found[key][name], work / key / name

    return get


def tolerance(name: str) -> float:
    return 1e-5 if "float32" in name else 1e-9


def in_every_layout(test):
    """Each case in its layout of DEFAULT, and (slow) in all others."""
    pairs = [(name, layout) for name in NAMES for layout in (*TWO, *FOUR)]
    marked = [pytest.param(*pair, marks=() if DEFAULT[pair[0]] == pair[1] else pytest.mark.slow) for pair in pairs]
    return pytest.mark.parametrize(("name", "layout"), marked)(test)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@in_every_layout
def test_gradients_of_every_update_equal_those_of_one_process(runs, name, layout):
    one, many = (runs(name, which)[0]["gradients"] for which in ("one", layout))
    assert len(one) == len(many) == 2
    for step, (a, b) in enumerate(zip(one, many, strict=True)):
        assert a.keys() == b.keys() and a
        # the second step's gradient carries what AdamW made of the first one's rounding
        limit = tolerance(name) * (1 if step == 0 else 10)
        largest = max(value.norm() for value in a.values())
        for key, value in a.items():
            error = (b[key] - value).norm() / torch.maximum(value.norm(), 1e-3 * largest)
            assert error <= limit, f"update {step}, {key}: {error:.1e}"


@in_every_layout
def test_losses_and_gradient_norms_equal_those_of_one_process(runs, name, layout):
    one, many = (records(runs(name, which)[1]) for which in ("one", layout))
    assert [r["step"] for r in one] == [1, 2] and all(r["grad_norm"] > 0 for r in one)
    skipped = ("time/", "timing/", "images_per_second")
    for a, b in zip(one, many, strict=True):
        assert a.keys() == b.keys()
        for key in (k for k in a if not k.startswith(skipped)):
            assert math.isclose(a[key], b[key], rel_tol=tolerance(name) * 10, abs_tol=tolerance(name) * 10), (
                key,
                a[key],
                b[key],
            )


@in_every_layout
def test_images_and_scores_equal_those_of_one_process(runs, name, layout):
    one, many = (runs(name, which)[0]["latents"] for which in ("one", layout))
    torch.testing.assert_close(many, one, atol=tolerance(name) * 10, rtol=tolerance(name) * 10)  # after two updates
    scores = [(runs(name, which)[1] / "scores.jsonl").read_text() for which in ("one", layout)]
    assert scores[0] == scores[1] and scores[0]


@in_every_layout
def test_exported_weights_equal_those_of_one_process(runs, name, layout):
    files = [
        "model/diffusion_pytorch_model.safetensors",
        *(["adapter/adapter_model.safetensors"] if "LoRA" in name else []),
    ]
    for file in files:
        one, many = (load_file(runs(name, which)[1] / file) for which in ("one", layout))
        assert one.keys() == many.keys()
        for key in one:
            torch.testing.assert_close(many[key], one[key], atol=tolerance(name), rtol=tolerance(name))


def launch(ranks: int, command: str, config: Path, *rest: str) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *torchrun, tiny_runs.__file__, command, str(config), *rest],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]


def close(one: list[dict], many: list[dict], limit: float) -> None:
    assert len(one) == len(many) > 0
    for a, b in zip(one, many, strict=True):
        for key in ("loss", "grad_norm"):
            assert math.isclose(a[key], b[key], rel_tol=limit), (key, a[key], b[key])


@pytest.mark.slow
def test_a_run_that_goes_on_in_another_layout_has_the_same_metrics(tmp_path, tiny_model):
    values = merge(BASE, COMMON, FLOAT64, {"model": {"path": str(tiny_model)}, "optimizer": {"ema": 0.5}})

    def run(name: str, steps: int, ranks: int, parallel: dict) -> None:
        config = tmp_path / f"{name}.json"
        own = {"run": {"steps": steps, "out": str(tmp_path / name)}, "parallel": parallel}
        config.write_text(json.dumps(merge(values, own)))
        launch(ranks, "train", config, "luck")

    run("straight", 6, 1, {})
    for steps, ranks, parallel in ((2, 4, FOUR["dp x sequence"]), (4, 1, {}), (6, 2, TWO["tp"])):
        run("moved", steps, ranks, parallel)
    close(records(tmp_path / "straight"), records(tmp_path / "moved"), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, limit", [("float64", 1e-9), ("bfloat16", 2e-2)])
def test_pretraining_equals_that_of_one_process(tmp_path, dtype, limit):
    """bfloat16 weights go through FSDP on one data parallel rank too; its sums over ranks are rounded to bfloat16."""
    own = {"run": {"steps": 2}, "model": {"dtype": dtype}}
    values = merge(tiny_runs.PRETRAIN, COMMON, own)
    for ranks, parallel in ((1, {}), (2, TWO["sequence"])):
        config = tmp_path / f"{ranks}.json"
        out = {"run": {"out": str(tmp_path / str(ranks))}, "parallel": parallel}
        config.write_text(json.dumps(merge(values, out)))
        launch(ranks, "pretrain", config)
    close(*(records(tmp_path / str(ranks)) for ranks in (1, 2)), limit)
