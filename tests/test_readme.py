"""The README's own code and commands."""

import re
import shutil
from pathlib import Path

from qirl.models.qwen_image_21 import QwenImage21Config
from qirl.models.weights import load_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_ten_line_reward_runs(tmp_path):
    from qirl.api import pretrain

    tiny = {"run.out": str(tmp_path / "base"), "run.steps": 1, "pretrain.batch": 4, "model.architecture.layers": 1}
    base = pretrain("digits/pretrain", quiet=True, **tiny)
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len(code.strip().splitlines()) <= 10
    small = '"run.steps": 1, "policy.prompts": 4, "policy.group": 2, "run.samples_every": 0, "run.report": False, '
    code = code.replace('**{"model.path"', "**{" + small + '"model.path"').replace(
        "runs/quickstart/base", str(base.parent)
    )
    exec(code.replace("runs/warm", str(tmp_path / "warm")), {})
    assert isinstance(load_model(tmp_path / "warm/model").config, QwenImage21Config)
    shutil.rmtree(tmp_path)


def test_the_files_and_commands_it_names_exist():
    from typer.testing import CliRunner

    from qirl.cli import app
    from qirl.paths import find_config

    for link in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", README):
        assert (ROOT / link.split("#")[0]).exists(), link
    for command in set(re.findall(r"qirl (\w+)", README)):
        if command in ("quickstart", "pretrain", "train", "evaluate", "report", "doctor"):
            assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command
    for name in set(re.findall(r"digits/\w+", README)):
        assert find_config(name).exists()
