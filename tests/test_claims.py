"""The experiments behind the claims: order, failure and resumption of arms, equal compute, tables, and all of it in miniature."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_runs import qirl
from tiny_runs import TEXT_DIM, save_random_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import claims  # noqa: E402
import claims_arms  # noqa: E402
from arms import Arm, Job, Scheduler, closure, elapsed  # noqa: E402
from claims_arms import Seed, Study, step_flops  # noqa: E402
from claims_results import Number, Results, mean, minus  # noqa: E402
from claims_tables import verdicts  # noqa: E402

from qirl import config as configuration  # noqa: E402
from qirl.errors import UserError  # noqa: E402
from qirl.evaluation.evaluate import balanced  # noqa: E402
from qirl.paths import find_config  # noqa: E402
from qirl.world import make_world  # noqa: E402

# ---- arms


def shell(folder, name, needs=(), script="true", recipe=1, repeats=False):
    """An arm that runs `script`, then writes its product and a line into `log`."""
    product = folder / name / "product"
    words = f"mkdir -p {product.parent}; {script} && echo {name} >> {folder}/log && touch {product}"
    return Arm(name, tuple(needs), lambda: Job(("sh", "-c", words), product, recipe, {"steps": 3}, repeats))


def log(folder):
    path = folder / "log"
    return path.read_text().split() if path.exists() else []


def run(folder, *arms, workers=2):
    scheduler = Scheduler(arms, folder, workers)
    return scheduler.run(), scheduler


def test_a_call_that_starts_no_arm_leaves_the_time_of_the_study_as_it_is(tmp_path):
    """The text of a study says how long it took, and must be the same when it is written again."""
    arm = shell(tmp_path, "one", script="sleep 0.2")
    assert run(tmp_path, arm)[0] and 0.2 < (took := elapsed(tmp_path))
    assert run(tmp_path, arm)[0] and elapsed(tmp_path) == took and log(tmp_path) == ["one"]


def test_an_arm_starts_only_after_all_that_it_needs(tmp_path):
    arms = {
        a.name: a
        for a in (
            shell(tmp_path, "last", ["left", "right"]),
            shell(tmp_path, "left", ["first"], "sleep 0.3"),
            shell(tmp_path, "right", ["first"]),
            shell(tmp_path, "first", script="sleep 0.2"),
            shell(tmp_path, "unwanted"),
        )
    }
    sorted_arms = closure(arms, ["last"])
    assert [a.name for a in sorted_arms] == ["first", "left", "right", "last"]
    good, scheduler = run(tmp_path, *sorted_arms)
    assert good and log(tmp_path) == ["first", "right", "left", "last"]
    assert scheduler.records.known["left"]["seconds"] >= 0.3 and scheduler.records.known["left"]["steps"] == 3


def test_a_job_is_made_when_its_needs_are_done(tmp_path):
    read = []

    def make():
        read.append((tmp_path / "log").read_text())
        return Job(("touch", str(tmp_path / "late")), tmp_path / "late", 1)

    good, _ = run(tmp_path, shell(tmp_path, "early"), Arm("late", ("early",), make))
    assert good and read == ["early\n"]


def test_a_failed_arm_stops_only_those_that_need_it_and_shows_its_errors(tmp_path, capsys):
    good, scheduler = run(
        tmp_path,
        shell(tmp_path, "bad", script="echo broken >&2; exit 3"),
        shell(tmp_path, "child", ["bad"]),
        shell(tmp_path, "grandchild", ["child"]),
        shell(tmp_path, "other"),
    )
    assert not good and log(tmp_path) == ["other"]
    assert scheduler.failed == {"bad": "exit code 3", "child": "needs bad", "grandchild": "needs child"}
    shown = capsys.readouterr().err
    assert "bad: FAILED (exit code 3)\n    broken" in shown and "other: done" in shown


def test_an_arm_that_leaves_no_product_has_failed(tmp_path):
    silent = Arm("silent", (), lambda: Job(("true",), tmp_path / "nothing", 1))
    good, scheduler = run(tmp_path, silent)
    assert not good and "made no" in scheduler.failed["silent"]


def test_done_arms_are_not_run_again_and_failed_ones_are(tmp_path):
    fine = shell(tmp_path, "fine")
    assert not run(tmp_path, fine, shell(tmp_path, "child", ["fine"], "exit 1"))[0]
    assert run(tmp_path, fine, shell(tmp_path, "child", ["fine"]))[0]
    assert log(tmp_path) == ["fine", "child"]


def test_an_arm_whose_folder_was_deleted_is_run_again(tmp_path):
    arm = shell(tmp_path, "arm")
    run(tmp_path, arm)
    (tmp_path / "arm/product").unlink()
    (tmp_path / "arm").rmdir()
    assert run(tmp_path, arm)[0] and log(tmp_path) == ["arm", "arm"]


def test_what_needs_an_arm_that_was_made_again_is_made_again(tmp_path):
    arms = (shell(tmp_path, "base"), shell(tmp_path, "eval", ["base"], repeats=True))
    assert run(tmp_path, *arms)[0]
    (tmp_path / "base/product").unlink()
    assert run(tmp_path, *arms)[0] and run(tmp_path, *arms)[0]
    assert log(tmp_path) == ["base", "eval", "base", "eval"]


def test_a_need_that_left_damaged_results_fails_only_what_reads_them(tmp_path):
    def make():
        return json.loads("{")

    good, scheduler = run(tmp_path, Arm("reader", (), make), shell(tmp_path, "other"))
    assert not good and "JSONDecodeError" in scheduler.failed["reader"] and log(tmp_path) == ["other"]


def test_results_of_another_recipe_are_refused_or_made_anew_also_further_down(tmp_path):
    def arms(recipe):
        return (
            shell(tmp_path, "base"),
            shell(tmp_path, "run", ["base"], recipe=recipe),
            shell(tmp_path, "eval", ["base"], recipe=recipe, repeats=True),
            shell(tmp_path, "child", ["run"]),
        )

    assert run(tmp_path, *arms(1), workers=1)[0]
    good, scheduler = run(tmp_path, *arms(2), workers=1)
    assert not good and "made by another recipe" in scheduler.failed["run"] and "delete it" in scheduler.failed["run"]
    assert log(tmp_path) == ["base", "run", "eval", "child", "eval"]
    for name in ("base", "child"):  # deleted from above: what came after is of another base
        (tmp_path / name / "product").unlink(missing_ok=True)
    good, scheduler = run(tmp_path, shell(tmp_path, "base"), shell(tmp_path, "run", ["base"], recipe=3))
    assert not good and list(scheduler.failed) == ["run"]


def test_an_unfinished_arm_of_another_recipe_is_not_continued(tmp_path):
    assert not run(tmp_path, shell(tmp_path, "arm", script="exit 1"))[0]
    good, scheduler = run(tmp_path, shell(tmp_path, "arm", recipe=2))
    assert not good and "another recipe" in scheduler.failed["arm"] and log(tmp_path) == []


def test_at_most_that_many_workers_run_at_the_same_time(tmp_path):
    count = f"ls {tmp_path}/busy* 2>/dev/null | wc -l >> {tmp_path}/most"
    arms = [
        shell(tmp_path, f"a{i}", script=f"touch {tmp_path}/busy{i}; {count}; sleep 0.15; rm {tmp_path}/busy{i}")
        for i in range(5)
    ]
    assert run(tmp_path, *arms, workers=2)[0]
    assert max(map(int, (tmp_path / "most").read_text().split())) == 2


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts jobs in the background ignores it
sys.path[:0] = [{benchmarks!r}, {tests!r}]
from pathlib import Path
from test_claims import run, shell
folder = Path({folder!r})
script = "trap 'echo saved >> {folder}/log; exit 143' TERM; touch {folder}/begun; sleep {seconds} & wait $!"
raise SystemExit(0 if run(folder, shell(folder, "quick"), shell(folder, "long", ["quick"], script))[0] else 1)
"""


