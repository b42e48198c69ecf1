"""`qirl reward ...`: reward models."""

from __future__ import annotations

from typing import Annotated

import typer

from qirl.cli_common import Config, DryRun, Out, Overrides, WithOptions, first, load_config, say, told

app = typer.Typer(
    name="reward", help="Reward models: train a judge, serve rewards, score and check.", no_args_is_help=True
)

Input = Annotated[
    str,
    typer.Argument(metavar="INPUT", help="folder of images (NAME.txt beside one is its prompt), or .jsonl of records"),
]


class WithJudgeOptions(WithOptions):
    kind = "reward"


class WithServeOptions(WithOptions):
    kind = "serve"


@app.command(cls=WithJudgeOptions)
def train(config: Config, overrides: Overrides = None, dry_run: DryRun = False, out: Out = None) -> None:
    """Teach a vision-language model (Qwen2.5-VL, Qwen3-VL) to score images from 1 to 5."""
    with told(resumes=True):
        loaded = load_config("reward", config, overrides, out)
        if dry_run:
            _show(loaded)
            return
        from qirl.rewards.vlm.training import train_judge

        engine = train_judge(loaded)
        if first():
            from qirl.tables import print_validation

            print_validation(engine.folder.path / "validation.json")
        say(f"judge: {engine.folder.path / 'model'}")


@app.command(cls=WithServeOptions)
def serve(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Serve the rewards of a config over HTTP, for trainers on other machines."""
    with told():
        loaded = load_config("serve", config, overrides)
        if dry_run:
            _show(loaded)
            return
        from qirl.rewards.registry import build
        from qirl.rewards.server.app import serve as run

        rewards = build(loaded.rewards, loaded.serve.device)
        say(f"serving {', '.join(loaded.rewards)} on http://{loaded.serve.host}:{loaded.serve.port}")
        run(rewards, loaded.serve)


@app.command(cls=WithServeOptions)
def score(
    config: Config,
    input: Input,
    overrides: Overrides = None,
    out: Annotated[str | None, typer.Option(help="JSON lines of scores; default: beside the input")] = None,
) -> None:
    """Score images with the rewards of a config."""
    with told():
        from qirl.rewards.shell import score as run
        from qirl.tables import print_scores

        path, rows = run(load_config("serve", config, overrides), input, out)
        print_scores(rows)
        say(f"scores: {path}")


@app.command(cls=WithServeOptions)
def check(
    config: Config,
    input: Input,
    overrides: Overrides = None,
    limit: Annotated[
        float, typer.Option(min=0, max=1, help="exit code 1 where an attack scores above this share of the real images")
    ] = 0.5,
) -> None:
    """Show the rewards of a config what must not score well: blank, noise, tiles, patterns, written demands, copies."""
    with told():
        from qirl.rewards.shell import check as run
        from qirl.tables import print_attacks

        found = run(load_config("serve", config, overrides), input)
        if not print_attacks(found, limit):
            raise SystemExit(1)


def _show(config) -> None:
    import yaml

    from qirl.config import to_dict

    say(yaml.safe_dump(to_dict(config), sort_keys=False).rstrip())
