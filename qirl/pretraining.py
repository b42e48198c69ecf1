"""A base model by flow matching with condition dropout: what RL starts from where no trained model is at hand.

    x_t = (1 - t) x0 + t noise;   loss = |v(x_t, t, prompt) - (noise - x0)|^2,   t = sigmoid(normal)

Source: Lipman et al. (flow matching, 2023), Esser et al. (logit-normal t, 2024), Ho and Salimans (dropout, 2022).
"""

from __future__ import annotations

import time

import torch

from qirl.config import PretrainConfig
from qirl.engine import Engine, model_config
from qirl.errors import UserError
from qirl.families import largest_target
from qirl.kernels.philox import DATA, LOSS, NODES, normal, stream, uniform
from qirl.kernels.velocity_match import velocity_match
from qirl.packing import Target, cut, pack, send
from qirl.parallel.data import agree, data_ranks
from qirl.world import World, make_world


def pretrain(config: PretrainConfig, quiet: bool = False) -> Engine:
    """Trains (or continues) the base in config.run.out and exports it to its model/ folder.

    Raises UserError for a config or a folder that does not fit; SystemExit 143 after a SIGTERM, on a checkpoint.
    """
    if config.pretrain.batch < (groups := data_ranks(config.parallel)):
        raise UserError(
            f"pretrain.batch={config.pretrain.batch} is smaller than the {groups} ranks; use {groups} or more"
        )
    world = make_world(config.world, config.model, config.run.device)
    prompts = world.data.prompts("train", config.world.prompts)
    model_config(config, world.family)
    world.family.prepare(prompts, config.pretrain.drop_condition > 0)
    need = largest_target(world.family, prompts) + max(map(world.family.condition_tokens, prompts))
    if config.pretrain.micro_tokens < need:
        raise UserError(
            f"pretrain.micro_tokens={config.pretrain.micro_tokens} tokens is smaller than one sample of {need} tokens; "
            f"set it to {need} or more"
        )
    engine = Engine.open(config, world.family)
    engine.run(
        "pretrain",
        lambda step: train_step(engine, world, step),
        lambda record: {"loss": record["loss"], "images/s": record["images_per_second"]},
        quiet=quiet,
    )
    engine.finish({**world.family.facts(), "unconditional": config.pretrain.drop_condition > 0})
    return engine


def train_step(engine: Engine, world: World, step: int) -> dict:
    """One update on pretrain.batch fresh examples, a pure function of (seed, step)."""
    options, ranks, begun = engine.config.pretrain, engine.ranks, time.monotonic()
    family, uniforms = world.family, world.data.uniforms
    mine = list(range(ranks.rank, options.batch, ranks.world))
    draws = stream(engine.config.run.seed, mine, [0] * len(mine), step)
    u = uniform(draws, uniforms + 1, 0, DATA)
    prompts, images = world.data.examples(1 - u[:, :uniforms].numpy())  # u is in (0, 1]
    x0 = family.encode(images)
    dropped = (u[:, uniforms] <= options.drop_condition).tolist()
    t = torch.sigmoid(options.logit_mean + options.logit_std * torch.special.ndtri(uniform(draws, 1, 0, NODES)[:, 0]))

    conditions = [(family.negative if drop else family.condition)(p) for p, drop in zip(prompts, dropped, strict=True)]
    sizes = [family.size(p) for p in prompts]
    order = sorted(range(len(mine)), key=lambda i: conditions[i].tokens)  # equal shapes side by side run as one call
    packs = cut([conditions[i].tokens + len(x0[i]) for i in order], options.micro_tokens, "pretrain.micro_tokens")
    _, count = agree(False, len(packs), ranks)
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for place in range(count):
        members = torch.tensor([order[i] for i in packs[place % len(packs)]])
        total += (
            micro_step(engine, conditions, sizes, draws.rows(members), members, x0, t, place < len(packs))
            / options.batch
        )
    ranks.data.all_reduce(total)
    outcome = engine.outcome(step, [engine.update(step)])
    seconds = time.monotonic() - begun
    return {
        "step": step + 1, "loss": float(total), **outcome,
        "lr": engine.optimizer.lr(step), "time/step": seconds, "images_per_second": options.batch / seconds,
    }  # fmt: skip


def micro_step(engine: Engine, conditions, sizes, draws, members, x0, t, live: bool) -> torch.Tensor:
    """Adds the gradients of one pack (none if it is only there to keep ranks in step); returns its summed loss."""
    device, own = engine.ranks.device, members.tolist()
    targets = [Target(place, *sizes[i]) for place, i in enumerate(own)]
    body = pack([conditions[i] for i in own], targets, device=device, pad=engine.runner.pad)
    row, token = body.target_row, body.token_in_target
    clean = send(torch.cat([x0[i] for i in own]), device)
    noise = normal(draws.to(device), row, token, clean.shape[1], 0, LOSS)
    times = send(t[members].float(), device)
    along = times[row, None]
    v = engine.runner(body, (1 - along) * clean + along * noise, times)
    loss = velocity_match(v, noise - clean, body.lengths, row=row).sum()
    (loss / engine.config.pretrain.batch if live else loss * 0).backward()
    return loss.detach() if live else loss.detach() * 0
