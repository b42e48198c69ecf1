"""`qirl reward ...`: reward models."""

from __future__ import annotations

import typer

from qirl.cli import Config, DryRun, Out, Overrides, WithOptions, first, leave_group, say, told

app = typer.Typer(name="reward", help="Reward models: train a judge.", no_args_is_help=True)


class WithJudgeOptions(WithOptions):
    kind = "reward"


@app.command(cls=WithJudgeOptions)
def train(config: Config, overrides: Overrides = None, dry_run: DryRun = False, out: Out = None) -> None:
    """Teach a vision-language model (Qwen2.5-VL, Qwen3-VL) to score images from 1 to 5."""
    with told(resumes=True):
        from qirl.config import load, to_dict
        from qirl.paths import find_config

        given = [*(overrides or []), *([f"run.out={out}"] if out is not None else [])]
        loaded = load("reward", find_config(config), given)
        if dry_run:
            import yaml

            say(yaml.safe_dump(to_dict(loaded), sort_keys=False).rstrip())
            return
        from qirl.rewards.vlm.training import train_judge

        engine = train_judge(loaded)
        if first():
            from qirl.tables import print_validation

            print_validation(engine.folder.path / "validation.json")
        say(f"judge: {engine.folder.path / 'model'}")
        leave_group()
