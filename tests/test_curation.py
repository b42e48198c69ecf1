"""Which prompts are kept, and that a ledger survives everything that may happen to it."""

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cli_runs import qirl, refused
from tiny_runs import SDE, TEXT_DIM, colours, luck, merge, train_config

from qirl.config import load
from qirl.config_sections import Advantage, Curate
from qirl.curation import probe as probing
from qirl.curation.curate import curate, decide
from qirl.curation.ledger import Ledger
from qirl.data.prompts import load_prompts
from qirl.errors import UserError
from qirl.flow.rollout import rollout
from qirl.kernels.philox import stream
from qirl.kernels.reward_range import expected_range as d2
from qirl.packing import Target
from qirl.plan import plan
from qirl.policy.trainer import open_trainer, train_step
from qirl.tables import print_curation
from qirl.world import make_world

NAN = math.nan
PROMPTS = [
    {"id": 7, "text": "a 7", "category": "plain"},
    {"id": 3, "text": "a red 3", "category": "colour"},
    {"id": 9, "text": "a blue 9", "category": "colour"},
    {"id": 1, "text": "35 in green", "category": "two_digits"},
    {"id": 2, "text": "a cyan 2", "category": "colour"},
]


def curate_config(folder, model, *parts):
    path = Path(folder) / "prompts.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    values = {
        "run": {"out": str(Path(folder) / "run"), "seed": 3, "threads": 1}, "model": {"path": str(model)},
        "world": {"text_dim": TEXT_DIM, "prompts": str(path)}, "flow": {"steps": 3, "rollout_tokens": 128},
        "probe": {"group": 4}, "curate": {"tau": 1e-4},
    }  # fmt: skip
    return load("curate", merge(values, *parts))


def rows_of(*prompts, category="general"):
    """Ledger rows of composite values per prompt, from a single component."""
    return [
        {"id": i, "prompt": f"p{i}", "category": category, "task": "t2i", "scores": [{"a": v} for v in values]}
        for i, values in enumerate(prompts)
    ]


def decisions(rows, options=None, advantage=None, noise=None):
    decided = decide(rows, Curate(**(options or {})), Advantage(**(advantage or {})), noise or {})
    return [(row["decision"], row["reason"]) for row in decided]


KEEP = ("keep", None)


def test_decisions_by_hand():
    """d2(4) = 2.0588: the threshold of tau = 0.1 is 0.20588."""
    rows = rows_of([0.2, 0.3, 0.4, 0.4058], [0.2, 0.3, 0.4, 0.406], [0.9, 0.91, 0.99, 0.69], [NAN, 0.1, NAN, NAN])
    decided = decide(rows, Curate(tau=0.1, saturated=0.85), Advantage(), {})
    assert [r["threshold"] for r in decided[:3]] == pytest.approx([0.205875] * 3, abs=1e-5)
    assert [r["range"] for r in decided] == pytest.approx([0.2058, 0.206, 0.3, None])
    assert [(r["decision"], r["reason"]) for r in decided] == [
        ("drop", "range"), KEEP, ("drop", "saturated"), ("drop", "failed"),
    ]  # fmt: skip
    assert decided[2]["mean"] == pytest.approx(0.8725)


def test_failed_images_shrink_the_group_that_the_threshold_is_for():
    assert d2(2) == pytest.approx(2 / math.sqrt(math.pi))
    row = decide(rows_of([0.3, 0.42, NAN, NAN]), Curate(tau=0.1), Advantage(), {})[0]
    assert row["threshold"] == pytest.approx(0.1 * d2(2)) and row["decision"] == "keep"
    assert row["composite"][:2] == [0.3, 0.42] and math.isnan(row["composite"][2])


def test_the_composite_weighs_what_applies_and_is_never_z_scored():
    row = rows_of([0.0, 0.0])[0]
    row["scores"] = [{"a": 0.2, "b": 1.0}, {"a": 0.2}, {"a": 0.6, "b": NAN}]
    row["category"] = "x"
    decided = decide([row], Curate(), Advantage(weights={"a": 3.0}, category_weights={"x": {"b": 1.0}}), {})[0]
    assert decided["composite"][:2] == pytest.approx([0.4, 0.2]) and math.isnan(decided["composite"][2])
    other = decide([row], Curate(), Advantage(weights={"a": 3.0}, category_weights={"x": {"a": 0.0}}), {})[0]
    assert other["composite"][:2] == pytest.approx([1.0, 0.0])


