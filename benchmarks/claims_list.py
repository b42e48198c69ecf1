"""The six claims: which numbers belong to each, and what the report expects of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from claims_arms import QUARTERS, SCOPES
from claims_results import Getter, minus

TASKS = ("t2i", "edit")
BEST = "base, best guidance"
LOST = 0.05  # of a teacher's score, that the student may lose
MEASURES = ("reward", "judge")


@dataclass(frozen=True)
class Row:
    """One number of one arm."""

    arm: str
    measured: str
    get: Getter


@dataclass(frozen=True)
class Difference:
    """a - b of the same number, which the report expects to be above -`kept` times b: above 0, or nearly all of b kept."""

    arm: str
    other: str
    measured: str
    a: Getter
    b: Getter
    kept: float = 0.0


@dataclass(frozen=True)
class Claim:
    title: str
    says: str
    notes: str
    rows: Sequence[Row]
    differences: Sequence[Difference] = field(default_factory=tuple)


def at(measure: str, arm: str, task: str, scale: Getter | float) -> Getter:
    """results -> its `measure` ("judge" or "reward") of an arm; the scale may depend on the seed's recipe."""
    return lambda r: getattr(r, measure)(arm, task, scale(r) if callable(scale) else scale)


def best(measure: str, task: str) -> Getter:
    return lambda r: r.best_base(measure, task)


def claims() -> dict[int, Claim]:
    return {1: _scopes(), 2: _nodes(), 3: _prompts(), 4: _weights(), 5: _student(), 6: _dense()}


def _scopes() -> Claim:
    scales = {"guidance 1": 1.0, "the rollout's guidance": lambda r: r.scope()}
    arms = ("base", "t2i_shuffled", *SCOPES)
    wanted = [(measure, words) for words in scales for measure in ("reward", "judge")]
    rows = [Row(name, f"{m} at {words}", at(m, name, "t2i", scales[words])) for name in arms for m, words in wanted]
    rows += [Row(name, "steps", lambda r, n=name: r.fact(n, "steps")) for name in SCOPES]
    rows += [Row(name, "drift from the base", lambda r, n=name: r.drift(n)) for name in ("t2i_shuffled", *SCOPES)]
    rows += [Row(name, "kl as logged", lambda r, n=name: r.kl(n)) for name in ("t2i_shuffled", *SCOPES)]
    others = ("scope_both", "scope_none", "t2i_shuffled")
    differences = [
        Difference("scope_rollout", o, f"{m} at {w}", *(at(m, n, "t2i", scales[w]) for n in ("scope_rollout", o)))
        for o in others
        for m, w in wanted
    ]
    return Claim(
        "Where guidance acts: rollout only, rollout and objective, nowhere",
        "Guidance in rollout and objective collapses, guidance nowhere loses style and knowledge; guidance in the rollout alone "
        "does neither.",
        "Drift: mean squared difference of conditional velocities at noised examples, over the base's mean square. kl is "
        "of guided velocities where guidance is in the objective, and does not compare with the others' there. The arm of "
        "the recipe's own scope is the t2i teacher. The control has shuffled rewards and the recipe's scope. All arms train on "
        "the prompts and weights of one probe, drawn with guidance: scope none takes those of another sampler.",
        rows,
        differences,
    )


def _nodes() -> Claim:
    scale = lambda r: r.rollout("t2i")  # noqa: E731
    names = [(f"{name}_quarter_{k}", name, f"at {k}/4") for name in ("t2i", "all_nodes") for k in QUARTERS]
    names = [("base", "base", ""), ("t2i_shuffled", "t2i_shuffled", "at the end"), *names]
    names += [(name, name, "at the end") for name in ("t2i", "all_nodes")]
    rows = [Row(arm, f"{m} {when}".strip(), at(m, place, "t2i", scale)) for place, arm, when in names for m in MEASURES]
    rows += [Row(arm, "reward - judge, at the end", _gap(arm)) for arm in ("base", "t2i", "all_nodes")]
    differences = [
        Difference("t2i", other, "judge", *(at("judge", n, "t2i", scale) for n in ("t2i", other)))
        for other in ("all_nodes", "t2i_shuffled")
    ]
    differences.append(Difference("all_nodes", "t2i", "reward - judge", _gap("all_nodes"), _gap("t2i")))
    return Claim(
        "All nodes against the nodes with much noise",
        "Training on all nodes lifts the trained reward without the picture: its reward runs ahead of a judge that does not train.",
        "The same number of trained nodes an image. Held-out prompts, the rollout's guidance, at quarters of the run.",
        rows,
        differences,
    )


