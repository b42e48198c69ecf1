"""The command line: `qirl quickstart | pretrain | reward | curate | calibrate | train | distill | evaluate | sample | ...`.

What a user can mend is one line on standard error and exit code 2; other exceptions keep their traceback. Works the
same under torchrun, where only rank 0 speaks. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qirl import __version__, cli_reward
from qirl.cli_common import (
    Config,
    Device,
    DryRun,
    Out,
    Overrides,
    WithOptions,
    ended,
    first,
    load_config,
    say,
    told,
    world,
)
from qirl.errors import UserError

app = typer.Typer(
    name="qirl",
    help="Reinforcement learning for image diffusion transformers. Start with `qirl quickstart`.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(cli_reward.app)


def main() -> None:
    """The entry point of `qirl` and `python -m qirl`."""
    with ended():
        app(prog_name="qirl")


def _version(asked: bool) -> None:
    if asked:
        print(f"qirl {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command()
def quickstart(
    out: Annotated[
        str, typer.Option(help="folder of the whole job; the same command continues it")
    ] = "runs/quickstart",
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="seed of every random draw")] = 0,
    device: Device = "auto",
) -> None:
    """The whole job on two CPU cores: real handwriting, a small base model, RL, evaluation, report."""
    with told(resumes=True):
        from qirl.quickstart import quickstart as run

        run(out, seed, device=device)


@app.command(cls=WithOptions)
def pretrain(config: Config, overrides: Overrides = None, dry_run: DryRun = False, out: Out = None) -> None:
    """Train a base model by flow matching."""
    _run("pretrain", config, overrides, dry_run, out)


@app.command(cls=WithOptions)
def curate(config: Config, overrides: Overrides = None, dry_run: DryRun = False, out: Out = None) -> None:
    """Keep the prompts whose images the rewards tell apart."""
    _run("curate", config, overrides, dry_run, out)


@app.command(cls=WithOptions)
def calibrate(config: Config, overrides: Overrides = None, dry_run: DryRun = False, out: Out = None) -> None:
    """Find reward weights per prompt category that give every reward its wanted share."""
    _run("calibrate", config, overrides, dry_run, out)


@app.command(cls=WithOptions)
def train(config: Config, overrides: Overrides = None, dry_run: DryRun = False, out: Out = None) -> None:
    """Improve a model by reinforcement learning against rewards."""
    _run("train", config, overrides, dry_run, out)


@app.command(cls=WithOptions)
def distill(config: Config, overrides: Overrides = None, dry_run: DryRun = False, out: Out = None) -> None:
    """Teach one student, which needs no guidance, from task teachers."""
    _run("distill", config, overrides, dry_run, out)


@app.command(cls=WithOptions)
def evaluate(config: Config, overrides: Overrides = None, dry_run: DryRun = False, out: Out = None) -> None:
    """Score a model on held-out prompts and fresh noise, at several guidance scales."""
    _run("evaluate", config, overrides, dry_run, out)


def _run(kind: str, name: str, overrides: list[str] | None, dry_run: bool, out: str | None) -> None:
    with told(resumes=kind != "evaluate"):
        config = load_config(kind, name, overrides, out)
        if dry_run:
            if first():
                from qirl.plan import print_plan

                print_plan(config, world())
            return
        from qirl import api

        result = getattr(api, kind)(config)
        if kind == "evaluate" and first():
            from qirl.tables import print_results

            print_results(result)
        elif kind in ("curate", "calibrate"):
            _say_probe(kind, result, config)
        elif kind != "evaluate":
            say(f"model: {result}\nnext:  qirl report {config.run.out}")


def _say_probe(kind: str, result: Path, config) -> None:
    """The table of a curation or a calibration, its file, and how training takes it."""
    if not first():
        return
    from qirl.tables import print_calibration, print_curation

    if kind == "curate":
        print_curation(result.with_name("ledger.jsonl"))
        say(f"prompts: {result}\nnext:  qirl train CONFIG world.prompts={result}")
    else:
        print_calibration(result)
        say(f"calibration: {result}\nnext:  qirl train CONFIG advantage.calibration={result}")


@app.command()
def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="what to draw, each in quotes")],
    model: Annotated[str, typer.Option(help="model folder, or a finished run")],
    out: Annotated[str, typer.Option(help="PNG file for the images, side by side")],
    guidance: Annotated[float, typer.Option(min=0, help="classifier-free guidance scale; 1 is without")] = 4.0,
    steps: Annotated[int, typer.Option(min=2, max=1000, help="denoising steps")] = 20,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="seed of the noise")] = 0,
    device: Device = "auto",
) -> None:
    """Draw one image per prompt."""
    with told():
        from qirl.run.folder import check_writable

        path = Path(out)
        if path.suffix != ".png" or path.is_dir():
            raise UserError(f"--out {out}: images are written as PNG; name a file that ends in .png")
        check_writable(path.parent)
        from qirl.api import sample as draw
        from qirl.run.plots import grid

        images = draw(model, prompts, guidance=guidance, steps=steps, seed=seed, device=device)
        path.parent.mkdir(parents=True, exist_ok=True)
        grid(images[None], scale=max(1, 128 // images.shape[2]), gap=2).save(path)
        say(f"{len(images)} images: {path}")


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="run folders, or a folder that holds some")],
    out: Annotated[str | None, typer.Option(help="HTML file; default: report.html in the first folder")] = None,
) -> None:
    """Write one self-contained HTML page about runs: curves, samples, best and worst of a group."""
    with told():
        from qirl.run.folder import check_writable
        from qirl.run.report import write_report
        from qirl.run.stages import stages_of, summary_of

        stages = stages_of(runs)
        path = Path(out) if out is not None else Path(runs[0]) / "report.html"
        check_writable(path if path.is_dir() else path.parent)
        say(f"report: {write_report(path, stages, summary_of(runs, stages))}")


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="finished run, or model folder")],
    out: Annotated[str, typer.Option(help="new folder for the model")],
) -> None:
    """Copy a run's model as a diffusers folder."""
    with told():
        from qirl.models.folders import find_model
        from qirl.models.weights import copy_model

        say(f"model: {copy_model(find_model(run), out)}")


@app.command()
def options(
    command: Annotated[str, typer.Argument(help="pretrain, curate, calibrate, train, distill, evaluate or reward")],
    section: Annotated[str | None, typer.Argument(help="one section, such as policy or policy.nft")] = None,
) -> None:
    """List the options of a command's config: name, type, default, meaning."""
    with told():
        from qirl.tables import print_options

        print_options(command, section)


@app.command()
def doctor() -> None:
    """Say what is usable on this machine, and what each missing part costs."""
    with told():
        from qirl.doctor import print_report

        print_report()