def test_the_same_spread_is_judged_alike_at_every_group_size():
    """tau x d2(G): of prompts with normal scores of std 0.05, tau = 0.05 keeps about half, whatever G is."""
    draw = np.random.default_rng(0)
    shares = {}
    for group in (4, 8, 24):
        values = np.clip(draw.normal(0.5, 0.05, (1500, group)), 0, 1)
        kept = [d == "keep" for d, _ in decisions(rows_of(*values.tolist()), {"tau": 0.05})]
        shares[group] = sum(kept) / len(kept)
    assert all(0.42 < share < 0.55 for share in shares.values()), (
        shares
    )  # the range's median is a little below its mean
    wide = np.clip(draw.normal(0.5, 0.1, (200, 24)), 0, 1)
    assert all(d == "keep" for d, _ in decisions(rows_of(*wide.tolist()), {"tau": 0.05}))
    # with one threshold for all G, the small groups would lose nearly everything that the large ones keep
    ranges = {g: statistics.median(np.ptp(draw.normal(0.5, 0.05, (500, g)), axis=1)) for g in (4, 24)}
    assert ranges[4] < 0.6 * ranges[24]


def test_balance_keeps_the_widest_ranges_of_large_categories():
    small = rows_of([0.1, 0.5], [0.1, 0.6], category="small")
    large = rows_of(*[[0.1, 0.2 + 0.1 * i] for i in range(6)], category="large")
    none = rows_of([0.5, 0.5], category="none")  # keeps nothing, so it sets no limit
    rows = [row | {"id": i} for i, row in enumerate(small + large + none)]
    found = decisions(rows, {"tau": 0.01, "balance": 1.5})
    assert found == [KEEP] * 2 + [("drop", "balance")] * 3 + [KEEP] * 3 + [("drop", "range")]
    assert decisions(rows, {"tau": 0.01}).count(KEEP) == 8


def test_a_tau_below_twice_the_read_noise_is_refused_with_the_needed_one():
    rows = rows_of([0.1, 0.5])
    assert decisions(rows, {"tau": 0.03}, noise={"a": 0.015}) == [KEEP]
    with pytest.raises(
        UserError, match="curate.tau=0.03 is below twice the read noise 0.0160 .* set curate.tau=0.032 or"
    ):
        decisions(rows, {"tau": 0.03}, noise={"a": 0.016})
    rows[0]["scores"] = [{"a": 0.1, "b": 0.2}, {"a": 0.5, "b": 0.9}]  # independent readings: 0.02 / sqrt(2) together
    assert decisions(rows, {"tau": 0.0283}, noise={"a": 0.02, "b": 0.02}) == [KEEP]


def noisy(samples):
    return colours(samples)


noisy.components, noisy.read_noise = ("red", "edge"), {"red": 0.1, "edge": 0.1}


def test_read_noise_of_declared_rewards_refuses_before_the_first_image(tmp_path, tiny_model):
    with pytest.raises(UserError, match="set curate.tau=0.1415 or more"):
        curate(curate_config(tmp_path, tiny_model, {"curate": {"tau": 0.14}}), [noisy], quiet=True)
    assert not (tmp_path / "run").exists()


def test_read_noise_that_a_reward_learns_while_it_scores_counts_and_is_kept(tmp_path, tiny_model):
    class Learning:
        components = ("red",)

        def __init__(self):
            self.read_noise = {}

        def __call__(self, samples):
            self.read_noise = {"red": 0.01}
            return [{"red": float(s.image[..., 0].mean() / 255)} for s in samples]

    strict = curate_config(tmp_path, tiny_model, {"curate": {"tau": 0.005}})
    for _ in range(2):  # the second time no image is drawn, and the ledger knows
        with pytest.raises(UserError, match="0.0100"):
            curate(strict, [Learning()], quiet=True)
    path = curate(curate_config(tmp_path, tiny_model, LENIENT, {"curate": {"tau": 0.021}}), [Learning()], quiet=True)
    header = json.loads(path.with_name("ledger.jsonl").read_text().splitlines()[0])
    assert header["read_noise"] == {} and header["measured_noise"] == {"red": 0.01}