def test_an_interrupted_scheduler_stops_its_arms_by_a_signal_and_goes_on(tmp_path):
    def program(seconds):
        text = PROGRAM.format(
            benchmarks=str(BENCHMARKS), tests=str(Path(__file__).parent), folder=str(tmp_path), seconds=seconds
        )
        return subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.PIPE, text=True)

    first = program(30)
    while not (tmp_path / "begun").exists():
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in first.communicate(timeout=20)[1]
    assert log(tmp_path) == ["quick", "saved"]
    assert program(0.1).wait(timeout=120) == 0
    assert log(tmp_path) == ["quick", "saved", "long"]
    assert json.loads((tmp_path / "arms.json").read_text())["long"]["done"]


# ---- equal compute

PLAIN = ["world.prompts=null", f"world.text_dim={TEXT_DIM}"]


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    """A base of random weights and the built-in prompts: what the plan needs to count."""
    out = tmp_path_factory.mktemp("equal")
    for name in ("base", "t2i", "edit"):
        save_random_model(out / "seed_0" / name / "model")
    overrides = {"t2i": PLAIN, "edit": PLAIN, "mix": PLAIN, "distill": PLAIN[1:]}
    return Seed(Study(out, scale=0.5, overrides=overrides), 0)


def test_arms_take_the_flops_of_their_reference_to_half_a_step(seed):
    budget = seed.steps("t2i") * seed.flops("t2i")
    assert seed.steps("t2i") == round(seed._load("t2i").run.steps / 2)
    for name in ("scope_rollout", "scope_both", "scope_none", "all_nodes", "unfiltered", "one_vector", "t2i_shuffled"):
        assert abs(seed.steps(name) * seed.flops(name) - budget) <= seed.flops(name) / 2, name
    assert seed.steps("scope_both") < seed.steps("scope_rollout") < seed.steps("scope_none")
    both = budget + seed.steps("edit") * seed.flops("edit")
    assert abs(seed.steps("mix") * seed.flops("mix") - both) <= seed.flops("mix") / 2
    dense = seed.steps("student") * seed.flops("student")
    assert seed.steps("student_one_node") > seed.steps("student") == seed.steps("student_of_base")
    assert abs(seed.steps("student_one_node") * seed.flops("student_one_node") - dense) <= seed.flops(
        "student_one_node"
    )


