"""Does a judge that `qirl reward train` makes read what it never saw, and does RL learn from it? On two CPU cores, in minutes.

    python benchmarks/judge.py [--out runs/judge] [--steps 700] [--record]

Vision-language models of random weights (Qwen3-VL and Qwen2.5-VL of a few million parameters, built by transformers) learn
"does the image show a red 7?" from rated pictures of real handwriting: right 5, another colour 3, another digit 2, both 1.
Validation is on the handwriting of other images. Then one of them is served over HTTP by a small server that speaks the
OpenAI protocol, and is the only reward of a short RL run from an early base (600 steps); the held-out judge, which has
nothing to do with either, says whether drawing got better. Everything is cached in OUT and goes on where it stopped. --record writes
benchmarks/results/judge.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import openai_server  # noqa: E402
import tiny_judges  # noqa: E402

import qirl  # noqa: E402
from qirl.config import load  # noqa: E402
from qirl.config_rewards import JudgeOptions  # noqa: E402
from qirl.data.digits import prompts  # noqa: E402
from qirl.evaluation.statistics import interval  # noqa: E402
from qirl.quickstart import train_base  # noqa: E402
from qirl.rewards.vlm import losses  # noqa: E402
from qirl.rewards.vlm.local_chat import LocalChat  # noqa: E402
from qirl.rewards.vlm.processor import Processor, load_judge  # noqa: E402
from qirl.rewards.vlm.reading import Reading  # noqa: E402
from qirl.rewards.vlm.records import load_records  # noqa: E402
from qirl.rewards.vlm.reward import JudgeReward  # noqa: E402
from qirl.rewards.vlm.rubric import load_rubrics  # noqa: E402
from qirl.rewards.vlm.validation import MEASURES, measure  # noqa: E402
from qirl.run.folder import write_json  # noqa: E402
from qirl.run.machine import machine  # noqa: E402

ARMS = (("qwen3_vl", "pointwise"), ("qwen3_vl", "soft"), ("qwen3_vl", "pairwise"), ("qwen2_5_vl", "pointwise"))
PROMPTS, HELD_OUT = 3000, 100  # with four pictures each
PIXELS = 256


def train(out: Path, family: str, loss: str, steps: int) -> dict:
    """One judge by the real command: its measures, before and after, and seconds."""
    base, run = out / family, out / f"{family}_{loss}"
    if not base.exists():
        tiny_judges.save_judge(base, family)
    records = out / "data/records.jsonl"
    if not records.exists():
        tiny_judges.save_records(out / "data", PROMPTS, HELD_OUT)
    config = {
        "run": {"out": str(run), "steps": steps, "checkpoint_every": 250},
        "judge": {
            "path": str(base), "records": str(records), "loss": loss, "language": 6.0, "batch": 64, "per_prompt": 4,
            "micro": 64, "pixels": PIXELS, "mode": "expected_cot",
        },
        "optimizer": {"lr": 1e-3, "warmup": 20, "decay": "cosine", "betas": [0.9, 0.95]},
    }  # fmt: skip
    file = out / f"{run.name}.yaml"
    file.write_text(yaml.safe_dump(config))
    before = untrained(base, records)
    begun = time.monotonic()
    subprocess.run([sys.executable, "-m", "qirl", "reward", "train", str(file)], check=True)
    seconds = time.monotonic() - begun
    known = run / "seconds.json"
    if not known.exists():
        write_json(known, seconds)
    (after,) = json.loads((run / "validation.json").read_text()).values()
    size = sum(p.numel() for p in load_judge(base).parameters())
    return {"family": family, "loss": loss, "parameters": size, "steps": steps, "before": before,
            "seconds": json.loads(known.read_text())} | after  # fmt: skip


@torch.no_grad()
def untrained(base: Path, records: Path) -> float:
    """Pair accuracy of the random weights, read without the test of probability mass, which they would not pass."""
    model, processor = load_judge(base).eval(), Processor.load(base, PIXELS)
    kept = [r for r in load_records(records)[0] if r.split == "validation"]
    rubric, read = load_rubrics({kept[0].rubric})[kept[0].rubric], []
    for record in kept:
        encoded = processor.encode(rubric.messages(record.request), record.load(), "<think></think><score>")
        logits = model(**processor.batch([encoded], "cpu"), logits_to_keep=1).logits[0, -1]
        score = float(losses.expected(logits[processor.digits]))
        read.append(Reading(score, (score,)))
    return next(iter(measure(kept, read).values()))["pair_accuracy"]


def reinforce(out: Path, judge: Path, steps: int) -> dict:
    """RL of the digits world's base against the served judge alone: the held-out judge before and after, by guidance."""
    recipe = load(
        "pretrain", HERE.parent / "configs/digits/pretrain.yaml", [f"run.out={out / 'base'}", "run.steps=600"]
    )
    train_base(recipe, quiet=False)
    asked = [p.text for p in prompts("train") if p.category == "colour" and p.text.split()[1] in tiny_judges.COLOURS]
    (out / "prompts.jsonl").write_text("".join(json.dumps({"text": t, "category": "colour"}) + "\n" for t in asked))
    chat = LocalChat.load(judge, PIXELS, 24, 0.0)
    begun = time.monotonic()
    with openai_server.Server(openai_server.ModelBrain(chat)) as server:
        options = JudgeOptions(
            servers=(server.address,), model=openai_server.MODEL, rubric=str(out / "data/rubric.txt"), temperature=0.0,
            reasoning_tokens=24, pixels=PIXELS, concurrency=4,
        )  # fmt: skip
        reward = JudgeReward("alignment", options)
        model = qirl.train(
            "digits/t2i", rewards=[reward],
            **{"model.path": str(out / "base"), "world.prompts": str(out / "prompts.jsonl"), "run.out": str(out / "rl"),
               "run.steps": steps, "advantage.weights": {}},
        )  # fmt: skip
        requests = len(server.requests)
    found = {"steps": steps, "requests": requests, "failures": reward.failures, "seconds": time.monotonic() - begun}
    for name, path in (("before", out / "base"), ("after", model.parent)):
        results = qirl.evaluate(
            "digits/evaluate",
            **{
                "world.task": "t2i",
                "model.path": str(path),
                "run.out": str(out / f"rl_{name}"),
                "evaluation.guidance": [1.0, 2.0],
            },
        )
        found[name] = {scale: own for scale, own in results.items()}
    found["difference"] = {scale: gained(found["before"][scale], found["after"][scale]) for scale in found["before"]}
    metrics = [json.loads(line) for line in (out / "rl/metrics.jsonl").read_text().splitlines()]
    return found | {"reward": [m["reward/alignment"] for m in metrics]}


