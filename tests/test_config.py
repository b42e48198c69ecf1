import pytest
import yaml

from qirl.config import KINDS, describe, load, to_dict
from qirl.errors import UserError
from qirl.evaluation.compare import config_of
from qirl.paths import configs, find_config

RL = {"model": {"path": "base"}}
DISTILL = {**RL, "distill": {"teachers": {"edit": {"path": "7", "task": "edit"}, "draw": {"path": "runs/t2i"}}}}


CATEGORISE = {"categorise": {"model": "m", "servers": ["http://x"], "categories": {"a": "one", "b": "two"}}}


def refusal(kind: str, source, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(kind, source, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("polcy.group=4", "policy"),
        ("policy.gruop=4", "policy.group"),
        ("policy.nft.betta=1", "policy.nft.beta"),
        ("policy.timesteps.cuont=1", "policy.timesteps.count"),
        ("policy.lr=1", "optimizer.lr"),
        ("group=4", "policy.group"),
        ("model.lora.rnak=4", "model.lora.rank"),
    ],
)
def test_an_unknown_name_is_refused_at_any_depth_with_the_nearest_one(override, nearest):
    assert f"did you mean '{nearest}'?" in refusal("train", RL, override)
    name, value = override.split("=")
    tree = int(value)
    for part in reversed(name.split(".")):
        tree = {part: tree}
    assert f"did you mean '{nearest}'?" in refusal("train", tree)


def test_a_section_of_another_command_is_named():
    assert refusal("train", {**RL, "pretrain": {}}).startswith("'pretrain' belongs to `qirl pretrain`")
    assert refusal("pretrain", None, "policy.group=4").startswith("'policy' belongs to `qirl train`")


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=null", "run.seed=true", "run.seed=-1", "run.seed=18446744073709551616", "run.seed=1.5", "run.steps=0",
        "run.steps=many", "run.out=null", "run.device=gpu", "run.device=cuda:", "optimizer.impl=fused", "optimizer.lr=true", "optimizer.lr=.nan", "optimizer.lr=.inf",
        "optimizer.lr=0", "optimizer.betas=0.9", "optimizer.betas=[0.9]", "optimizer.betas=[0.9, true]",
        "optimizer.betas=[0.9, 1.0]", "flow.rescale=1", "flow.rescale=on please", "flow.sampler=sd", "flow.steps=1001",
        "flow.base_tokens=9000", "policy.loss=3", "advantage.weights=[1, 2]", "advantage.weights.digit=true",
        "advantage.weights.digit=-1", "advantage.category_weights.plain=1", "policy=3", "policy.group.x=3", "policy.group",
        "=3", "policy.group=[1",
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_and_named(override):
    name = override.partition("=")[0]
    line = refusal("train", RL, override)
    assert name.split(".")[-1] in line or "override" in line


@pytest.mark.parametrize(
    ("overrides", "fix"),
    [
        (["policy.group=1"], "use 2 or more"),
        (["policy.timesteps.count=9"], "use 7 or fewer"),
        (["flow.sampler=sde"], "use ode"),
        (["policy.loss=grpo"], "set flow.sampler=sde"),
        (["policy.loss=guard", "flow.sampler=cps"], "use flow.sampler=sde"),
        (["policy.loss=grpo", "flow.sampler=cps", "flow.level=1.5"], "use 1 or less"),
        (["policy.loss=grpo", "flow.sampler=cps", "policy.kl_form=transition"], "use velocity"),
        (["policy.old=recompute"], "leave policy.old=auto"),
        (["policy.loss=grpo", "flow.sampler=sde", "policy.old=detach", "policy.epochs=2"], "use recompute"),
        (["policy.loss=grpo", "flow.sampler=sde", "policy.old=rollout", "flow.guidance=4"], "use recompute"),
        (["policy.minibatches=3"], "use 6 prompts"),
        (["optimizer.kind=adamw_8bit", "optimizer.impl=torch"], "remove one of the two"),
        (["model.architecture.layers=2"], "remove one of the two"),
        (["model.path=null"], "name a model folder"),
        (["model.revision=v2"], "write model.path=hf://OWNER/NAME, or remove model.revision"),
        (["model.path=null", "model.revision=v2"], "model.path=null is none; write model.path=hf://"),
        (["model.path=hf://a/b@v1", "model.revision=v2"], "name two revisions; remove one of the two"),
    ],
)
def test_options_that_contradict_each_other_are_refused_with_the_fix(overrides, fix):
    assert fix in refusal("train", RL, *overrides)


