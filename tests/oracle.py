"""The policy losses written out for one (sample, node) at a time: what the packed update must equal."""

import dataclasses
import itertools

import torch
from tiny_runs import gradients
from torch.distributions import Normal

from qirl.flow.grid import sigmas
from qirl.kernels.flow_step import MODES, Step, mean_std
from qirl.kernels.philox import LOSS, TRANSITION, normal, stream
from qirl.packing import Target, pack
from qirl.policy import trainer as training
from qirl.policy.update import accumulate


def step_gradients(trainer, exp, slots, **policy):
    config = trainer.config.model_copy(update={"policy": trainer.config.policy.model_copy(update=policy)})
    own = dataclasses.replace(trainer, config=config)
    parts = training.prepare(own, exp, slots)
    flat = itertools.chain(*parts)
    stats = torch.cat([accumulate(own.engine.model, layout, batches, config) for layout, batches in flat])
    return gradients(own), stats, parts


def predicted(model, bodies, x, t, config):
    """Section 4: guided where the objective is in scope, else conditional. bodies: the prompt's and its twin's pack."""
    v = model(bodies[0], x, t)
    if config.flow.guidance == 1 or config.guidance.scope != "both":
        return v
    twin = model(bodies[1], x, t)
    return twin + config.flow.guidance * (v - twin)


def oracle_loss(trainer, exp, chosen, slots, step, old, reference, prompts=None):
    """Section 3, one (sample, node) at a time, through packs of one target; v_old and v_ref from the models `old` and
    `reference`, where None is the trained one itself, detached."""
    config, model, family = trainer.config, trainer.engine.model, trainer.family
    channels = family.channels
    policy, seed = config.policy, config.run.seed
    total, valid = 0.0, 0
    for i, target in enumerate(exp.targets):
        if prompts is not None and slots[target.prompt] not in prompts:
            continue
        prompt, again = chosen[slots[target.prompt]]
        count = target.tokens
        grid = torch.from_numpy(sigmas(count, config.flow))
        own = stream(seed, [prompt.id], [again * policy.group + i % policy.group], step)
        zeros, tokens = torch.zeros(count, dtype=torch.int64), torch.arange(count)
        bodies = [
            pack([c], [Target(0, *family.size(prompt))]) for c in (family.condition(prompt), family.negative(prompt))
        ]
        for node in exp.nodes[i]:
            if not exp.valid[i]:
                continue
            valid += 1
            t, s = (grid[n].double().item() for n in (node, node + 1))
            if policy.loss == "nft":
                x0, noise = exp.x0[i], normal(own, zeros, tokens, channels, node, LOSS).double()
                x = (1 - t) * x0 + t * noise
            else:
                x = exp.kept[i, node].x
            at = grid[node : node + 1]
            v = predicted(model, bodies, x, at, config)
            with torch.no_grad():
                v_old, v_ref = (
                    v.detach() if m is None else predicted(m, bodies, x, at, config) for m in (old, reference)
                )
            a = float(exp.advantage[i])
            if policy.loss == "nft":
                r = float(exp.advantage[i].div(config.advantage.clip).clamp(-1, 1) / 2 + 0.5)  # advantages are float32
                b = policy.nft.beta
                loss = 0
                for share, velocity in ((r, b * v + (1 - b) * v_old), (1 - r, (1 + b) * v_old - b * v)):
                    error = x - t * velocity - x0
                    loss = loss + share * (error**2).mean() / error.detach().abs().mean() * config.advantage.clip / b
            else:
                mode = torch.tensor([MODES.index(config.flow.sampler)])
                one = Step(at, grid[node + 1 : node + 2], grid[1:2], mode, config.flow.level)
                (mean, std), (mean_old, _) = (mean_std(x, u, zeros, one) for u in (v, v_old))
                x_next = exp.kept[i, node].x_next
                if config.flow.guidance != 1 and (config.guidance.scope, config.guidance.form) == (
                    "rollout",
                    "residual",
                ):
                    x_next = mean_old + std * normal(own, zeros, tokens, channels, node, TRANSITION)
                log_ratio = (Normal(mean, std).log_prob(x_next) - Normal(mean_old, std).log_prob(x_next)).mean()
                if policy.loss == "guard":
                    log_ratio = std[0] * (log_ratio + ((mean - mean_old) ** 2).mean() / (2 * std[0] ** 2))
                ratio = log_ratio.exp()
                loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - policy.clip_low, 1 + policy.clip_high))
            if policy.kl:
                loss = loss + policy.kl * ((v - v_ref) ** 2).mean()
            total = total + loss
    return total / valid