def gained(before: dict, after: dict) -> dict:
    """The held-out judge's share of right pictures, after - before, paired by prompt and noise, with its 95 % interval."""
    a, b = (own["by_prompt"] for own in (before, after))
    assert a["id"] == b["id"]
    return interval(np.array(b["judge_accuracy"]) - np.array(a["judge_accuracy"]), np.array(a["id"]))


def table(rows: Sequence[dict]) -> str:
    names = [name for name in MEASURES if name != "noise"]
    lines = [
        f"| judge | loss | parameters | minutes | pair accuracy before | {' | '.join(n.replace('_', ' ') for n in names)} |"
    ]
    lines.append("|---" * (5 + len(names)) + "|")
    for r in rows:
        head = f"| {r['family']} | {r['loss']} | {r['parameters'] / 1e6:.1f} M | {r['seconds'] / 60:.1f} | {r['before']:.2f} | "
        lines.append(head + " | ".join(f"{r[name]:.3f}" for name in names) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/judge"))
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--rl-steps", type=int, default=75)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [train(args.out, *arm, args.steps) for arm in ARMS]
    print(table(rows))
    found = reinforce(args.out, args.out / "qwen3_vl_pointwise/model", args.rl_steps)
    print(json.dumps(found["difference"], indent=1))
    if args.record:
        write_json(HERE / "results/judge.json", {"machine": machine(), "judges": rows, "rl": found})
        lines = [
            table(rows),
            "",
            "RL against the served judge: the held-out judge's share of right pictures, after - before",
        ]
        lines += [
            f"- guidance {k}: {v['value']:+.3f} ({v['low']:+.3f} to {v['high']:+.3f})"
            for k, v in found["difference"].items()
        ]
        (HERE / "results/judge.md").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