@pytest.mark.parametrize("path", ["hf://a/b", "hf://a/b@2024"])
def test_a_revision_is_the_one_that_is_looked_up_and_stays_so_in_the_config_as_resolved(path):
    config = load("train", None, [f"model.path={path}", "model.revision=2024"])
    assert (config.model.path, config.model.revision) == ("hf://a/b@2024", "2024")
    assert load("train", to_dict(config)) == config
    assert "put it in quotes" in refusal("train", {"model": {"path": path, "revision": 2024}})


def test_models_that_are_compared_have_revisions_of_their_own():
    models = {"new": "runs/new", "old": "hf://a/b@v1"}
    config = load("evaluate", {"model": {"path": "hf://a/b", "revision": "v2"}, "evaluation": {"models": models}})
    assert {name: config_of(config, name).model.path for name in models} == models


def test_contradictions_of_the_other_commands():
    assert "set model.path, or rank 0" in refusal("pretrain", None, "model.lora.rank=4")
    assert "remove it" in refusal("pretrain", None, "world.prompts=mine.txt")
    assert "even" in refusal("pretrain", None, "model.architecture.head_dim=16")
    assert "such as [1, 4]" in refusal("evaluate", None, "evaluation.guidance=[]")
    assert "such as [1, 4]" in refusal("evaluate", None, "evaluation.guidance=[-1]")


@pytest.mark.parametrize(
    "override, fix",
    [
        ("categorise.servers=[]", "name a server"), ("categorise.model=null", "categorise.model is missing"),
        ("categorise.categories={a: one}", "give two or more"), ("categorise.categories.c=''", "'c' needs a name and a description"),
        ("categorise.other=''", "categorise.other"),
    ],
)  # fmt: skip
def test_a_list_of_categories_is_whole(override, fix):
    assert fix in refusal("categorise", CATEGORISE, override)


def test_options_of_named_entries_are_checked_like_any_other():
    config = load("distill", DISTILL, ["distill.teachers.7.path=2024", "distill.teachers.7.guidance=4e0"])
    assert (config.distill.teachers["7"].path, config.distill.teachers["7"].guidance) == ("2024", 4.0)
    assert config.world.task == "mixed"
    line = refusal("distill", DISTILL, "distill.teachers.draw.giudance=4")
    assert "unknown option 'distill.teachers.draw.giudance'; did you mean 'distill.teachers.draw.guidance'?" in line
    assert "the default is 1.0" in refusal("distill", DISTILL, "distill.teachers.draw.guidance=true")
    assert "did you mean 'edit'?" in refusal("distill", DISTILL, "distill.teachers.draw.task=edti")
    assert "is a section; got 3" in refusal("distill", DISTILL, "distill.teachers.draw=3")
    assert "distill.teachers.draw.path is missing" in refusal("distill", DISTILL, "distill.teachers.draw=null")


def test_numbers_are_read_as_people_write_them(tmp_path):
    text = (
        "model: {path: base}\noptimizer: {lr: 1e-4, betas: [9e-1, 0.95]}\nrun: {steps: 2e1, seed: 18446744073709551615}"
    )
    (tmp_path / "c.yaml").write_text(text)
    config = load(
        "train", tmp_path / "c.yaml", ["optimizer.eps=1e-6", "advantage.weights.digit=1e-1", "flow.guidance=4"]
    )
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.eps) == (1e-4, (0.9, 0.95), 1e-6)
    assert (config.run.steps, config.run.seed, config.flow.guidance) == (20, 2**64 - 1, 4.0)
    assert config.advantage.weights == {"digit": 0.1}


