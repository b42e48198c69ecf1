import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from cli_runs import qirl
from PIL import Image
from tiny_runs import BASE, PRETRAIN, merge

from qirl import __version__, cli
from qirl.config import describe

COMMANDS = [
    "quickstart",
    "pretrain",
    "categorise",
    "curate",
    "calibrate",
    "train",
    "distill",
    "evaluate",
    "sample",
    "report",
    "export",
    "options",
    "doctor",
]
ASK = "servers token_variable concurrency timeout retries backoff kind"
NETWORK = "low high model device batch kind"
REWARDS = {
    f"rewards.NAME({kind})": keys
    for kind, keys in {
        "judge": f"{ASK} rubric omit mode chains model device temperature reasoning_tokens pixels",
        "python": "range kind target",
        "server": f"range {ASK} components batch cache",
        "clip_score": NETWORK,
        "pick_score": NETWORK,
        "hps_v2": f"{NETWORK} weights",
        "hps_v3": f"{NETWORK} weights instruction",
        "image_reward": f"{NETWORK} weights",
        "aesthetic": f"{NETWORK} head",
        "similarity": NETWORK,
        "outside": "low high kind measure",
        "artifacts": "low high kind",
        "diversity": "low high kind",
        "ocr": "kind form case threads",
        "face_identity": "low high kind backend detector embedder pack smallest weight surplus",
    }.items()
}
JUDGE = "path records max_missing omit loss language batch per_prompt micro pixels dtype vision rank alpha mode chains validate_every"
CATEGORISE = f"{ASK.removesuffix(' kind')} model categories other answer_tokens pixels"
SERVE = "host port token_variable batch wait queue timeout max_body max_images max_pixels device"
KEYS = {
    "run": "out seed steps checkpoint_every keep samples_every monitor_prompts device threads graphs report tracker",
    "world": "name task prompts text_dim resolution categories decoder max_bad negative",
    "model": "path pipeline revision variant dtype base checkpointing attention fp8",
    "model.architecture": "layers heads head_dim mlp_ratio rope_axes",
    "model.lora": "rank alpha targets",
    "flow": "steps guidance rescale sampler level stochastic storage rollout_tokens base_shift max_shift base_tokens "
    "max_tokens terminal",
    **REWARDS,
    "scoring": "workers timeout retries backoff",
    "composition": "layers failing cap gates gated",
    "advantage": "convention weights category_weights calibration floor clip max_failed shuffle",
    "parallel": "dp tp sequence pp cp",
    "optimizer": "kind impl lr warmup decay betas eps weight_decay clip ema max_skipped",
    "guidance": "scope form",
    "policy": "loss prompts group refill",
    "policy.timesteps": "count power skip_last",
    "policy.nft": "beta x0_weighted old_decay old_ramp",
    "policy ": "clip_low clip_high kl kl_form old epochs minibatches micro_tokens",
}
OTHERS = {
    "pretrain": "batch drop_condition logit_mean logit_std micro_tokens",
    "evaluation": "models guidance prompts group steps seed batch_tokens",
    "arena": "battles anchor rating resamples guidance",
}
PROBE = REWARDS | {name: KEYS[name] for name in ("scoring", "composition", "advantage")}
PROBE |= {"probe": "group prompts", "probe.timesteps": KEYS["policy.timesteps"]}
CURATE = {"curate": "tau saturated balance"}
CALIBRATE = {"calibrate": "method shares category_shares ledger only_kept"}
DISTILL = {
    "distill.teachers.NAME": "path task guidance rescale share",
    "distill": "prompts group nodes power weight anchor micro_tokens",
}


def names(keys: dict[str, str]) -> list[str]:
    return [f"{section.strip()}.{key}" for section, own in keys.items() for key in own.split()]


def test_the_commands_do_not_drift():
    assert [c.name or c.callback.__name__ for c in cli.app.registered_commands] == COMMANDS
    (group,) = cli.app.registered_groups
    own = [c.name or c.callback.__name__ for c in group.typer_instance.registered_commands]
    assert group.typer_instance.info.name == "reward" and own == ["train", "serve", "score", "check"]


