"""The claims as Markdown. Nothing is left out because it contradicts the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from claims_arms import PLAYERS
from claims_list import LOST, TASKS, Claim, Difference
from claims_results import Getter, Number, Results, mean, minus

KEPT = 1 - LOST  # of each teacher's score, that the student is to reach
LEGEND = (
    "± in a seed's column is half a 95 % interval over prompts (images of one prompt count as one cluster); differences are "
    "paired, prompt by prompt, for all arms answer the same prompts from the same noise. ± behind a mean is the standard "
    "deviation over seeds. Only two plain prompts are held out: a quarter of the drawings are theirs. Recipes were chosen with "
    "the held-out judge on seed 0; the other seeds saw no choice. 30 % of the base's edit pairs are flawed on purpose "
    "(copies, other hands), so part of what RL gains on edits is telling those apart."
)


@dataclass(frozen=True)
class Verdict:
    """A question about the student on one seed; `text` says by how much."""

    yes: bool | None
    text: str = "-"


def verdicts(r: Results) -> dict[str, Verdict]:
    """Claim 5's questions, each answered for one seed; None where a number is missing."""
    found = {}
    for task in TASKS:
        student, teacher = r.judge("student", task, 1.0), r.judge(task, task, r.seed.taught(task))
        found[f"judge, {task}: at least {KEPT:.0%} of the teacher's"] = _keeps(student, teacher)
    for task in TASKS:
        student = r.reward("student", task, 1.0)
        found[f"reward, {task}: above the base at its best guidance"] = _beats(student, r.best_base("reward", task))
        found[f"reward, {task}: above the student of the base"] = _beats(
            student, r.reward("student_of_base", task, 1.0)
        )
    return found


def _keeps(student: Number | None, teacher: Number | None) -> Verdict:
    if student is None or teacher is None:
        return Verdict(None)
    over = minus(student, teacher, KEPT)
    share = f"{student.value / teacher.value:.1%}, " if teacher.value else ""
    return _verdict(over, share)


def _beats(student: Number | None, other: Number | None) -> Verdict:
    ahead = minus(student, other)
    return Verdict(None) if ahead is None else _verdict(ahead)


def _verdict(over: Number, before: str = "") -> Verdict:
    """By the sign of `over`; "not clear" where its interval holds 0."""
    clear = "" if abs(over.value) > over.half else ", not clear"
    return Verdict(over.value >= 0, f"{'yes' if over.value >= 0 else '**no**'} ({before}{_signed(over)}{clear})")


def _signed(number: Number) -> str:
    return f"{'+' if number.value >= 0 else ''}{number}"


def numbers(results: Sequence[Results], get: Getter) -> list[Number | None]:
    return [get(r) for r in results]


def of_difference(results: Sequence[Results], own: Difference) -> list[Number | None]:
    return [minus(own.a(r), own.b(r)) for r in results]


def _cell(number: Number | None) -> str:
    return "-" if number is None else str(number)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def markdown(number: int, claim: Claim, results: Sequence[Results]) -> str:
    """The section of one claim."""
    seeds = [f"seed {r.seed.seed}" for r in results]
    lines = []
    for row in claim.rows:
        found = numbers(results, row.get)
        lines.append([row.arm, row.measured, *map(_cell, found), _cell(mean(found))])
    parts = [f"## {number}. {claim.title}", f"The report: {claim.says}", claim.notes]
    parts.append(table(["arm", "measured", *seeds, "mean"], lines))
    parts.append("Differences:")
    parts.append(table(["difference", "measured", *seeds, "mean", "as the report says"], _differences(claim, results)))
    if number == 5:
        parts += _student_tables(results, seeds)
    return "\n\n".join(parts)


def _differences(claim: Claim, results: Sequence[Results]) -> list[list[str]]:
    lines = []
    for own in claim.differences:
        found = of_difference(results, own)
        known = [n for n in found if n is not None]
        low = [minus(own.a(r), own.b(r), 1 - own.kept) for r in results]
        above = sum(n.value > 0 for n in low if n is not None)
        said = f"{above} of {len(known)} seeds" if known else "-"
        said += f" (at most {own.kept:.0%} less)" if known and own.kept else ""
        lines.append([f"{own.arm} - {own.other}", own.measured, *map(_cell, found), _cell(mean(found)), said])
    return lines


def _student_tables(results: Sequence[Results], seeds: Sequence[str]) -> list[str]:
    answers = [verdicts(r) for r in results]
    asked = [[question, *(own[question].text for own in answers)] for question in (answers[0] if answers else ())]
    ratings, leads = [], []
    for scope in ("overall", *TASKS):
        for name in PLAYERS:
            ratings.append([name, scope, *(_rating(r.elo(scope, name)) for r in results)])
            if name != "student":
                ahead = [r.elo_ahead(scope, "student", name) for r in results]
                leads.append([f"student - {name}", scope, *(_lead(own) for own in ahead)])
    scales = [", ".join(f"{n} {r.playing(n):g}" for n in PLAYERS if r.playing(n) is not None) or "-" for r in results]
    return [
        "The student at guidance 1:",
        table(["question", *seeds], asked),
        "Elo (95 % intervals of a bootstrap over prompts; the base is fixed). Guidance: "
        + "; ".join(f"{seed}: {scale}" for seed, scale in zip(seeds, scales, strict=True)),
        table(["player", "prompts", *seeds], ratings),
        "Elo points that the student is ahead, paired by prompt:",
        table(["difference", "prompts", *seeds], leads),
    ]


def _rating(row: tuple[float, float, float] | None) -> str:
    return "-" if row is None else f"{row[0]:.0f}" + (f" ({row[1]:.0f} to {row[2]:.0f})" if row[1] != row[2] else "")


def _lead(row: dict | None) -> str:
    return "-" if row is None else f"{row['value']:+.0f} ({row['low']:+.0f} to {row['high']:+.0f})"