def test_off_is_a_word_where_an_option_has_it_and_false_elsewhere(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {path: base, fp8: off}\nrun: {graphs: off}")
    config = load("train", tmp_path / "c.yaml")
    assert (config.model.fp8, config.run.graphs) == ("off", False)
    assert load("train", RL | {"model": {"path": "base", "fp8": "torch"}}, ["model.fp8=off"]).model.fp8 == "off"
    assert "model.fp8=true: should be 'off'" in refusal("train", RL, "model.fp8=on")


def test_text_stays_text():
    assert load("train", RL, ["run.out=2024"]).run.out == "2024"
    assert load("train", RL, ["run.out=runs/a=b"]).run.out == "runs/a=b"
    assert load("train", RL, ["model.path='7'"]).model.path == "7"
    assert "put it in quotes" in refusal("train", {"model": {"path": 7}})


def test_null_is_the_absence_of_a_path():
    assert load("evaluate", {"model": {"path": None}, "world": {"prompts": None}}).model.path is None
    assert load("pretrain", {"model": {"path": "base"}}, ["model.path=null"]).model.path is None


def test_an_empty_section_means_its_defaults():
    assert load("pretrain", {"pretrain": None}, ["run.seed=1"]) == load("pretrain", {"run": {"seed": 1}})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b", "holds a list"),
        ("just words", "holds a str"),
        ("run: {steps: 3", "line 1, column"),
        ("run:\n\tsteps: 3", "line 2, column 1"),
        ("run: {steps: 1, steps: 2}", "'steps' is given twice"),
        ("? [a, b]\n: 1", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_of_sections_is_refused(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    assert words in refusal("train", tmp_path / "c.yaml")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    assert "No such file" in refusal("train", tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_bytes(b"run: {out: \xff\xfe}")
    assert "is not valid YAML" in refusal("train", tmp_path / "c.yaml")


def test_what_was_given_is_not_changed():
    given = {"model": {"path": "base"}, "policy": {"group": 4}}
    load("train", given, ["policy.group=8", "run.seed=3"])
    assert given == {"model": {"path": "base"}, "policy": {"group": 4}}


@pytest.mark.parametrize("kind", KINDS)
def test_the_resolved_config_reads_back_as_itself(kind, tmp_path):
    judge = {"judge": {"path": "base", "records": "rated.jsonl"}}
    config = load(
        kind,
        {
            "distill": DISTILL,
            "reward": judge,
            "categorise": CATEGORISE,
            "serve": {"rewards": {"j": {"kind": "judge", "model": "m"}}},
        }.get(kind, RL),
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert load(kind, tmp_path / "c.yaml") == config


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_is_described(kind):
    for name, type_name, default, text in describe(kind):
        assert type_name and default and len(text) > 10, name
        assert "typing" not in type_name and "<" not in type_name.replace("<=", "").replace("< ", ""), type_name


@pytest.mark.parametrize("name", ["pretrain", "t2i", "distill", "evaluate", "arena"])
def test_the_shipped_configs_are_valid(name):
    kind = {"t2i": "train", "arena": "evaluate"}.get(name, name)
    load(kind, find_config(f"digits/{name}"))
    assert find_config(f"digits/{name}") == configs() / f"digits/{name}.yaml"


def test_an_unknown_config_names_the_nearest_one():
    with pytest.raises(UserError, match="did you mean 'digits/pretrain'"):
        find_config("digits/pretrian")


def test_the_judges_configs_are_valid():
    rated = ["judge.path=MODEL", "judge.records=rated.jsonl"]
    assert load("reward", find_config("judge/train"), rated).judge.rank == 32
    assert list(load("serve", find_config("judge/serve")).rewards) == ["alignment", "text", "artifacts"]