def test_the_options_do_not_drift():
    assert [name for name, *_ in describe("train")] == names(KEYS)
    shared = {
        k: v
        for k, v in KEYS.items()
        if k.split(".")[0].strip() not in ("guidance", "policy", "rewards", "scoring", "composition", "advantage")
    }
    assert [n for n, *_ in describe("pretrain")] == names(shared | {"pretrain": OTHERS["pretrain"]})
    shared = {k: v for k, v in shared.items() if k != "parallel"}
    assert [n for n, *_ in describe("distill")] == names(shared | DISTILL)
    shared = {k: v for k, v in shared.items() if k != "optimizer"}
    assert [n for n, *_ in describe("evaluate")] == names(
        shared | {name: OTHERS[name] for name in ("evaluation", "arena")} | REWARDS | {"scoring": KEYS["scoring"]}
    )
    assert [n for n, *_ in describe("curate")] == names(shared | PROBE | CURATE)
    assert [n for n, *_ in describe("calibrate")] == names(shared | PROBE | CALIBRATE)
    judge = {"run": KEYS["run"], "judge": JUDGE, "optimizer": KEYS["optimizer"]}
    assert [n for n, *_ in describe("reward")] == names(judge)
    assert [n for n, *_ in describe("categorise")] == names({"categorise": CATEGORISE})
    assert [n for n, *_ in describe("serve")] == names(REWARDS | {"serve": SERVE})


def test_help_needs_no_torch_and_little_time():
    code = (
        "import sys; from qirl import cli\n"
        "try: cli.app(['--help'], prog_name='qirl')\n"
        "except SystemExit: pass\n"
        "print({'torch', 'numpy', 'pydantic', 'matplotlib', 'sklearn'} & set(sys.modules))"
    )
    seconds = []
    for _ in range(3):  # time of its own, the best of three: other processes may have the cores
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.stdout.endswith("set()\n"), done.stdout + done.stderr
    assert all(command in done.stdout for command in COMMANDS)
    assert min(seconds) < 0.7


def test_help_of_a_command_shows_every_option_of_its_config():
    for kind in ("pretrain", "train", "distill", "evaluate"):
        code, out, _ = qirl(kind, "--help")
        assert code == 0 and "--dry-run" in out
        assert [name for name, *_ in describe(kind) if f" {name} " not in out] == []
        assert "typing" not in out and max(map(len, out.splitlines())) <= 140


def test_options_lists_one_section():
    out = qirl("options", "train", "policy")[1]
    assert "policy.nft.beta" in out and "policy.group" in out and "optimizer.lr" not in out
    assert "did you mean 'policy'?" in qirl("options", "train", "polcy")[2]
    assert "did you mean 'train'?" in qirl("options", "trian")[2]


def test_version_and_usage_errors():
    assert qirl("--version") == (0, f"qirl {__version__}\n", "")
    assert qirl("trian")[0] == 2
    assert qirl("sample", "a red 7")[0] == 2


def test_an_unexpected_error_keeps_its_traceback():
    """A bug is not dressed up as something that the user could mend."""
    with pytest.raises(ZeroDivisionError), cli.told():
        print(1 / 0)


def test_an_interrupt_says_how_to_go_on(tmp_path):
    values = merge(PRETRAIN, {"model": {"architecture": {"rope_axes": [4, 6, 6]}}, "run": {"steps": 100_000}})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "qirl", "pretrain", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores interrupts
    )  # fmt: skip
    log = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "qirl: interrupted; the same command continues from the last checkpoint"
    assert "Traceback" not in err


@contextlib.contextmanager
def rank(number: int):
    os.environ["RANK"] = str(number)
    try:
        yield
    finally:
        del os.environ["RANK"]


