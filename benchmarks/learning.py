"""Does RL learn? The quickstart over several seeds, each with a control whose rewards are shuffled inside groups.

    python benchmarks/learning.py --seeds 0 1 2 --out runs/learning

Base, RL and control are judged by the held-out judge on held-out prompts and the same fresh noise. The control has equal
compute: what it gains (guidance absorbed, more steps on own samples) is not learning. Seeds are resumable and can be run
one by one; the table is made of all seeds found in --out. Writes benchmarks/results/learning.json with --record.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from qirl import config as configuration
from qirl.paths import configs
from qirl.quickstart import evaluate_run, quickstart
from qirl.run.machine import machine

COMPONENTS = ("digit", "attribute", "ink")


def run_seed(out: Path, seed: int) -> dict:
    """Quickstart and control of one seed: the numbers at the trained guidance and at the base's best one."""
    from qirl.policy.trainer import train

    summary = quickstart(str(out), seed)
    base, t2i = summary["stages"]["base"], summary["stages"]["t2i"]
    trained, best = f"{t2i['guidance']:g}", f"{t2i['best_guidance']:g}"
    overrides = [
        f"run.out={out / 'control'}",
        f"run.seed={seed}",
        f"model.path={out / 'base/model'}",
        "advantage.shuffle=true",
    ]
    train(configuration.load("train", configs() / "digits/t2i.yaml", overrides))
    scales = ", ".join(sorted({trained, best}, key=float))
    control = evaluate_run(out / "control", [f"evaluation.guidance=[{scales}]"], quiet=False)
    rows = {"base": base["by_guidance"], "t2i": t2i["by_guidance"], "control": control}
    return {"seed": seed, "seconds": summary["seconds"], "trained": trained, "best": best, "rows": rows}


def figures(result: dict) -> dict[str, float]:
    """The numbers that the claims are about, for one seed."""
    rows, g, best = result["rows"], result["trained"], result["best"]
    judge = lambda name, scale: rows[name][scale]["judge_accuracy"]  # noqa: E731
    out = {
        "base at its best guidance": judge("base", best),
        "base": judge("base", g),
        "control": judge("control", g),
        "after RL": judge("t2i", g),
        "gain over base": judge("t2i", g) - judge("base", g),
        "gain over control": judge("t2i", g) - judge("control", g),
        "change at base's best guidance": judge("t2i", best) - judge("base", best),
        "diversity kept": rows["t2i"][g]["diversity"] / rows["base"][g]["diversity"],
        "reward - judge, base": rows["base"][g]["gap"],
        "reward - judge, after RL": rows["t2i"][g]["gap"],
    }
    for component in COMPONENTS:
        out[f"{component} gain"] = rows["t2i"][g]["rewards"][component] - rows["base"][g]["rewards"][component]
    return out


def errors(result: dict) -> dict[str, float]:
    """Standard errors, clustered by prompt; of a difference as if the two were independent, which is too large."""
    rows, g, best = result["rows"], result["trained"], result["best"]
    one = lambda name, scale: rows[name][scale]["judge_accuracy_se"]  # noqa: E731
    return {
        "base at its best guidance": one("base", best),
        "base": one("base", g),
        "control": one("control", g),
        "after RL": one("t2i", g),
        "gain over base": float(np.hypot(one("t2i", g), one("base", g))),
        "gain over control": float(np.hypot(one("t2i", g), one("control", g))),
        "change at base's best guidance": float(np.hypot(one("t2i", best), one("base", best))),
    }


WANTED = {
    "base at its best guidance": lambda v: v >= 0.75,
    "gain over base": lambda v: v >= 0.08,
    "gain over control": lambda v: v >= 0.08,
    "change at base's best guidance": lambda v: v >= -0.03,
    "diversity kept": lambda v: v >= 0.7,
    **{f"{c} gain": lambda v: v > 0 for c in COMPONENTS},
}


def table(results: list[dict]) -> str:
    """Markdown: one row per figure, its value per seed (± standard error), mean and spread, and whether every seed meets the goal."""
    values, spreads = [figures(r) for r in results], [errors(r) for r in results]
    lines = [
        "| | " + " | ".join(f"seed {r['seed']}" for r in results) + " | mean ± std | goal met |",
        "|---" * (len(results) + 3) + "|",
    ]
    for name in values[0]:
        own = np.array([v[name] for v in values])
        met = "" if name not in WANTED else "yes" if all(map(WANTED[name], own)) else "**no**"
        spread = f"{own.mean():.3f} ± {own.std(ddof=1) if len(own) > 1 else 0:.3f}"
        cells = [f"{v:.3f}" + (f" ± {e[name]:.3f}" if name in e else "") for v, e in zip(own, spreads, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} | {spread} | {met} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/learning.json and learning.md")
    args = parser.parse_args()
    for seed in args.seeds:
        result = run_seed(args.out / f"seed_{seed}", seed)
        (args.out / f"seed_{seed}.json").write_text(json.dumps(result, indent=1))
    results = [json.loads(p.read_text()) for p in sorted(args.out.glob("seed_*.json"))]
    text = table(results)
    print(text)
    if args.record:
        folder = Path(__file__).parent / "results"
        (folder / "learning.json").write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
        (folder / "learning.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
