"""Six claims of the Qwen-Image-2.0-RL report, each as a small experiment on the digits world, each with its control.

    python benchmarks/claims.py --seeds 0 1 2 --out runs/claims --record

1 guidance in the rollout only; 2 noisy nodes against all; 3 filtered prompts; 4 weights per category; 5 one student of two
teachers; 6 dense distillation. Arms are runs of `qirl` on configs/digits/ (claims_arms.py says how each differs), two at a
time, at equal compute; Ctrl-C stops them on a checkpoint and the same command goes on. Tables and plots are written into
OUT/results, with --record into benchmarks/results/ as well: claims.json, claims.md, claims_1.png to claims_6.png.
--tables makes them of what is there and runs nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from arms import Records, Scheduler, closure, elapsed
from claims_arms import CLAIMS, PLAYERS, Seed, Study
from claims_list import claims
from claims_plots import plot
from claims_results import Number, Results
from claims_tables import LEGEND, markdown, numbers, of_difference, verdicts

from qirl.errors import UserError
from qirl.run.folder import check_writable, write_json
from qirl.run.machine import machine

RECORDED = Path(__file__).parent / "results"


def run(study: Study, seeds: Sequence[int], wanted: Sequence[int], workers: int) -> bool:
    """Runs all arms of these claims that are not done; whether none failed."""
    check_writable(study.out)
    study.out.mkdir(parents=True, exist_ok=True)
    arms, names = {}, []
    for seed in seeds:
        own = Seed(study, seed)
        arms |= own.arms()
        names += own.wanted(wanted)
    environment = {"OMP_NUM_THREADS": str(study.threads)}
    return Scheduler(closure(arms, names), study.out, workers, environment).run()


def results_of(study: Study, seeds: Sequence[int]) -> list[Results]:
    arms = Records(study.out / "arms.json").known
    return [Results(Seed(study, seed), arms) for seed in seeds]


def text_of(results: Sequence[Results], wanted: Sequence[int], study: Study) -> str:
    """All tables, as claims.md holds them."""
    table = claims()
    parts = [
        "# Claims of the report, in miniature",
        LEGEND,
        *(markdown(n, table[n], results) for n in wanted),
        footer(results, study),
    ]
    return "\n\n".join(parts) + "\n"


def footer(results: Sequence[Results], study: Study) -> str:
    """Time of the arms of these seeds, those that other claims share included, and of the study."""
    known = results[0].known if results else {}
    names = {r.seed.folder.name for r in results}
    own = {name: arm for name, arm in known.items() if name.split("/")[0] in names}
    seconds = sum(arm.get("seconds", 0.0) for arm in own.values())
    done = sum(bool(arm.get("done")) for arm in own.values())
    by_kind: dict[str, float] = {}
    for name, arm in own.items():
        kind = "evaluation" if name.split("/")[1].startswith(("eval_", "arena", "drift_")) else "training"
        by_kind[kind] = by_kind.get(kind, 0.0) + arm.get("seconds", 0.0)
    shares = ", ".join(f"{kind} {spent / 60:.1f}" for kind, spent in sorted(by_kind.items()))
    scale = f" All steps x {study.scale:g}." if study.scale != 1 else ""
    return (
        f"{done} arms of {seconds / 60:.1f} minutes in all ({shares}), some at the same time: the study took "
        f"{elapsed(study.out) / 60:.1f} minutes.{scale}"
    )


def record_of(results: Sequence[Results], wanted: Sequence[int], study: Study) -> dict:
    """The numbers of the tables, for claims.json: [value, half width] a seed."""
    table = claims()
    found = {}
    for n in wanted:
        rows = [
            {"arm": row.arm, "measured": row.measured, "seeds": plain(numbers(results, row.get))}
            for row in table[n].rows
        ]
        apart = [
            {"difference": f"{own.arm} - {own.other}", "measured": own.measured}
            | {"seeds": plain(of_difference(results, own))}
            for own in table[n].differences
        ]
        found[str(n)] = {"title": table[n].title, "rows": rows, "differences": apart}
    if 5 in wanted:
        asked = [verdicts(r) for r in results]
        found["5"]["verdicts"] = [{question: own.yes for question, own in one.items()} for one in asked]
        scopes = ("overall", "t2i", "edit")
        found["5"]["elo"] = [{scope: {n: r.elo(scope, n) for n in PLAYERS} for scope in scopes} for r in results]
        others = [n for n in PLAYERS if n != "student"]
        leads = lambda r: {scope: {n: r.elo_ahead(scope, "student", n) for n in others} for scope in scopes}  # noqa: E731
        found["5"]["elo_ahead"] = [leads(r) for r in results]
        found["5"]["guidance"] = [{n: r.playing(n) for n in PLAYERS} for r in results]
    arms = (
        {} if not results else {k: {f: v for f, v in own.items() if f != "key"} for k, own in results[0].known.items()}
    )
    return {
        "machine": machine(),
        "seeds": [r.seed.seed for r in results],
        "scale": study.scale,
        "minutes": round(elapsed(study.out) / 60, 1),
        "claims": found,
        "arms": arms,
    }


def plain(found: Sequence[Number | None]) -> list[list[float] | None]:
    return [number and [number.value, number.half] for number in found]


def write(folder: Path, results: Sequence[Results], wanted: Sequence[int], study: Study) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "claims.md").write_text(text_of(results, wanted, study))
    write_json(folder / "claims.json", record_of(results, wanted, study))
    table = claims()
    for n in wanted:
        plot(n, table[n], results, folder / f"claims_{n}.png")


def main(arguments: Sequence[str] | None = None, overrides: Mapping[str, Sequence[str]] | None = None) -> int:
    """The exit code. overrides: options over those of a config of configs/digits/, by its name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--claims", type=int, nargs="+", choices=sorted(CLAIMS), default=sorted(CLAIMS))
    parser.add_argument("--workers", type=int, default=2, help="arms that run at the same time")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all steps, for trials")
    parser.add_argument("--record", action="store_true", help="write the tables into benchmarks/results/ as well")
    parser.add_argument("--tables", action="store_true", help="only the tables of what is there")
    args = parser.parse_args(arguments)
    if args.workers < 1 or args.scale <= 0:
        parser.error("--workers must be 1 or more and --scale above 0")
    if args.record and (args.claims != sorted(CLAIMS) or len(args.seeds) < 3 or args.scale != 1):
        parser.error("--record keeps whole studies only: all claims, three seeds or more, --scale 1")
    threads = max(1, (os.cpu_count() or 1) // args.workers)
    study = Study(args.out, args.scale, threads, overrides or {})
    try:
        good = args.tables or run(study, args.seeds, args.claims, args.workers)
        results = results_of(study, args.seeds)
        for folder in (args.out / "results", *([RECORDED] if args.record else [])):
            write(folder, results, args.claims, study)
        print(text_of(results, args.claims, study))
    except UserError as error:
        print(f"claims: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("claims: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