def test_only_the_first_rank_speaks():
    with rank(1):
        assert qirl("options", "train", "x") == (2, "", "")
    with rank(0):
        assert qirl("options", "train", "x")[2].count("\n") == 1


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base of two steps, made by the command line."""
    folder = tmp_path_factory.mktemp("base")
    values = merge(PRETRAIN, {"model": {"architecture": {"rope_axes": [4, 6, 6]}}, "run": {"steps": 2}})
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    code, out, err = qirl("pretrain", folder / "c.yaml", "--out", folder / "run", "run.keep=1")
    assert code == 0, err
    assert out == f"model: {folder}/run/model\nnext:  qirl report {folder}/run\n"
    return folder / "run"


def test_overrides_reach_the_run(base):
    config = yaml.safe_load((base / "config.yaml").read_text())
    assert (config["run"]["keep"], config["run"]["out"], config["run"]["steps"]) == (1, str(base), 2)


def test_sample_writes_one_image_per_prompt(base, tmp_path):
    code, out, err = qirl("sample", "--model", base, "--out", tmp_path / "new/a.png", "--steps", 2, "a red 7", "35")
    assert code == 0, err
    image = np.asarray(Image.open(tmp_path / "new/a.png"))
    assert image.shape[1] == 2 * image.shape[0] and out == f"2 images: {tmp_path}/new/a.png\n"


def test_sample_refuses_another_kind_of_file(base, tmp_path):
    code, _, err = qirl("sample", "--model", base, "--out", tmp_path / "a.jpg", "a red 7")
    assert code == 2 and "ends in .png" in err


def test_export_gives_a_folder_that_diffusers_reads(base, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    code, _, err = qirl("export", base, "--out", tmp_path / "exported")
    assert code == 0, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exported"]
    model = diffusers.QwenImage21Transformer2DModel.from_pretrained(tmp_path / "exported")
    assert model.config.num_layers == 2
    assert qirl("sample", "--model", tmp_path / "exported", "--out", tmp_path / "a.png", "--steps", 2, "7")[0] == 0


def test_report_of_a_run_and_of_the_folder_above(base, tmp_path):
    assert qirl("report", base, "--out", tmp_path / "a.html")[0] == 0
    assert qirl("report", base.parent, "--out", tmp_path / "b.html")[0] == 0
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()
    assert "<html" in (tmp_path / "a.html").read_text()


def test_report_shows_the_evaluation_where_there_is_no_summary(base, tmp_path):
    row = {"judge_accuracy": 0.8125, "judge_accuracy_se": 0.01, "rewards": {"ink": 0.5}, "diversity": 0.2}
    results = {"guidance": {"1": row | {"judge_accuracy": 0.25}, "4": row}}
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_bytes((base / "metrics.jsonl").read_bytes())
    (run / "evaluation.json").write_text(json.dumps(results))
    assert qirl("report", run)[0] == 0
    assert "0.812" in (run / "report.html").read_text() or "81" in (run / "report.html").read_text()


def test_the_names_of_shipped_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = qirl("pretrain", "digits/pretrain", "--dry-run")
    assert code == 0, err
    assert "parameters, total" in out and os.listdir(tmp_path) == []


def test_two_ranks_train_and_only_one_speaks(tmp_path):
    values = merge(PRETRAIN, {"model": {"architecture": {"rope_axes": [4, 6, 6]}}, "run": {"steps": 2}})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "qirl", "pretrain", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model: ") == 1 and done.stderr.count("pretrain 2/2") == 1
    assert "destroy_process_group" not in done.stderr


def test_a_dry_run_of_rl_counts_for_the_world_of_torchrun(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(merge(BASE, {"model": {"path": str(tiny_model)}})))
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = qirl("train", tmp_path / "c.yaml", "--dry-run", "policy.kl=0.1", "--out", tmp_path / "out")
    assert code == 0, err
    assert yaml.safe_load(out.split("\nranks")[0])["policy"]["kl"] == 0.1
    for words in (
        "ranks",
        "parameters, trainable",
        "packs of update",
        "FLOPs of rollout",
        "copy: reference",
        "gathered",
    ):
        assert words in out
    assert os.listdir(tmp_path) == ["c.yaml"]