def test_weights_of_no_component_are_refused(tmp_path, tiny_model):
    config = curate_config(tmp_path, tiny_model, {"advantage": {"weights": {"rde": 1.0}}})
    with pytest.raises(UserError, match="did you mean 'red'"):
        curate(config, [noisy], quiet=True)
    with pytest.raises(UserError, match="did you mean 'red'"):
        curate(config, [colours], quiet=True)  # does not declare: after the probe, which is kept
    assert Ledger(tmp_path / "run/ledger.jsonl").read()[0]["prompts"] == 5


def patchy(samples):
    """One image of every four fails; the prompt with id 9 fails but for one image."""
    return [
        row | ({"red": NAN} if s.id % 4 == 0 or (s.prompt_id == 9 and s.id % 4 < 3) else {})
        for s, row in zip(samples, colours(samples), strict=True)
    ]


LENIENT = {"advantage": {"max_failed": 0.9}}


def test_curated_prompts_are_what_training_takes(tmp_path, tiny_model):
    path = curate(curate_config(tmp_path, tiny_model, LENIENT), [patchy], quiet=True)
    assert path == tmp_path / "run/curated.jsonl"
    found = [{"id": p.id, "text": p.text, "category": p.category} for p in load_prompts(path)]
    assert found == [p for p in PROMPTS if p["id"] != 9]
    header, rows = Ledger(tmp_path / "run/ledger.jsonl").read()
    assert [(r["decision"], r["reason"]) for r in rows] == [KEEP, KEEP, ("drop", "failed"), KEEP, KEEP]
    assert [r["id"] for r in rows] == [p["id"] for p in PROMPTS] and header["curate"]["tau"] == 1e-4
    assert math.isnan(rows[0]["scores"][0]["red"]) and 0 < rows[0]["scores"][0]["edge"] < 1
    config = train_config(tmp_path / "rl", tiny_model, {"world": {"prompts": str(path)}})
    assert train_step(open_trainer(config, [colours]), 0)["step"] == 1


def test_edit_prompts_keep_their_sources(tmp_path, tiny_model):
    options = {"world": {"task": "mixed", "prompts": None}, "probe": {"prompts": 16, "group": 2}}
    config = curate_config(tmp_path, tiny_model, options)
    path = curate(config, [colours], quiet=True)
    known = {p.id: p for p in make_world(config.world).data.prompts("train")}
    found = make_world(config.world).data.prompts("train", str(path))
    assert {p.task for p in found} == {"t2i", "edit"}
    for prompt in found:
        assert prompt == known[prompt.id] and len(prompt.sources) == len(known[prompt.id].sources)
        assert all(np.array_equal(a, b) for a, b in zip(prompt.sources, known[prompt.id].sources, strict=True))
    rows = Ledger(tmp_path / "run/ledger.jsonl").read()[1]
    assert len(rows) == 16 and {r["task"] for r in rows} == {"t2i", "edit"}


@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_the_probe_samples_as_training_does_but_with_noise_of_its_own(tmp_path, tiny_model, opened, sampler):
    """The same trajectory, apart from the iteration in the noise."""
    flow = {"flow": {"steps": 4, "guidance": 2.0, "rollout_tokens": 1024, "sampler": sampler}}
    parts = (merge(flow, {"run": {"steps": 2**20 - 2}}), SDE if sampler == "sde" else {})
    trainer = opened(*parts)
    config = curate_config(tmp_path, tiny_model, flow, {"probe": {"timesteps": {"count": 2}, "group": 3}})
    probe = probing.open_probe(config, [colours])
    probe.load()
    from qirl.policy.trainer import sample

    chosen = [(p, 0) for p in probe.prompts[:4]]
    exp, _ = sample(trainer, chosen, probing.PROBE_ITERATION)
    images = trainer.family.decode(exp.x0, [])
    assert np.array_equal(images, probe.family.decode(probing.draw(probe, [p for p, _ in chosen]), []))
    assert trainer.config.run.steps - 1 < probing.PROBE_ITERATION
    other, _ = sample(trainer, chosen, 0)
    assert not np.array_equal(images, trainer.family.decode(other.x0, []))