def test_the_flops_of_a_step_are_those_that_dry_run_prints(seed):
    kind, config, overrides = seed.command("scope_both")
    code, out, _ = qirl(kind, find_config(f"digits/{config}"), *overrides, "--dry-run")
    rows = [line.split("  ")[-1].strip() for line in out.splitlines() if line.startswith("FLOPs of")]
    printed = sum(float(row.split()[0]) * {"M": 1e6, "G": 1e9, "T": 1e12}[row.split()[1][0]] for row in rows)
    assert code == 0 and len(rows) == 2 and printed == pytest.approx(seed.flops("scope_both"), rel=0.02)


def test_a_student_s_step_is_the_average_over_its_teachers_shares(seed):
    kind, config, overrides = seed.command("student")

    def cost(t2i, edit):
        more = [f"distill.teachers.t2i.share={t2i}", f"distill.teachers.edit.share={edit}"]
        return step_flops(configuration.load(kind, find_config(f"digits/{config}"), [*overrides, *more]))

    assert min(cost(3, 1), cost(1, 3)) < cost(1, 1) < max(cost(3, 1), cost(1, 3))
    assert cost(3, 1) + cost(1, 3) == pytest.approx(2 * cost(1, 1), rel=0.02)


@pytest.mark.parametrize("guidance, alias", [(1.0, "scope_none"), (3.0, "scope_rollout")])
def test_the_recipe_s_own_scope_is_the_teacher(tmp_path, guidance, alias):
    own = Seed(Study(tmp_path, overrides={"t2i": [f"flow.guidance={guidance}"]}), 0)
    assert [name for name in claims_arms.SCOPES if own.alias(name) == "t2i"] == [alias]
    assert f"seed_0/{alias}" not in own.arms() and "seed_0/eval_t2i" in own.wanted([1])
    assert own.guidance("scope_both") == (2.0 if guidance == 1 else 3.0) and own.guidance("scope_none") == 1


def test_every_arm_of_the_study_can_be_reached_and_is_wanted_by_some_claim(tmp_path):
    own = Seed(Study(tmp_path), 0)
    every = {arm.name for arm in closure(own.arms(), own.wanted([1, 2, 3, 4, 5, 6]))}
    assert every == set(own.arms())
    few = {arm.name for arm in closure(own.arms(), own.wanted([6]))}
    assert "seed_0/student_one_node" in few and not {"seed_0/mix", "seed_0/unfiltered", "seed_0/arena"} & few


