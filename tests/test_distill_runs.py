"""Whole distillation runs: teachers that are swapped, resuming, several ranks, LoRA, what is refused, the plan."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import distill_runs
import pytest
import torch
from cli_runs import qirl, refused
from distill_runs import config, save_teacher, values
from safetensors.torch import load_file, save_file
from test_parallel import TORCHRUN
from test_plan import counted
from tiny_runs import CHANNELS, merge, train_config

from qirl.config import load
from qirl.distillation.schedule import teacher_of
from qirl.distillation.teachers import Source, Teachers, find_sources
from qirl.distillation.trainer import accumulate, distill, lesson_of, open_distiller, shares_of
from qirl.errors import UserError
from qirl.models.adapter_files import read_adapter
from qirl.models.weights import load_model
from qirl.packing import Target, pack
from qirl.parallel.data import Ranks
from qirl.plan import plan

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
FLOAT64 = {"model": {"dtype": "float64"}}


@pytest.fixture(scope="module")
def teachers(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return {name: save_teacher(tiny_model, folder / name, seed) for seed, name in enumerate(("draw", "edit"))}


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory):
    """Finished LoRA runs of two ranks on the tiny model, as `qirl train` exports them: folders with adapter/, model/."""
    from qirl.engine import Engine

    found = {}
    for rank, alpha in ((2, 3.0), (3, 8.0)):
        out = tmp_path_factory.mktemp("lora") / f"rank{rank}"
        lora = {"model": {"lora": {"rank": rank, "alpha": alpha, "targets": ("to_q", "out")[: rank - 1]}}}
        from qirl.world import make_world

        own = train_config(out, tiny_model, lora)
        engine = Engine.open(own, make_world(own.world).family)
        generator = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            for p in engine.weights.current.values():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        engine.export({"world": "digits", "text_dim": 8, "unconditional": True})
        found[rank] = out
    return found


def two(teachers, **options) -> dict:
    edit = {"path": str(teachers["edit"]), "task": "edit", "guidance": 2}
    return {"draw": {"path": str(teachers["draw"]), "guidance": 3, **options}, "alter": edit}


def metrics(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = lambda key: key.startswith("time/") or key == "images_per_second"  # noqa: E731
    return [{k: v for k, v in record.items() if not timed(k)} for record in records]


def velocity(model):
    """What a model says to some target, in its own dtype."""
    from qirl.packing import Condition

    generator = torch.Generator().manual_seed(4)
    text, x = torch.randn(3, 8, generator=generator), torch.randn(16, CHANNELS, generator=generator)
    with torch.no_grad():
        return model(pack([Condition(text)], [Target(0, 4, 4)]), x, torch.tensor([0.6]))


# teachers


def test_a_swapped_teacher_is_the_model_of_its_folder(tiny_model, teachers, adapters):
    """Whole models and adapters of two ranks in one run, prefetched or not, in any order."""
    folders = {**teachers, "lora2": adapters[2] / "adapter", "lora3": adapters[3] / "adapter"}
    models = {name: path.parent / "model" if "lora" in name else path for name, path in folders.items()}
    sources = {n: Source(p, read_adapter(p) if "lora" in n else None) for n, p in folders.items()}
    bench = Teachers(sources, tiny_model, torch.float64, Ranks())
    for name, nearly in [("lora2", "draw"), ("draw", "lora3"), ("lora3", "lora2"), ("edit", "edit"), ("lora2", "edit")]:
        bench.activate(name)
        bench.prefetch(nearly)
        expected = velocity(load_model(models[name], torch.float64))
        limit = 1e-6 if "lora" in name else 0.0  # the merged model was rounded to float32
        torch.testing.assert_close(velocity(bench.model), expected, rtol=limit, atol=limit)


def test_adapters_alone_swap_only_their_low_rank_matrices(tiny_model, adapters):
    sources = {str(r): Source(p / "adapter", read_adapter(p / "adapter")) for r, p in adapters.items()}
    bench = Teachers(sources, tiny_model, torch.float64, Ranks())
    assert all(".lora_" in key for host in bench.host.values() for key in host)
    for rank in (3, 2, 3):
        bench.activate(str(rank))
        expected = velocity(load_model(adapters[rank] / "model", torch.float64))
        torch.testing.assert_close(velocity(bench.model), expected, rtol=1e-6, atol=1e-6)


def test_peft_reads_an_exported_adapter(tiny_model, adapters):
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(tiny_model, torch.float64), str(adapters[3] / "adapter"))
    expected = velocity(load_model(adapters[3] / "model", torch.float64))
    torch.testing.assert_close(velocity(model), expected, rtol=1e-6, atol=1e-6)


def test_a_lora_teacher_gives_the_gradients_of_its_merged_model(tmp_path, tiny_model, adapters):
    found = []
    for number, folder in enumerate((adapters[3] / "adapter", adapters[3])):
        options = {"t": {"path": str(folder), "guidance": 2}}
        distiller = open_distiller(config(tmp_path / str(number), tiny_model, options, FLOAT64))
        lesson = lesson_of(distiller.config, distiller.family, distiller.prompts, 0, Ranks())
        stats = accumulate(distiller, lesson, "t")
        found.append((stats, {n: p.grad for n, p in distiller.engine.model.named_parameters()}))
    (stats, grads), (merged_stats, merged) = found
    torch.testing.assert_close(stats, merged_stats, rtol=1e-5, atol=0)  # the merged model was rounded to float32
    for name, value in merged.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["own module", "student's adapter off", "teachers' adapters off"])
def test_the_anchor_is_the_base_wherever_it_lives(tmp_path, tiny_model, teachers, adapters, kind):
    lora = {"model": {"lora": {"rank": 2}}} if kind.startswith("student") else {}
    path = adapters[2] / "adapter" if kind.startswith("teachers") else teachers["draw"]
    own = config(tmp_path / "run", tiny_model, {"t": path}, FLOAT64, lora, {"distill": {"anchor": 0.1}})
    distiller = open_distiller(own)
    for p in distiller.engine.weights.current.values():
        torch.nn.init.normal_(p, std=0.1)
    expected = velocity(load_model(tiny_model, torch.float64))
    torch.testing.assert_close(velocity(distiller.base), expected, rtol=0, atol=0)
    assert (velocity(distiller.engine.model) - expected).abs().max() > 1e-3
    assert (velocity(distiller.teachers.model) - expected).abs().max() > 1e-3


# runs


def test_the_student_comes_nearer_to_its_guided_teachers(tmp_path, tiny_model, teachers):
    parts = {"run": {"steps": 24}, "optimizer": {"lr": 3e-3}}
    distill(config(tmp_path, tiny_model, two(teachers), parts), quiet=True)
    records = metrics(tmp_path)
    for step, record in enumerate(records):
        name = teacher_of(step, {"draw": 1, "alter": 1})
        assert record[f"loss/{name}"] == record["loss"] == pytest.approx(record["match"])
        assert [key for key in record if key.startswith("loss/")] == [f"loss/{name}"]
    for name in ("loss/draw", "loss/alter"):
        losses = [r[name] for r in records if name in r]
        assert sum(losses[-3:]) < 0.7 * sum(losses[:3]), losses


def test_a_distilled_lora_student_learns_and_exports_both(tmp_path, tiny_model, teachers):
    parts = {"model": {"lora": {"rank": 2}}, "optimizer": {"lr": 1e-2}, "run": {"steps": 8}}
    distill(config(tmp_path, tiny_model, {"t": teachers["draw"]}, parts), quiet=True)
    losses = [r["loss"] for r in metrics(tmp_path)]
    assert losses[-1] < losses[0]
    assert load_model(tmp_path / "model") and read_adapter(tmp_path / "adapter").rank == 2


def start(folder: Path, given: dict) -> subprocess.Popen:
    (folder / "config.json").write_text(json.dumps(merge(given, {"run": {"out": str(folder / "out")}})))
    command = [sys.executable, distill_runs.__file__, "distill", str(folder / "config.json")]
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)


def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path, tiny_model, teachers, adapters):
    """Three teachers of unequal shares, one an adapter: killed between checkpoints, it goes on with the right one."""
    three = {**two(teachers, share=2), "lora": {"path": str(adapters[2] / "adapter"), "guidance": 2}}
    parts = {
        "run": {"steps": 15, "checkpoint_every": 4, "samples_every": 5, "monitor_prompts": 3},
        "distill": {"nodes": 3, "anchor": 0.1, "prompts": 2},
        "flow": {"sampler": "sde"},
        "optimizer": {"ema": 0.6, "warmup": 2, "decay": "cosine"},
    }
    given = values("", tiny_model, three, parts)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    broken.mkdir()
    process, log = start(broken, given), broken / "out" / "metrics.jsonl"
    distill(load("distill", merge(given, {"run": {"out": str(whole / "out")}})), quiet=True)
    limit = time.monotonic() + 120
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 6):
        assert time.monotonic() < limit
        time.sleep(0.001)
    process.kill()
    assert process.wait(120) == -signal.SIGKILL, (broken / "log.txt").read_text()[-3000:]
    distill(load("distill", merge(given, {"run": {"out": str(broken / "out")}})), quiet=True)
    assert metrics(whole / "out") == metrics(broken / "out")
    names = [next(k[5:] for k in r if k.startswith("loss/")) for r in metrics(whole / "out")]
    assert names == [teacher_of(step, {"draw": 2, "alter": 1, "lora": 1}) for step in range(15)]
    for part in ("model", "samples"):
        files = {p.name: p.read_bytes() for p in (whole / "out" / part).iterdir()}
        assert files and files == {p.name: p.read_bytes() for p in (broken / "out" / part).iterdir()}


def cases(model: Path, teachers: dict, adapters: dict) -> dict:
    lora = {name: str(adapters[rank] / "adapter") for name, rank in (("x", 2), ("y", 3))}
    steps = {"run": {"steps": 3, "samples_every": 3, "monitor_prompts": 3}}
    return {
        # 3 prompts: one rank has two of them and more packs than the other
        "some nodes, uneven packs": values(
            "", model, two(teachers), FLOAT64, steps, {"distill": {"nodes": 1, "micro_tokens": 60, "anchor": 0.2}}
        ),
        "adapters, lora student": values(
            "", model, lora, FLOAT64, steps, {"model": {"lora": {"rank": 2}}, "distill": {"anchor": 0.2}}
        ),
        "adapters off for the anchor, sde": values(
            "", model, lora, FLOAT64, steps, {"flow": {"sampler": "sde"}, "distill": {"anchor": 0.2, "weight": "sde"}}
        ),
        "bfloat16": values("", model, two(teachers), steps, {"model": {"dtype": "bfloat16"}}),
    }


@pytest.fixture(scope="module")
def observed(tmp_path_factory, tiny_model, teachers, adapters):
    """All cases on one rank and on two: {ranks: ({case: observed}, folder)}."""
    found, work = {}, tmp_path_factory.mktemp("ranks")
    for ranks in (2, 1):
        folder = work / str(ranks)
        folder.mkdir()
        own = cases(tiny_model, teachers, adapters)
        given = {name: merge(v, {"run": {"out": str(folder / name)}}) for name, v in own.items()}
        if ranks == 2:
            (folder / "cases.json").write_text(json.dumps(given))
            command = [*TORCHRUN, distill_runs.__file__, "observe", folder / "cases.json", folder / "seen.pt"]
            two = subprocess.Popen(
                command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            found[ranks] = folder / "seen.pt", folder
        else:  # meanwhile
            found[ranks] = {name: distill_runs.observe(v) for name, v in given.items()}, folder
    torch.distributed.destroy_process_group()  # of bfloat16
    said, _ = two.communicate(timeout=240)
    assert two.returncode == 0, said[-4000:]
    return {1: found[1], 2: (torch.load(found[2][0]), found[2][1])}


@pytest.mark.parametrize("name", list(cases(Path(), {"draw": "", "edit": ""}, {2: Path(), 3: Path()})))
def test_two_ranks_equal_one(observed, name):
    limit = 0.2 if name == "bfloat16" else 1e-8  # rounding moves the states of later nodes; another teacher would be ~1
    (one, folder), (both, other) = ((observed[ranks][0][name], observed[ranks][1] / name) for ranks in (1, 2))
    assert len(one["gradients"]) == len(both["gradients"]) == 3
    for step, (a, b) in enumerate(zip(one["gradients"], both["gradients"], strict=True)):
        assert a.keys() == b.keys() and a
        largest = max(g.norm() for g in a.values())
        for key, value in a.items():
            error = (b[key] - value).norm() / torch.maximum(value.norm(), 1e-2 * largest)
            assert error < limit, f"step {step}, {key}: {error:.1e}"
    for a, b in zip(metrics(folder), metrics(other), strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], rel=limit, abs=1e-12) for key in a)
    for key, value in one["weights"].items():
        torch.testing.assert_close(both["weights"][key], value, rtol=limit, atol=limit)
    assert {p.name for p in (folder / "samples").iterdir()} == {p.name for p in (other / "samples").iterdir()}


def test_ranks_run_as_many_packs(observed):
    packs = observed[2][0]["some nodes, uneven packs"]["packs"]
    assert len(packs[0]) == len(packs[1]) and [all(own) for own in packs] == [True, False]


# the command


def test_the_command_makes_a_whole_run_folder(tmp_path, tiny_model, teachers):
    out = tmp_path / "run"
    given = values(out, tiny_model, two(teachers), {"run": {"report": True, "samples_every": 2}})
    (tmp_path / "distill.json").write_text(json.dumps(given))  # JSON is YAML
    code, said, error = qirl("distill", tmp_path / "distill.json", "distill.teachers.draw.guidance=2", "run.steps=3")
    assert code == 0 and f"model: {out / 'model'}" in said, error
    assert "task: mixed" in (out / "config.yaml").read_text() and "guidance: 2.0" in (out / "config.yaml").read_text()
    page = (out / "report.html").read_text()
    assert "Loss, teacher draw" in page and "Loss, teacher alter" in page
    assert json.loads((out / "model" / "qirl.json").read_text())["unconditional"] is True
    assert (out / "samples" / "step_000002.png").exists()
    assert qirl("report", out)[0] == 0 and qirl("options", "distill", "distill.teachers.NAME")[0] == 0
    image = tmp_path / "image.png"
    assert qirl("sample", "a red 7", "--model", out, "--out", image, "--guidance", 1, "--steps", 2)[0] == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["flow.guidance=4"], "set flow.guidance=1"),
        (["flow.rescale=true"], "set flow.guidance=1"),
        (["distill.teachers={}"], "distill.teachers is empty"),
        (["distill.teachers.draw.giudance=4"], "did you mean 'distill.teachers.draw.guidance'?"),
        (["distill.teachers.draw=4"], "is a section"),
        (["distill.teachers.draw.guidance=strong"], "should be a number; the default is 1.0"),
        (["distill.teachers.draw.path=null"], "distill.teachers.draw.path is missing"),
        (["distill.teachers.draw.path=nowhere"], "distill.teachers.draw.path=nowhere holds no model"),
        (["distill.teachers.draw.task=edti"], "did you mean 'edit'?"),
        (["distill.teachers.a/b.path=x"], "use letters, digits, - and _"),
        (["distill.nodes=5"], "use 4 or fewer"),
        (["distill.micro_tokens=16"], "set it to"),
        (["distill.group=5000"], "more than the 4096 samples"),
        (["world.task=edit"], "does not fit teachers of t2i"),
        (["model.path=null"], "model.path is missing"),
        (["policy.group=4"], "'policy' belongs to `qirl train`"),
    ],
)
def test_what_cannot_be_distilled_is_refused_in_one_line(tmp_path, tiny_model, teachers, overrides, words):
    (tmp_path / "c.json").write_text(json.dumps(values(tmp_path / "run", tiny_model, {"draw": teachers["draw"]})))
    assert words in refused(tmp_path, "distill", tmp_path / "c.json", *overrides)


def test_a_teacher_of_another_kind_is_refused_before_anything_is_written(tmp_path, tiny_model, teachers, adapters):
    def said(path, **options) -> str:
        out = tmp_path / "run"
        with pytest.raises(UserError) as error:
            open_distiller(config(out, tiny_model, {"t": {"path": str(path), **options}}))
        assert not out.exists() and "\n" not in str(error.value)
        return str(error.value)

    def copy(source: Path, name: str) -> Path:
        return Path(shutil.copytree(source, tmp_path / name))

    def change(path: Path, **fields) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    deeper = copy(teachers["draw"], "deeper")
    change(deeper / "config.json", num_layers=3)
    assert "num_layers=3, the student has 2" in said(deeper)
    unconditional = copy(teachers["draw"], "unconditional")
    change(unconditional / "qirl.json", unconditional=False)
    assert "distill.teachers.t.guidance=3 needs an unconditional embedding" in said(unconditional, guidance=3)
    assert find_sources(config(tmp_path / "run", tiny_model, {"t": unconditional}))  # guidance 1 needs none
    torn = copy(teachers["draw"], "torn")
    weights = torn / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "truncated or damaged" in said(torn)

    foreign = copy(adapters[2] / "adapter", "foreign")
    change(foreign / "adapter_config.json", base_model_name_or_path=str(teachers["edit"]))
    assert "is an adapter of" in said(foreign) and str(tiny_model) in said(foreign)
    dora = copy(adapters[2] / "adapter", "dora")
    change(dora / "adapter_config.json", use_dora=True)
    assert "use_dora=True is not supported" in said(dora)
    short = copy(adapters[2] / "adapter", "short")
    tensors = load_file(short / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), short / "adapter_model.safetensors")
    assert "is missing or no LoRA matrix" in said(short)
    change(short / "adapter_config.json", r=3)
    save_file(tensors, short / "adapter_model.safetensors")
    assert "has rank 2, its config says 3" in said(short)
    (short / "adapter_model.safetensors").unlink()
    assert "does not exist" in said(short)


# the plan


@pytest.mark.parametrize(
    "parts",
    [{}, {"distill": {"nodes": 2, "anchor": 0.1, "micro_tokens": 75}}, {"model": {"lora": {"rank": 2}}}],
    ids=["all nodes", "packs", "lora"],
)
def test_the_plan_counts_the_packs_and_flops_of_real_steps(tmp_path, tiny_model, teachers, parts):
    own = config(tmp_path / "run", tiny_model, two(teachers), parts)
    found = plan(own)
    distiller = open_distiller(own)
    for step, name in enumerate(own.distill.teachers):
        distiller.teachers.activate(name)
        lesson = lesson_of(own, distiller.family, distiller.prompts, step, Ranks())
        linear = counted(lambda lesson=lesson, name=name: accumulate(distiller, lesson, name))[0]
        planned = found["flops"][f"student, teacher {name}"]["matmul"] + found["flops"][f"teacher {name}"]["matmul"]
        # gradients that nobody needs (of the first layer's input) are not computed; the meta student has no base pass
        assert planned == pytest.approx(linear, rel=0.12)
    assert "run" not in [p.name for p in tmp_path.iterdir()] or (tmp_path / "run" / "config.yaml").exists()


def test_the_plan_counts_teachers_where_they_are(tmp_path, tiny_model, teachers, adapters):
    size = sum(p.numel() for p in load_model(tiny_model).parameters()) * 4

    def memory(which: dict, *parts, ranks=1) -> dict:
        return plan(config(tmp_path, tiny_model, which, *parts), ranks)["memory"]

    one = memory({"t": teachers["draw"]})
    assert one["teacher"] == size and not any("way" in name or "host" in name for name in one)
    both = memory(two(teachers), {"distill": {"anchor": 1.0}})
    assert both["teacher"] == both["teacher on its way"] == both["host, teacher draw"] == both["base"] == size
    assert both["total"] == sum(v for k, v in both.items() if k != "total" and not k.startswith("host"))
    loras = {str(rank): path / "adapter" for rank, path in adapters.items()}
    low = memory(loras, {"distill": {"anchor": 1.0}})
    distiller = open_distiller(config(tmp_path / "run", tiny_model, loras))
    moved = sum(v.nbytes for v in distiller.teachers.host["2"].values())
    assert low["teacher on its way"] == low["host, teacher 3"] == moved < size / 4 and "base" not in low
    assert memory(two(teachers), ranks=2)["teacher"] == size / 2
    code, said, _ = qirl("distill", "digits/distill", "--dry-run", f"model.path={tiny_model}", "world.text_dim=8",
                         *(f"distill.teachers.{n}.path={teachers['draw']}" for n in ("t2i", "edit")))  # fmt: skip
    assert code == 0 and "teacher on its way" in said and "FLOPs of teacher edit" in said


def test_shares_are_those_of_the_config(tiny_model):
    own = config("x", tiny_model, {"a": {"path": "x", "share": 2}, "b": "y"})
    assert shares_of(own) == {"a": 2, "b": 1}