def test_an_image_does_not_depend_on_what_it_is_drawn_with(tmp_path, tiny_model):
    probe = probing.open_probe(curate_config(tmp_path, tiny_model, {"model": {"dtype": "float64"}}), [colours])
    probe.load()
    together = probe.family.decode(probing.draw(probe, probe.prompts), [])
    alone = np.concatenate([probe.family.decode(probing.draw(probe, [p]), []) for p in probe.prompts])
    assert np.array_equal(together, alone)
    p, family = probe.prompts[0], probe.family  # written out: no batches, the first image alone
    one = stream(3, [p.id], [0], probing.PROBE_ITERATION)
    out = rollout(probe.model, [family.condition(p)], [Target(0, *family.size(p))], one, probe.config.flow)
    assert np.array_equal(family.decode(out.latents(), [])[0], together[0])


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


def test_a_ledger_cut_anywhere_ends_as_the_same_bytes(tmp_path, tiny_model):
    config = curate_config(tmp_path, tiny_model, LENIENT)
    curate(config, [patchy], quiet=True)
    whole = files(tmp_path / "run")
    # what a probe leaves while it runs: a shorter header, lines without decisions
    header, rows = Ledger(tmp_path / "run/ledger.jsonl").read()
    raw = [{k: v for k, v in header.items() if k not in ("curate", "weights", "category_weights")}]
    raw += [{k: row[k] for k in ("id", "prompt", "category", "task", "scores")} for row in rows]
    Ledger(tmp_path / "run/ledger.jsonl").replace(raw[0], raw[1:])
    text = (tmp_path / "run/ledger.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(text) if byte == 10]
    for length in (0, 30, ends[0], ends[0] + 50, ends[1], ends[2] - 1, ends[3] + 9, ends[-1]):
        (tmp_path / "run/ledger.jsonl").write_bytes(text[:length])
        (tmp_path / "run/curated.jsonl").unlink(missing_ok=True)
        curate(config, [patchy], quiet=True)
        assert files(tmp_path / "run") == whole, length


PROGRAM = """
import sys, time
sys.path.insert(0, {tests!r})
from test_curation import curate_config, colours
from qirl.curation.curate import curate

def slow(samples):
    time.sleep({pause})
    return colours(samples)

if __name__ == "__main__":
    curate(curate_config({folder!r}, {model!r}, {{"run": {{"out": {out!r}}}}}), [slow], quiet=True)
"""


def program(folder, model, out, pause=0.0):
    tests = str(Path(__file__).parent)
    text = PROGRAM.format(tests=tests, folder=str(folder), model=str(model), out=str(out), pause=pause)
    (folder / f"{Path(out).name}.py").write_text(text)
    return [str(folder / f"{Path(out).name}.py")]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_probe_goes_on_alone_or_on_two_ranks_to_the_same_ledger(tmp_path, tiny_model, number):
    curate_config(tmp_path, tiny_model)
    script = program(tmp_path, tiny_model, tmp_path / "killed", pause=0.4)
    process = subprocess.Popen([sys.executable, *script])
    ledger, deadline = tmp_path / "killed/ledger.jsonl", time.monotonic() + 60
    while not (ledger.exists() and ledger.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == (-9 if number == signal.SIGKILL else 143)
    assert 3 <= ledger.read_bytes().count(b"\n") < 6

    slow = lambda samples: colours(samples)  # noqa: E731
    slow.__name__ = "slow"
    outs = {
        name: curate_config(tmp_path, tiny_model, {"run": {"out": str(tmp_path / name)}}) for name in ("killed", "one")
    }
    if number == signal.SIGKILL:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        subprocess.run([*torchrun, *script], check=True, timeout=120)
    else:
        curate(outs["killed"], [slow], quiet=True)
    curate(outs["one"], [slow], quiet=True)
    killed, one = files(tmp_path / "killed"), files(tmp_path / "one")
    one["config.yaml"] = one["config.yaml"].replace(b"/one", b"/killed")
    assert killed == one


def test_other_decisions_need_no_new_images(tmp_path, tiny_model):
    config = curate_config(tmp_path, tiny_model)
    curate(config, [colours], quiet=True)
    ranges = {r["id"]: r["range"] for r in Ledger(tmp_path / "run/ledger.jsonl").read()[1]}
    tau = (sorted(ranges.values())[-2] + max(ranges.values())) / 2 / d2(4)

    def never(samples):
        raise AssertionError("an image was drawn again")

    never.__name__ = "colours"
    path = curate(curate_config(tmp_path, tiny_model, {"curate": {"tau": tau}}), [never], quiet=True)
    assert [p.id for p in load_prompts(path)] == [max(ranges, key=ranges.get)]


def test_nothing_kept_names_the_numbers_and_the_fix(tmp_path, tiny_model):
    curate(curate_config(tmp_path, tiny_model), [colours], quiet=True)  # its prompt file must not outlive the decisions
    with pytest.raises(UserError) as error:
        curate(curate_config(tmp_path, tiny_model, {"curate": {"tau": 0.5}}), [colours], quiet=True)
    _, rows = Ledger(tmp_path / "run/ledger.jsonl").read()
    largest = max(r["range"] for r in rows)
    line = str(error.value)
    assert f"no prompt of 5 is kept (range 5): the largest range is {largest:.4f}, the threshold 1.0294" in line
    assert "lower curate.tau" in line and not (tmp_path / "run/curated.jsonl").exists()
    with pytest.raises(UserError, match="saturated 5.*raise curate.saturated=0.01"):
        curate(curate_config(tmp_path, tiny_model, {"curate": {"saturated": 0.01}}), [colours], quiet=True)


def test_a_probe_that_fails_too_often_writes_none_of_it(tmp_path, tiny_model):
    with pytest.raises(UserError, match="25% of 8 images could not be scored.*max_failed=20%"):
        curate(curate_config(tmp_path, tiny_model), [patchy], quiet=True)
    assert len((tmp_path / "run/ledger.jsonl").read_text().splitlines()) == 1

    patchy_then_well = lambda samples: colours(samples)  # noqa: E731
    patchy_then_well.__name__ = "patchy"
    curate(curate_config(tmp_path, tiny_model), [patchy_then_well], quiet=True)


def test_a_ledger_of_another_policy_names_both(tmp_path, tiny_model):
    curate(curate_config(tmp_path, tiny_model), [colours], quiet=True)
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    from safetensors.torch import load_file, save_file

    weights = other / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["proj_out.weight"][0, 0] += 1
    save_file(state, weights, metadata={"format": "pt"})
    hashes = [probing.policy_hash(Path(folder))[:12] for folder in (tiny_model, other)]
    with pytest.raises(UserError, match="drawn by policy {}, model.path is policy {}; name the model".format(*hashes)):
        curate(curate_config(tmp_path, other), [colours], quiet=True)


def test_the_policy_hash_is_of_the_tensors_not_of_their_files(tmp_path, tiny_model):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, tmp_path / "split")
    single = tmp_path / "split/diffusion_pytorch_model.safetensors"
    state = load_file(single)
    names = sorted(state)
    for part, own in (("b", names[::2]), ("a", names[1::2])):
        save_file({n: state[n] for n in own}, tmp_path / f"split/{part}.safetensors", metadata={"format": "pt"})
    single.unlink()
    index = {"weight_map": {n: "ba"[i % 2] + ".safetensors" for i, n in enumerate(names)}}
    (tmp_path / "split/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert probing.policy_hash(tmp_path / "split") == probing.policy_hash(Path(tiny_model))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flow": {"guidance": 2.0}}, "flow.guidance (1.0 there, 2.0 now)"),
        ({"flow": {"steps": 4}}, "flow.steps (3 there, 4 now)"),
        ({"flow": {"sampler": "sde"}, "probe": {"timesteps": {"count": 1}}}, "flow.sampler (ode there, sde now)"),
        ({"probe": {"group": 5}}, "group (4 there, 5 now)"),
        ({"run": {"seed": 4}}, "seed (3 there, 4 now)"),
        ({"model": {"dtype": "float64"}}, "dtype (float32 there, float64 now)"),
        ({"probe": {"prompts": 3}}, "prompts (5 there, 3 now)"),
    ],
)
def test_a_ledger_of_other_options_is_refused(tmp_path, tiny_model, change, words):
    curate(curate_config(tmp_path, tiny_model), [colours], quiet=True)
    before = files(tmp_path / "run")
    with pytest.raises(UserError) as error:
        curate(curate_config(tmp_path, tiny_model, change), [colours], quiet=True)
    assert words in str(error.value) and files(tmp_path / "run") == before


