"""Calibrated reward weights: that they solve their equations, and that training uses and reports them."""

import json
import math

import pytest
import torch
import yaml
from cli_runs import qirl, refused
from tiny_runs import TEXT_DIM, colours, experience, luck, merge, train_config

from qirl.config import load
from qirl.curation.calibrate import calibrate, calibrated, measure, pooled_variance
from qirl.curation.calibration import load_calibration
from qirl.curation.curate import curate
from qirl.curation.ledger import Ledger
from qirl.errors import UserError
from qirl.kernels.group_advantage import group_advantage
from qirl.policy.advantages import ABSENT, contributions, variance_shares
from qirl.policy.trainer import open_trainer, train, train_step
from qirl.run.logs import read

NAN = math.nan
FLOOR = 0.005


def correlated(correlation, std, groups=150, size=16, seed=0):
    """Scores [groups * size, K] around a level of their own in every group, and the groups."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.linalg.cholesky(torch.tensor(correlation, dtype=torch.float64))
    z = torch.randn(groups, size, len(std), generator=generator, dtype=torch.float64) @ root.T
    level = 0.4 + 0.2 * torch.rand(groups, 1, len(std), generator=generator, dtype=torch.float64)
    scores = (level + z * torch.tensor(std, dtype=torch.float64)).clamp(0, 1)
    return scores.flatten(0, 1), torch.arange(groups).repeat_interleave(size)


def shares_and_rms(found, scores, group, noise):
    """Of the advantages themselves, as training makes them."""
    weights = torch.tensor([own["weight"] for own in found["components"].values()], dtype=torch.float64)
    scale = torch.full((len(scores),), found["scale"], dtype=torch.float64)
    applies = scores != ABSENT
    advantage, valid = group_advantage(scores, applies, group, weights.expand_as(scores), noise, FLOOR, scale=scale)
    parts, _ = contributions(scores, group, weights.expand_as(scores), FLOOR, noise, scale)
    torch.testing.assert_close(parts.sum(1).clamp(-5, 5).float(), advantage, atol=1e-5, rtol=1e-5)
    shares = variance_shares(parts[valid], group[valid])
    return shares, float((advantage[valid].double() ** 2).mean().sqrt()), weights


ALIKE = [[1.0, 0.8, 0.3], [0.8, 1.0, 0.2], [0.3, 0.2, 1.0]]
OPPOSED = [[1.0, -0.7, 0.2], [-0.7, 1.0, 0.1], [0.2, 0.1, 1.0]]


@pytest.mark.parametrize("wanted", [(1.0, 1.0, 1.0), (0.6, 0.3, 0.1)])
@pytest.mark.parametrize("correlation", [ALIKE, OPPOSED])
def test_realised_shares_are_the_wanted_ones_and_advantages_have_unit_rms(correlation, wanted):
    names, noise = ["a", "b", "c"], torch.zeros(3, dtype=torch.float64)
    scores, group = correlated(correlation, [0.1, 0.01, 0.04])
    wanted = torch.tensor(wanted, dtype=torch.float64)
    found = measure(scores, group, names, noise, FLOOR, "x", wanted)
    shares, rms, weights = shares_and_rms(found, scores, group, noise)
    # the shrinkage of 5 % is what keeps them apart: a correlation of -0.7 is taken for -0.665
    torch.testing.assert_close(shares, wanted / wanted.sum(), atol=0.05, rtol=0)
    assert rms == pytest.approx(1, abs=0.08) and float(weights.sum()) == pytest.approx(1)
    assert [own["realised"] for own in found["components"].values()] == pytest.approx(shares.tolist())
    assert found["rms"] == pytest.approx(rms, abs=0.01)  # a few advantages are clipped
    equal = measure(scores, group, names, noise, FLOOR, "x", hand=torch.ones(3, dtype=torch.float64))
    naive = torch.tensor([own["realised"] for own in equal["components"].values()], dtype=torch.float64)
    assert (naive - wanted / wanted.sum()).abs().max() > 0.06 and equal["scale"] == 1


def test_without_shrinkage_the_equations_hold_exactly(monkeypatch):
    monkeypatch.setattr("qirl.curation.calibrate.SHRINK", 0.0)
    scores, group = correlated(OPPOSED, [0.1, 0.01, 0.04])
    noise, wanted = torch.zeros(3, dtype=torch.float64), torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    found = measure(scores, group, ["a", "b", "c"], noise, FLOOR, "x", wanted)
    shares, rms, _ = shares_and_rms(found, scores, group, noise)
    torch.testing.assert_close(shares, wanted, atol=1e-6, rtol=0)  # z is gathered in float32
    assert found["rms"] == pytest.approx(1, abs=1e-6)


def test_a_component_that_is_silent_in_most_groups_still_gets_its_share():
    """z is 0 where a group varies less than the floor: the weight makes up for it in the other groups."""
    scores, group = correlated([[1.0, 0.0], [0.0, 1.0]], [0.1, 0.05])
    scores[group >= 45, 1] = 0.5
    noise = torch.zeros(2, dtype=torch.float64)
    found = measure(scores, group, ["a", "b"], noise, FLOOR, "x", torch.ones(2, dtype=torch.float64))
    shares, rms, _ = shares_and_rms(found, scores, group, noise)
    assert found["components"]["b"]["active"] == pytest.approx(0.3)
    torch.testing.assert_close(shares, torch.full((2,), 0.5, dtype=torch.float64), atol=0.02, rtol=0)
    assert rms == pytest.approx(1, abs=0.05)


def test_read_noise_lowers_a_share_by_reliability():
    scores, group = correlated([[1.0, 0.0], [0.0, 1.0]], [0.1, 0.05])
    noise = torch.tensor([0.0, 0.025], dtype=torch.float64)  # a quarter of b's variance
    found = measure(scores, group, ["a", "b"], noise, FLOOR, "x", torch.ones(2, dtype=torch.float64))["components"]
    assert found["b"]["variance"] == pytest.approx(0.05**2, rel=0.1)
    assert found["b"]["reliability"] == pytest.approx(0.75, abs=0.03)
    assert found["b"]["target"] == pytest.approx(0.75 / 1.75, abs=0.01) and found["b"]["wanted"] == 0.5


def test_pooled_variance_by_hand():
    scores = torch.tensor([[0.1, 0.5], [0.3, ABSENT], [0.2, 0.7], [0.8, 0.3], [0.8, 0.3]], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 4, 4])  # (0.01 + 0.01 + 0) / (2 + 1), (0.01 + 0.01) / (1 + 1)
    torch.testing.assert_close(pooled_variance(scores, group), torch.tensor([0.02 / 3, 0.01], dtype=torch.float64))


def config_of(**options):
    return load("calibrate", {"model": {"path": "base"}, **options})


def rows_of(category, *groups):
    return [{"category": category, "scores": [dict(zip("abc", row, strict=False)) for row in g]} for g in groups]


def random_groups(k, count=4, size=6, seed=0):
    return torch.rand(count, size, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


def test_a_component_that_does_not_apply_or_never_varies_is_left_out():
    rows = rows_of("two", *random_groups(2)) + rows_of("three", *random_groups(3))
    for row in rows[4:]:
        for own in row["scores"]:
            own["b"] = 0.9
    options = {"shares": {"a": 0.2, "b": 0.3, "c": 0.5}, "category_shares": {"two": {"a": 0.6}}}
    found = calibrated(rows, {}, config_of(calibrate=options))
    assert list(found["two"]["components"]) == ["a", "b"] and list(found["three"]["components"]) == ["a", "b", "c"]
    assert [own["target"] for own in found["two"]["components"].values()] == pytest.approx([2 / 3, 1 / 3])
    three = found["three"]["components"]
    assert (three["b"]["weight"], three["b"]["target"], three["b"]["active"]) == (0, 0, 0)
    assert [three[c]["target"] for c in "ac"] == pytest.approx([2 / 7, 5 / 7])
    assert found["three"]["notes"] == [
        "b never varies beyond its floor and read noise inside a group; its share goes to the others"
    ] and not found["two"]["notes"]  # fmt: skip


def test_a_share_of_0_takes_a_component_out_even_where_it_would_hedge():
    scores, group = correlated(OPPOSED, [0.1, 0.1, 0.1])
    wanted = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    found = measure(scores, group, ["a", "b", "c"], torch.zeros(3, dtype=torch.float64), FLOOR, "x", wanted)
    assert found["components"]["b"]["weight"] == 0 and not found["notes"]


def test_a_category_without_any_signal_is_named():
    flat = rows_of("flat", [[0.5, 0.5]] * 6)
    with pytest.raises(UserError, match=r"category 'flat': no component with a wanted share \(a, b\) varies"):
        calibrated(rows_of("fine", *random_groups(2)) + flat, {}, config_of())
    with pytest.raises(UserError, match="category 'fine'"):  # all of it is read noise
        calibrated(rows_of("fine", *random_groups(2)), {"a": 0.6, "b": 0.6}, config_of())
    failed = rows_of("failed", *[[[NAN, 0.5]] * 6] * 2)
    with pytest.raises(UserError, match="category 'failed'"):
        calibrated(rows_of("fine", *random_groups(2)) + failed, {}, config_of())


def test_failed_images_leave_the_statistics():
    rows = rows_of("x", *random_groups(2, count=40))
    plain = calibrated(rows, {}, config_of())["x"]
    for row in rows:
        row["scores"].append({"a": NAN, "b": 0.0})
    assert calibrated(rows, {}, config_of())["x"] == plain


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shares": {"a": 1.0, "bb": 1.0}}, "calibrate.shares names 'bb', which no reward returns"),
        ({"category_shares": {"x": {"d": 1.0}}}, "calibrate.category_shares.x names 'd', which no reward returns"),
        ({"category_shares": {"y": {"a": 1.0}}}, "calibrate.category_shares names 'y', which no prompt has"),
        ({"shares": {"a": 1.0}}, "calibrate.shares gives 'b' no share in category 'x'; add it"),
        ({"shares": {"a": 0.0, "b": 0.0}}, "category 'x': no component with a wanted share"),
    ],
)
def test_bad_shares_are_refused(options, words):
    with pytest.raises(UserError) as error:
        calibrated(rows_of("x", *random_groups(2)), {}, config_of(calibrate=options))
    assert words in str(error.value)


def test_the_table_is_the_hand_weights_with_scale_1():
    options = {"method": "table"}
    weights = {"weights": {"a": 3.0}, "category_weights": {"two": {"a": 1.0, "b": 0.0}}}
    rows = rows_of("two", *random_groups(2)) + rows_of("one", *random_groups(2))
    found = calibrated(rows, {}, config_of(calibrate=options, advantage=weights))
    assert [own["weight"] for own in found["one"]["components"].values()] == [0.75, 0.25]
    assert [own["weight"] for own in found["two"]["components"].values()] == [1.0, 0.0]
    assert {found[c]["scale"] for c in found} == {1.0}
    assert (
        found["two"]["components"]["a"]["realised"] == pytest.approx(1)
        and not found["one"]["components"]["a"]["target"]
    )


# --- the command, its file and training -------------------------------------------------------------------------------

PROMPTS = [("a 7", "plain"), ("a 5", "plain"), ("a red 3", "colour"), ("a blue 9", "colour"), ("a cyan 2", "colour")]


def values_of(folder, model, *parts):
    path = folder / "prompts.jsonl"
    lines = [json.dumps({"text": text, "category": category}) + "\n" for text, category in PROMPTS]
    path.write_text("".join(lines))
    values = {
        "run": {"out": str(folder / "cal"), "seed": 3, "threads": 1}, "model": {"path": str(model)},
        "world": {"text_dim": TEXT_DIM, "prompts": str(path)}, "flow": {"steps": 4}, "probe": {"group": 8},
    }  # fmt: skip
    return merge(values, *parts)


def sometimes(samples):
    """Two opposed components, one of which does not apply to plain prompts."""
    rows = colours(samples)
    opposed = [1 - 0.5 * row["red"] - 0.5 * row["edge"] for row in rows]
    return [
        row | ({"dark": d} if s.category != "plain" else {}) for s, row, d in zip(samples, rows, opposed, strict=True)
    ]


@pytest.fixture
def calibration(tmp_path, tiny_model):
    """calibration.json of the rewards `sometimes`."""
    return calibrate(load("calibrate", values_of(tmp_path, tiny_model)), [sometimes], quiet=True)


def rl(folder, model, calibration, *parts):
    values = {
        "world": {"prompts": str(folder / "prompts.jsonl")}, "advantage": {"calibration": str(calibration)},
        "policy": {"prompts": 4, "group": 6}, "run": {"steps": 2},
    }  # fmt: skip
    return train_config(folder / "rl", model, values, *parts)


def test_a_ledger_of_curate_gives_the_calibration_of_its_kept_prompts(tmp_path, tiny_model, calibration):
    values = values_of(tmp_path, tiny_model)
    own = json.loads(calibration.read_text())
    assert set(own["categories"]) == {"plain", "colour"} and own["group"] == 8
    options = {"run": {"out": str(tmp_path / "cur")}, "curate": {"tau": 1e-5}}
    curate(load("curate", merge(values, options)), [sometimes], quiet=True)
    again = {"calibrate": {"ledger": str(tmp_path / "cur")}, "run": {"out": str(tmp_path / "again")}}
    path = calibrate(load("calibrate", merge(values, again)), quiet=True)  # needs no rewards
    assert json.loads(path.read_text())["categories"] == own["categories"]

    ledger = Ledger(tmp_path / "cur/ledger.jsonl")
    header, rows = ledger.read()
    rows[0] |= {"decision": "drop", "reason": "range"}
    ledger.replace(header, rows)
    path = calibrate(load("calibrate", merge(values, again)), quiet=True)
    assert json.loads(path.read_text())["categories"]["plain"]["groups"] == 1
    everything = merge(again, {"calibrate": {"only_kept": False}})
    path = calibrate(load("calibrate", merge(values, everything)), quiet=True)
    assert json.loads(path.read_text())["categories"] == own["categories"]
    ledger.replace(header, [row | {"decision": "drop"} for row in rows])
    with pytest.raises(UserError, match="keeps no prompt"):
        calibrate(load("calibrate", merge(values, again)), quiet=True)


def test_a_ledger_that_does_not_fit_is_refused(tmp_path, tiny_model, calibration):
    values = values_of(tmp_path, tiny_model)
    again = {"calibrate": {"ledger": str(tmp_path / "cal/ledger.jsonl")}, "run": {"out": str(tmp_path / "again")}}
    ledger = Ledger(tmp_path / "cal/ledger.jsonl")
    header, rows = ledger.read()
    for change, words in (
        ({"flow": {"guidance": 2.0}}, r"drawn with other options: flow.guidance \(1.0 there, 2.0 now\)"),
        ({"calibrate": {"ledger": str(tmp_path / "none")}}, "cannot read"),
    ):
        with pytest.raises(UserError, match=words):
            calibrate(load("calibrate", merge(values, again, change)), quiet=True)
    ledger.replace(header | {"policy": "f" * 64}, rows)
    with pytest.raises(UserError, match=f"drawn by policy ffffffffffff, model.path is policy {header['policy'][:12]}"):
        calibrate(load("calibrate", merge(values, again)), quiet=True)
    ledger.replace(header, rows[:-1])
    with pytest.raises(UserError, match="holds 4 of 5 prompts; finish it"):
        calibrate(load("calibrate", merge(values, again)), quiet=True)
    assert not (tmp_path / "again").exists()


def test_training_uses_weights_and_scale_and_reports_the_shares(tmp_path, tiny_model, calibration):
    train(rl(tmp_path, tiny_model, calibration), [sometimes], quiet=True)
    records = list(read(tmp_path / "rl/metrics.jsonl"))
    scores = [row for row in read(tmp_path / "rl/scores.jsonl") if row["step"] == 1]
    found = json.loads(calibration.read_text())["categories"]
    seen = 0
    for category, own in found.items():
        rows = [row for row in scores if row["category"] == category]
        names = list(own["components"])
        table = torch.tensor([[row["scores"][n] for n in names] for row in rows], dtype=torch.float64)
        group = torch.arange(len(rows)) // 6
        by_group = table.view(-1, 6, len(names))
        mean, std = by_group.mean(1)[group], by_group.std(1, correction=0)[group]
        z = torch.where(std >= FLOOR, (table - mean) / std, 0)
        part = own["scale"] * torch.tensor([own["components"][n]["weight"] for n in names]) * z
        total = part.sum(1)
        for k, name in enumerate(names):
            expected = float((part[:, k] * total).sum() / (total**2).sum())
            assert records[0][f"share/{category}/{name}"] == pytest.approx(expected, abs=1e-5)
            assert records[0][f"share_wanted/{category}/{name}"] == own["components"][name]["target"]
            seen += 1
    assert seen == 5 and sum("share/" in key for key in records[0]) == 5


def test_a_calibration_that_changes_under_a_run_is_refused(tmp_path, tiny_model, calibration):
    train(rl(tmp_path, tiny_model, calibration, {"run": {"steps": 1}}), [sometimes], quiet=True)
    trainer = open_trainer(rl(tmp_path, tiny_model, calibration, {"run": {"steps": 1}}), [sometimes])
    trainer.engine.resume()
    record = json.loads(calibration.read_text())
    train_step(trainer, 1)
    record["categories"]["plain"]["scale"] *= 1.01
    calibration.write_text(json.dumps(record))
    trainer = open_trainer(rl(tmp_path, tiny_model, calibration, {"run": {"steps": 1}}), [sometimes])
    trainer.engine.resume()
    with pytest.raises(UserError, match="calibration.json changed since the run began; restore it"):
        train_step(trainer, 1)


def declared(*names):
    def reward(samples):
        return [dict.fromkeys(names, 0.5) for _ in samples]

    reward.components = names
    return reward


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("red", "edge"), "weighs 'dark', which no reward returns"),
        (("red", "edge", "dark", "ink"), "has no weight for 'ink', which a reward returns; it knows dark, edge, red"),
    ],
)
def test_rewards_that_declare_others_are_refused_before_training(tmp_path, tiny_model, calibration, names, words):
    with pytest.raises(UserError, match=words):
        open_trainer(rl(tmp_path, tiny_model, calibration), [declared(*names)])
    assert not (tmp_path / "rl").exists()


def of_both_tasks(calibration):
    """The file as a probe of both tasks writes it: another category, with a component of its own."""
    record = json.loads(calibration.read_text())
    parts = {"red": {"weight": 0.5, "target": 0.5}, "identity": {"weight": 0.5, "target": 0.5}}
    record["categories"]["swap"] = {"scale": 1.0, "components": parts}
    calibration.write_text(json.dumps(record))


def test_categories_and_components_that_a_run_does_not_train_do_not_matter(tmp_path, tiny_model, calibration):
    of_both_tasks(calibration)
    reward = declared("red", "edge", "dark")
    open_trainer(rl(tmp_path, tiny_model, calibration), [reward])
    train(rl(tmp_path, tiny_model, calibration), [sometimes], quiet=True)
    (record, *_) = read(tmp_path / "rl/metrics.jsonl")
    assert {key.split("/")[1] for key in record if key.startswith("share/")} == {"plain", "colour"}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("red", "edge"), "weighs 'dark', which no reward returns"),
        (
            ("red", "edge", "dark", "identity"),
            "has no weight for 'identity', which a reward returns; it knows dark, edge",
        ),
    ],
)
def test_components_of_the_trained_categories_still_have_to_fit(tmp_path, tiny_model, calibration, names, words):
    of_both_tasks(calibration)
    with pytest.raises(UserError, match=words):
        open_trainer(rl(tmp_path, tiny_model, calibration), [declared(*names)])


def test_rewards_that_return_others_are_refused_at_the_first_scores(tmp_path, tiny_model, calibration):
    trainer = open_trainer(rl(tmp_path, tiny_model, calibration), [luck])
    with pytest.raises(UserError, match="no weight for 'luck' in category '(plain|colour)'"):
        experience(trainer)


def test_a_component_in_a_category_without_its_weight_is_refused(tmp_path, tiny_model, calibration):
    def everywhere(samples):
        return [row | {"dark": 0.5} for row in colours(samples)]

    trainer = open_trainer(rl(tmp_path, tiny_model, calibration), [everywhere])
    with pytest.raises(UserError, match="no weight for 'dark' in category 'plain'.*it knows edge, red"):
        experience(trainer)


def test_a_category_that_was_not_calibrated_is_refused(tmp_path, tiny_model, calibration):
    config = rl(tmp_path, tiny_model, calibration, {"world": {"prompts": None}})
    with pytest.raises(UserError, match="no weights for category 'background' .*only for colour, plain; calibrate on"):
        open_trainer(config, [sometimes])


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-50],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"calibration": 1', '"calibration": 2'),
        lambda text: text.replace('"components"', '"compnents"'),
        lambda text: text.replace('"scale": ', '"scale": -'),
        lambda text: text.replace('"weight": ', '"weight": -'),
        lambda text: text.replace('"weight": ', '"weight": "x", "was": '),
        lambda text: '{"calibration": 1, "categories": {}}',
    ],
)
def test_a_damaged_calibration_is_refused(tmp_path, calibration, damage):
    calibration.write_text(damage(calibration.read_text()))
    with pytest.raises(UserError, match="make it again with `qirl calibrate`"):
        load_calibration(calibration)


def test_a_missing_calibration_and_weights_given_both_ways_are_refused(tmp_path, tiny_model):
    (tmp_path / "prompts.jsonl").write_text('{"text": "a 7"}\n')
    with pytest.raises(UserError, match="does not exist; make it with `qirl calibrate`"):
        open_trainer(rl(tmp_path, tiny_model, tmp_path / "none.json"), [colours])
    both = {"model": {"path": "base"}, "advantage": {"calibration": "c.json"}}
    for more, words in (
        (
            {"category_weights": {"plain": {"red": 1.0}}},
            "advantage.calibration and advantage.category_weights both say",
        ),
        ({"weights": {"red": 1.0}}, "advantage.calibration and advantage.weights both say"),
        ({"convention": "gdpo"}, "advantage.calibration is for advantage.convention=per_reward, not gdpo"),
    ):
        with pytest.raises(UserError, match=words):
            load("train", merge(both, {"advantage": more}))


def test_a_scale_multiplies_before_the_clip_and_1_changes_nothing():
    scores = torch.rand(24, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = (scores, torch.ones_like(scores, dtype=torch.bool), torch.arange(24) // 6, torch.ones_like(scores))
    plain, _ = group_advantage(*rows)
    assert torch.equal(group_advantage(*rows, scale=torch.ones(24))[0], plain)
    scale = torch.tensor([2.0] * 12 + [0.5] * 12)
    torch.testing.assert_close(group_advantage(*rows, scale=scale, clip=1.5)[0], (plain * scale).clamp(-1.5, 1.5))
    with pytest.raises(ValueError, match="one factor a sample"):
        group_advantage(*rows, scale=torch.ones(4))


def test_the_command_refuses_in_one_line_and_plans(tmp_path, tiny_model):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values_of(tmp_path, tiny_model)))
    command = ["calibrate", tmp_path / "c.yaml"]
    assert "belongs to method table" in refused(tmp_path, *command, "advantage.weights.red=1")
    assert "belongs to method calibrated" in refused(
        tmp_path, *command, "calibrate.method=table", "calibrate.shares.a=1"
    )
    assert "is negative" in refused(tmp_path, *command, "calibrate.shares.a=-1")
    assert "belongs to `qirl train`" in refused(tmp_path, *command, "advantage.calibration=x.json")
    code, out, err = qirl(*command, "--dry-run")
    assert code == 0 and "packs of probe" in out, err
    code, out, err = qirl(*command, "--dry-run", "calibrate.ledger=runs/x")
    assert code == 0 and "packs of" not in out, err


def test_the_table_on_the_terminal_has_every_component(calibration, capsys):
    from qirl.tables import print_calibration

    print_calibration(calibration)
    assert capsys.readouterr().out.count("0.333") >= 3