def test_every_arm_s_config_is_accepted_and_differs_as_it_says(tmp_path):
    own = Seed(Study(tmp_path), 7)
    loaded = {name: own._load(name) for name in (*claims_arms.RL, *claims_arms.STUDENTS, "base", "curate", "calibrate")}
    assert all(config.run.seed == 7 for config in loaded.values())
    assert loaded["t2i"].world.prompts.endswith("/curate/curated.jsonl")
    assert loaded["unfiltered"].world.prompts.endswith("/everything/curated.jsonl")
    assert loaded["one_vector"].advantage.calibration.endswith("/one_vector_weights/calibration.json")
    assert loaded["unfiltered"].advantage.calibration == loaded["t2i"].advantage.calibration
    assert loaded["student_one_node"].distill.nodes == 1 and loaded["student_one_node"].distill.power == 0
    assert (loaded["scope_both"].guidance.scope, loaded["scope_none"].flow.guidance) == ("both", 1)
    assert loaded["all_nodes"].policy.timesteps.count == loaded["t2i"].policy.timesteps.count
    teachers = loaded["student_of_base"].distill.teachers
    assert {t.path for t in teachers.values()} == {str(tmp_path / "seed_7/base")}
    assert {n: t.guidance for n, t in teachers.items()} == {
        n: t.guidance for n, t in loaded["student"].distill.teachers.items()
    }


def test_arms_of_one_task_answer_the_prompts_that_players_of_both_answer(tmp_path):
    """Else a teacher (both tasks) and its variants (one task) would be compared on different prompts."""
    asked = {}
    for task in ("t2i", "edit", "mixed"):
        own = configuration.load("evaluate", find_config("digits/evaluate"), Seed(Study(tmp_path), 0).evaluation(task))
        held_out = make_world(own.world).data.prompts("held_out")
        asked[task] = [
            (p.id, p.task, again) for p, again in balanced(held_out, own.evaluation.prompts, own.evaluation.seed)
        ]
        assert len(asked[task]) * own.evaluation.group >= 500 * (2 if task == "mixed" else 1)
    for task in ("t2i", "edit"):
        assert sorted(asked[task]) == sorted(one for one in asked["mixed"] if one[1] == task)


# ---- tables


def table_of(tasks, judge, reward):
    """by_prompt of an evaluation: four prompts a task, whose values are 0.01 apart."""
    components = {"t2i": ("digit", "attribute", "ink"), "edit": ("instruction", "identity", "ink")}
    rows = [(task, place, 0.01 * (place - 1.5)) for task in tasks for place in range(4)]
    table = {"id": list(range(len(rows))), "task": [task for task, *_ in rows]}
    table["judge_accuracy"] = [judge + off for *_, off in rows]
    for name in sorted({name for task in tasks for name in components[task]}):
        table[name] = [reward + off if name in components[task] else None for task, _, off in rows]
    return table


def wrote(out, seed, name, judge, reward, scales=("1", "2"), tasks=("t2i", "edit"), rise=0.0):
    """evaluation.json of an arm by hand; at scale 2 everything is higher by `rise`."""
    own = {s: {"by_prompt": table_of(tasks, judge + i * rise, reward + i * rise)} for i, s in enumerate(scales)}
    folder = out / f"seed_{seed}" / name
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps({"guidance": own}))
    return {
        f"seed_{seed}/{name}": {"done": True, "steps": 40, "seconds": 60.0},
        f"seed_{seed}/eval_{name}": {"done": True},
    }


@pytest.fixture
def half_done(tmp_path):
    """Seed 0 with claim 5's models, seed 1 with the base and the student alone, seed 2 with nothing."""
    known = wrote(tmp_path, 0, "base", 0.5, 0.55, ("1", "2", "4"), rise=0.1)
    known |= wrote(tmp_path, 0, "t2i", 0.8, 0.85) | wrote(tmp_path, 0, "edit", 0.6, 0.65)
    known |= wrote(tmp_path, 0, "student", 0.77, 0.8, ("1",)) | wrote(tmp_path, 0, "student_of_base", 0.7, 0.82, ("1",))
    known |= wrote(tmp_path, 1, "base", 0.5, 0.55, ("1", "2", "4")) | wrote(tmp_path, 1, "student", 0.4, 0.5, ("1",))
    (tmp_path / "arms.json").write_text(json.dumps(known))
    return Study(tmp_path)


def test_claim_5_says_yes_or_no_for_each_seed_and_nothing_where_numbers_miss(half_done):
    first, second, third = (verdicts(r) for r in claims.results_of(half_done, [0, 1, 2]))
    assert [own.yes for own in first.values()] == [True, True, True, False, True, False]
    assert first["judge, t2i: at least 95% of the teacher's"].text == "yes (96.2%, +0.010 ± 0.001)"
    # the base is best at guidance 4, with a reward of 0.55 + 2 x 0.1
    assert first["reward, t2i: above the base at its best guidance"].text == "yes (+0.050 ± 0.000)"
    assert first["reward, t2i: above the student of the base"].text == "**no** (-0.020 ± 0.000)"
    assert [own.yes for own in second.values()] == [None, None, False, None, False, None]
    assert all(own.yes is None and own.text == "-" for own in third.values())