def test_a_ledger_of_other_prompts_or_rewards_is_refused(tmp_path, tiny_model):
    curate(curate_config(tmp_path, tiny_model), [colours], quiet=True)
    with pytest.raises(UserError, match=r"rewards \(\['colours'\] there, \['luck'\] now\)"):
        curate(curate_config(tmp_path, tiny_model), [luck], quiet=True)
    changed = [p | ({"text": "a 8"} if p["id"] == 7 else {}) for p in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in changed))
    with pytest.raises(UserError, match="line 2 is prompt 7 'a 7', the candidate there is now 7 'a 8'"):
        curate(curate_config(tmp_path, tiny_model), [colours], quiet=True)


@pytest.mark.parametrize(
    ("line", "text", "words"),
    [
        (0, '{"step": 1}', "does not begin with the header of a ledger"),
        (2, '{"id": 3, "scor', "line 3 is not a JSON object"),
        (2, '{"id": 3}', "line 3 is no prompt with scores of 4 images"),
    ],
)
def test_a_damaged_ledger_is_refused(tmp_path, tiny_model, line, text, words):
    curate(curate_config(tmp_path, tiny_model), [colours], quiet=True)
    ledger = tmp_path / "run/ledger.jsonl"
    lines = ledger.read_text().splitlines()
    lines[line] = text
    ledger.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=words):
        curate(curate_config(tmp_path, tiny_model), [colours], quiet=True)