def _gap(arm: str) -> Getter:
    scale = lambda r: r.rollout("t2i")  # noqa: E731
    return lambda r: minus(at("reward", arm, "t2i", scale)(r), at("judge", arm, "t2i", scale)(r))


def _prompts() -> Claim:
    note = (
        "Both train on the candidates of one probe, filtered or all of them. Equal compute in training; the probe is not "
        "counted: its images of one task are about a third of those that a teacher trains on."
    )
    return _two(
        "Prompts filtered by reward range against all",
        "Filtered prompts teach more at equal compute.",
        note,
        "unfiltered",
    )


def _weights() -> Claim:
    says = "Weights per category serve all rewards better than one vector of weights."
    note = (
        "one_vector has the mean of the calibrated weights for every category, and the same scale of advantages. The digits "
        "world's categories want the same shares of their rewards, so that their vectors are much alike: a weak test."
    )
    return _two("Weights per category against one vector", says, note, "one_vector")


def _two(title: str, says: str, notes: str, other: str) -> Claim:
    """The t2i teacher against one variant and the control, at the rollout's guidance."""
    scale = lambda r: r.rollout("t2i")  # noqa: E731
    arms = ("base", "t2i_shuffled", "t2i", other)
    rows = [Row(name, m, at(m, name, "t2i", scale)) for name in arms for m in MEASURES]
    rows += [
        Row(name, f"reward, {c}", lambda r, n=name, c=c: r.component(n, "t2i", scale(r), c))
        for name in arms
        for c in ("digit", "attribute", "ink")
    ]
    rows += [Row(name, "steps", lambda r, n=name: r.fact(n, "steps")) for name in arms[1:]]
    differences = [
        Difference("t2i", o, m, at(m, "t2i", "t2i", scale), at(m, o, "t2i", scale))
        for o in (other, "t2i_shuffled")
        for m in MEASURES
    ]
    return Claim(title, says, notes + " Held-out prompts, the rollout's guidance.", rows, differences)


def taught(task: str) -> Getter:
    return lambda r: r.seed.taught(task)


def _student() -> Claim:
    rows, differences = [], []
    for task in TASKS:
        for m in MEASURES:
            own = [
                ("base, no guidance", at(m, "base", task, 1.0)),
                (BEST, best(m, task)),
                (f"{task} teacher, as taught", at(m, task, task, taught(task))),
                (f"{task} teacher, no guidance", at(m, task, task, 1.0)),
                (f"{task}_shuffled, as trained", at(m, f"{task}_shuffled", task, lambda r, t=task: r.rollout(t))),
                ("mix, as trained", at(m, "mix", task, lambda r: r.rollout("mix"))),
                ("student", at(m, "student", task, 1.0)),
                ("student of the base", at(m, "student_of_base", task, 1.0)),
            ]
            rows += [Row(arm, f"{m}, {task}", get) for arm, get in own]
            rows.append(Row(BEST, f"its scale for {m}, {task}", lambda r, m=m, t=task: r.best_scale(m, t)))
            student = at(m, "student", task, 1.0)
            others = [own[k] for k in (1, 2, 5, 7)]
            differences += [
                Difference("student", arm, f"{m}, {task}", student, get, LOST if "teacher" in arm else 0.0)
                for arm, get in others
            ]
    return Claim(
        "One student, without guidance, of both teachers",
        "The student keeps what its teachers can, needs no guidance, and beats Mix-RL.",
        "The student of the base has the guided base for both teachers: what it gains is guidance absorbed, not learning. "
        "The base's best guidance is chosen for each number on the same prompts, in its favour. Mix-RL has the compute of "
        "both teachers together.",
        rows,
        differences,
    )


def _dense() -> Claim:
    arms = ("base", "student_of_base", "student_one_node", "student")
    rows = [Row(name, f"{m}, {task}", at(m, name, task, 1.0)) for task in TASKS for name in arms for m in MEASURES]
    rows += [Row(name, "steps", lambda r, n=name: r.fact(n, "steps")) for name in arms[1:]]
    differences = [
        Difference("student", o, f"{m}, {task}", *(at(m, n, task, 1.0) for n in ("student", o)))
        for task in TASKS
        for o in ("student_one_node", "student_of_base", "base")
        for m in MEASURES
    ]
    says = "Training every node of a trajectory teaches more than one node of each, at equal compute."
    notes = (
        "Without guidance. The one node is any of a trajectory's, all alike. The control is the dense student of the guided "
        "base."
    )
    return Claim("Dense distillation against one node a trajectory", says, notes, rows, differences)