def test_tables_show_what_is_there_and_a_dash_where_nothing_is(half_done, capsys):
    out = half_done.out
    assert claims.main(["--out", str(out), "--tables", "--seeds", "0", "1", "2"]) == 0
    text = (out / "results/claims.md").read_text()
    assert text == capsys.readouterr().out.removesuffix("\n")
    assert "| student | judge, t2i | 0.770 ± 0.021 | 0.400 ± 0.021 | - | 0.585 ± 0.262 |" in text
    assert "| base, best guidance | judge, t2i | 0.700 ± 0.021 | 0.500 ± 0.021 | - |" in text
    assert "| mix, as trained | judge, edit | - | - | - | - |" in text
    assert "| student - base, best guidance | reward, t2i | 0.050 ± 0.000 | -0.050 ± 0.000 | - |" in text
    assert "1 of 2 seeds" in text and "14 arms of 7.0 minutes" in text
    record = json.loads((out / "results/claims.json").read_text())
    assert record["seeds"] == [0, 1, 2] and set(record["claims"]) == set("123456")
    assert record["claims"]["5"]["verdicts"][2] == dict.fromkeys(record["claims"]["5"]["verdicts"][0])
    assert all((out / f"results/claims_{n}.png").stat().st_size > 5000 for n in range(1, 7))


def test_tables_of_an_empty_folder_are_all_dashes(tmp_path):
    assert claims.main(["--out", str(tmp_path), "--tables", "--seeds", "4"]) == 0
    lines = [x for x in (tmp_path / "results/claims.md").read_text().splitlines() if x.startswith("| base |")]
    assert lines and all(line.endswith("| - |") or line.endswith("| - | - |") for line in lines)


def test_an_evaluation_that_is_not_done_does_not_count(half_done):
    path = half_done.out / "arms.json"
    known = json.loads(path.read_text())
    known["seed_0/eval_student"]["done"] = False
    path.write_text(json.dumps(known))
    (results,) = claims.results_of(half_done, [0])
    assert results.judge("student", "t2i", 1.0) is None and results.judge("t2i", "t2i", 2.0) is not None


def test_the_reward_is_weighted_as_in_the_recipe_by_what_applies_to_a_prompt(tmp_path):
    study = Study(tmp_path, overrides={"t2i": ["advantage.weights={digit: 3, attribute: 1, ink: 0}"]})
    known = wrote(tmp_path, 0, "t2i", 0.5, 0.5, ("1",), ("t2i",))
    path = tmp_path / "seed_0/t2i/evaluation.json"
    record = json.loads(path.read_text())
    record["guidance"]["1"]["by_prompt"] |= {"digit": [0.8] * 4, "attribute": [0.4, 0.4, 0.4, None], "ink": [0.1] * 4}
    path.write_text(json.dumps(record))
    found = Results(Seed(study, 0), known).reward("t2i", "t2i", 1.0)
    assert list(found.by.values()) == pytest.approx([0.7, 0.7, 0.7, 0.8]) and found.value == pytest.approx(0.725)
    assert found.half == pytest.approx(3.182 * 0.025, rel=1e-3)  # t of three degrees of freedom, standard error 0.025


def test_differences_are_paired_by_prompt_and_means_have_the_spread_of_seeds():
    a = Number.over({(0, 0): 0.9, (1, 0): 0.5, (1, 1): 0.5})
    b = Number.over({(0, 0): 0.7, (1, 0): 0.3, (1, 1): 0.3})
    assert minus(a, b).value == pytest.approx(0.2) and minus(a, b).half < 1e-9 < a.half
    assert minus(a, b, 0.5).value == pytest.approx(a.value - b.value / 2)
    other = Number.over({(0, 0): 0.7, (2, 0): 0.3})
    assert str(minus(a, other)) == f"{a.value - other.value:.3f}"  # other prompts: no interval
    assert minus(None, b) is None and minus(a, None) is None
    assert mean([Number(1.0, 0.1), None, Number(3.0, 0.1)]) == Number(2.0, 2**0.5)
    assert str(mean([Number(0.25, 0.1)])) == "0.250" and str(Number(52)) == "52" and str(Number(0.00012)) == "0.00012"
    assert mean([Number(50), Number(50)]) == Number(50) and mean([None]) is None