def test_the_run_folder_of_a_training_is_refused(tmp_path, tiny_model):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="no run folder"):
        curate(curate_config(tmp_path, tiny_model), [colours], quiet=True)


def test_probe_prompts_take_the_categories_in_turn(tmp_path, tiny_model):
    config = curate_config(tmp_path, tiny_model, {"world": {"prompts": None}, "probe": {"prompts": 60}})
    chosen = probing.candidates(config, make_world(config.world))
    count = {c: sum(p.category == c for p in chosen) for c in {p.category for p in chosen}}
    assert len({p.id for p in chosen}) == 60 and count.pop("plain") == 8 and set(count.values()) <= {17, 18}


@pytest.fixture
def command(tmp_path, tiny_model):
    config = curate_config(tmp_path, tiny_model)
    values = {
        k: config.model_dump(mode="json", exclude_unset=True)[k] for k in ("run", "model", "world", "flow", "probe")
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    return ["curate", tmp_path / "c.yaml"]


def test_the_table_counts_by_category_and_reason(tmp_path, tiny_model, capsys):
    curate(curate_config(tmp_path, tiny_model, LENIENT), [patchy], quiet=True)
    print_curation(tmp_path / "run/ledger.jsonl")
    lines = [[cell.strip() for cell in line.split("│")[1:6]] for line in capsys.readouterr().out.splitlines()]
    assert ["colour", "2", "1", "0", "0"] in lines and ["all", "4", "1", "0", "0"] in lines


def test_the_plan_counts_the_images_that_are_drawn(tmp_path, tiny_model):
    from torch.utils.flop_counter import FlopCounterMode

    config = curate_config(tmp_path, tiny_model, {"flow": {"guidance": 2.0}})
    found = plan(config)
    probe = probing.open_probe(config, [colours])
    probe.load()
    runs = probing.batches(config, probe.family, probe.prompts)
    with FlopCounterMode(display=False) as counter:
        for run in runs:
            probing.draw(probe, [probe.prompts[i] for i in run])
    counts = counter.get_flop_counts()["Global"]
    matmul = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert found["flops"]["probe"]["matmul"] == pytest.approx(
        matmul, rel=0.02
    )  # the plan leaves out the time embedding
    assert (found["tokens"]["probe"]["packs"], len(runs)) == (5, 5) and found["parameters"]["trainable"] == 0


def test_a_dry_run_writes_nothing(command, tmp_path):
    code, out, err = qirl(*command, "--dry-run")
    assert code == 0, err
    assert "packs of probe" in out and "FLOPs of probe" in out and "per step" not in out
    assert sorted(os.listdir(tmp_path)) == ["c.yaml", "prompts.jsonl"]


def test_bad_options_are_one_line(command, tmp_path):
    assert "curate.balance=0.5 is below 1" in refused(tmp_path, *command, "curate.balance=0.5")
    assert "name the base" in refused(tmp_path, *command, "model.path=null")
    assert "use 2 or fewer" in refused(tmp_path, *command, "flow.sampler=sde", "probe.timesteps.count=3")
    assert "smaller than one sample of 16" in refused(tmp_path, *command, "flow.rollout_tokens=10")
    assert "holds no model" in refused(tmp_path, *command, "model.path=nowhere")