# ---- checkpoints, drift, and a whole study in miniature

SHORT = ["run.steps=2", "run.samples_every=0", "flow.steps=4", "run.report=false"]
LEARN = [*SHORT, "policy.prompts=8", "policy.group=3", "policy.timesteps.count=2"]
TINY = {
    "pretrain": ["run.steps=6", "pretrain.batch=8", "model.architecture.layers=2", "optimizer.warmup=0", "run.report=false"],
    "curate": ["probe.prompts=16", "probe.group=4", "flow.steps=4", "curate.tau=0.001"],
    "calibrate": ["flow.steps=4"],
    "t2i": LEARN,
    "edit": LEARN,
    "mix": LEARN,
    "distill": [*SHORT, "distill.prompts=4"],
    "evaluate": ["evaluation.prompts=16", "evaluation.group=2", "evaluation.steps=3"],
    "arena": ["arena.resamples=100"],
}  # fmt: skip


def test_a_checkpoint_becomes_a_model_and_drift_measures_its_distance(tmp_path, tiny_model):
    import claims_models
    from tiny_runs import train_config

    from qirl.models.weights import load_model
    from qirl.policy.trainer import train

    train(train_config(tmp_path / "run", tiny_model, {"run": {"keep": 9}}), quiet=True)
    final = load_model(tmp_path / "run/model").state_dict()
    for step in (2, 4):
        claims_models.export(tmp_path / "run", step, tmp_path / f"at_{step}")
    early, late = (load_model(tmp_path / f"at_{step}/model").state_dict() for step in (2, 4))
    assert all(late[name].equal(value) for name, value in final.items())
    assert not all(early[name].equal(value) for name, value in final.items())
    found = {}
    for name in ("at_2", "at_4"):
        claims_models.drift(tiny_model, tmp_path / name, tmp_path / f"{name}.json")
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())["relative"]
    assert 0 < found["at_2"] < found["at_4"] < 1
    claims_models.drift(tiny_model, tiny_model, tmp_path / "same.json")
    assert json.loads((tmp_path / "same.json").read_text())["velocity"] == 0
    with pytest.raises(UserError, match="step_000003"):
        claims_models.export(tmp_path / "run", 3, tmp_path / "at_3")


def test_one_vector_of_weights_is_the_mean_over_the_categories_of_a_task(tmp_path):
    import claims_models

    def category(scale, **weights):
        return {"scale": scale, "components": {name: {"weight": w} for name, w in weights.items()}}

    categories = {
        "plain": category(2, digit=0.6, ink=0.4),
        "colour": category(3, digit=0.4, ink=0.2, attribute=0.4),
        "swap": category(4, identity=1.0),
    }
    (tmp_path / "calibration.json").write_text(json.dumps({"categories": categories}))
    claims_models.main("one_vector_weights", str(tmp_path), str(tmp_path / "new/calibration.json"))
    found = json.loads((tmp_path / "new/calibration.json").read_text())["categories"]
    assert {name: own["scale"] for name, own in found.items()} == {"plain": 2, "colour": 3, "swap": 4}
    weight = lambda name: {key: own["weight"] for key, own in found[name]["components"].items()}  # noqa: E731
    assert weight("colour") == pytest.approx({"digit": 0.5 / 1.2, "ink": 0.3 / 1.2, "attribute": 0.4 / 1.2})
    assert weight("plain") == pytest.approx({"digit": 0.5 / 0.8, "ink": 0.3 / 0.8}) and weight("swap") == {
        "identity": 1
    }


@pytest.mark.slow
def test_claims_5_and_6_from_nothing_to_tables_and_again_without_a_run(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--seeds", "3", "--claims", "5", "6"]
    assert claims.main(arguments, TINY) == 0, capsys.readouterr().err
    (results,) = claims.results_of(Study(tmp_path, overrides=TINY), [3])
    assert all(own.yes is not None for own in verdicts(results).values())
    assert results.playing("student") == 1.0 and results.elo("overall", "base")[0] == 1000
    assert results.fact("student_one_node", "steps").value > results.fact("student", "steps").value == 2
    before = (tmp_path / "arms.json").read_text()
    text = (tmp_path / "results/claims.md").read_text()
    assert claims.main(arguments, TINY) == 0
    assert (tmp_path / "arms.json").read_text() == before and (tmp_path / "results/claims.md").read_text() == text
