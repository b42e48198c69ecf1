"""The scores of one training step: images go to the rewards as they are finished, raw scores into scores.jsonl."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from qirl.data.prompts import Prompt
from qirl.errors import UserError
from qirl.flow.rollout import not_finite
from qirl.parallel.data import gather_rows
from qirl.policy.advantages import ABSENT, check_categories, noise_table, pool_noise, table, unknown_weights
from qirl.policy.composition import compose
from qirl.rewards.edits import copies
from qirl.rewards.protocol import Reward, Sample, Scores, declared_noise


class StepScores:
    """Takes this rank's finished micro-groups of one step and gives their scores back in the order of the samples.

    chosen: the step's prompts; ids int64 [R]: each sample's slot * group + place in its group.
    """

    def __init__(self, trainer, chosen: Sequence[tuple[Prompt, int]], step: int):
        self.trainer, self.chosen, self.step = trainer, chosen, step
        self.order: list[int] = []
        self.edits = self.copies = 0
        self.lost = 0  # samples whose latents are not finite; after `collect` those of all ranks
        self.images: dict[int, np.ndarray] = {}

    def submit(self, ids: Sequence[int], latents: Sequence[torch.Tensor]) -> None:
        """Decodes a finished micro-group and hands it to the background scorer; what is not finite has failed."""
        family, group = self.trainer.family, self.trainer.config.policy.group
        sizes = [family.size(self.chosen[index // group][0]) for index in ids]
        images, failed, samples = family.decode(latents, sizes), not_finite(latents), []
        for index, image, bad in zip(ids, images, failed, strict=True):
            prompt = self.chosen[index // group][0]
            number = sample_number(self.trainer, self.step, index)
            samples.append(Sample.of(number, prompt, image, failed=bad))
            self.images[index] = image
        self.order += ids
        self.lost += sum(failed)
        drawn = [sample for sample in samples if not sample.failed]
        self.edits += sum(sample.task == "edit" for sample in drawn)
        self.copies += int(copies(drawn).sum())
        if self.trainer.engine.ranks.tp.rank == 0:  # ranks that share a model have the same images
            self.trainer.scorer.submit(samples)

    def collect(self, ids: torch.Tensor) -> tuple[list[Scores], list[np.ndarray], dict[str, float]]:
        """Scores and images of the samples `ids`, and the scorer's metrics. Raises the UserError of any rank on all."""
        share_known(self.trainer)
        try:
            found = self.trainer.scorer.collect()
        except UserError as error:
            if self.trainer.engine.ranks.alone:
                raise
            found = error, {}
        scores, record = self.trainer.engine.ranks.tp.gather_objects(found)[0]
        edited, copied, self.lost = agree_on_scores(self.trainer, scores, (self.edits, self.copies, self.lost))
        if self.lost:
            record["scoring/not_finite"] = self.lost
        if edited:  # an edit that returns its source keeps identity the laziest way
            record["copies"] = copied / edited
        place = {index: i for i, index in enumerate(self.order)}
        return [scores[place[i]] for i in ids.tolist()], [self.images[i] for i in ids.tolist()], record


def share_known(trainer) -> None:
    """Waits for the scorer and puts what it has learned together: over the ranks, and over a run that was continued.

    The notes, which a checkpoint keeps, then say it: "known" and "scored" as `Scorer` has them, and "declared_noise", what
    the first rank's rewards declared before the first step (servers may tell each rank and each start something else).
    """
    scorer, ranks, notes = trainer.scorer, trainer.engine.ranks, trainer.engine.notes
    try:
        scorer.wait()
        own = None, scorer.known, scorer.scored, declared_noise(trainer.rewards)
    except UserError as error:
        own = str(error), [], set(), {}
    parts = ranks.data.gather_objects(ranks.tp.gather_objects(own)[0])
    if errors := [error for error, *_ in parts if error]:
        raise UserError(errors[0])
    before = notes.get("known", [()] * len(scorer.known))
    scorer.known = [set().union(*own) for own in zip(before, *(part[1] for part in parts), strict=True)]
    scorer.scored = set(notes.get("scored", ())).union(*(part[2] for part in parts))
    notes["known"], notes["scored"] = [sorted(own) for own in scorer.known], sorted(scorer.scored)
    notes.setdefault("declared_noise", parts[0][3])


def sample_number(trainer, step: int, index: int) -> int:
    """The id of a sample, unique in the run."""
    policy = trainer.config.policy
    return step * policy.prompts * (1 + policy.refill) * policy.group + index


def gather_scores(
    trainer, ids: torch.Tensor, scores: Sequence[Scores], chosen, step: int, rows: int | None = None, lost: int = 0
) -> torch.Tensor:
    """Scores of all ranks' samples, float64 [N, K], sorted by id; as they came into scores.jsonl, then composed.

    The noise of noisy scores goes into the notes.

    ids: of this rank's samples. rows: how many each rank gives, where it is not the same everywhere.
    lost: samples of all ranks whose latents are not finite.
    Raises UserError where more samples failed than advantage.max_failed.
    """
    own = torch.cat([table(scores, trainer.components), noise_table(scores, trainer.components)], 1)
    missing = max(0, (rows or 0) - len(ids))
    padded = torch.cat([ids, ids.new_full((missing,), -1)])
    ids, everything = gather_rows(padded, torch.cat([own, own.new_zeros(missing, own.shape[1])]), trainer.engine.ranks)
    ids, everything = ids[ids >= 0], everything[ids >= 0]
    everything, noise = everything.split(len(trainer.components), 1)
    pool_noise(trainer.engine.notes, noise, trainer.components)
    write_scores(trainer, ids, everything, chosen, step)
    failed, limit = float(everything.isnan().any(1).double().mean()), trainer.config.advantage.max_failed
    if failed > limit:
        why = f" ({lost} of {len(everything)} have latents that are not finite)" if lost else ""
        why = why or "".join(f" ({text})" for text in reasons(trainer.rewards)[:1])
        fix = "lower optimizer.lr or use model.dtype=float32" if lost else "mend the reward"
        raise UserError(
            f"step {step + 1}: {failed:.0%} of the samples could not be scored{why}, more than advantage.max_failed="
            f"{limit:.0%}; {fix}, then start the same command again"
        )
    return compose(everything, trainer.components, trainer.config.composition)


def reasons(rewards: Sequence[Reward]) -> list[str]:
    """Why rewards failed, the commonest first, as far as they count it."""
    return [text for text, _ in sum((getattr(r, "failures", Counter()) for r in rewards), Counter()).most_common()]


def write_scores(trainer, ids: torch.Tensor, everything: torch.Tensor, chosen, step: int) -> None:
    """All raw scores of the step into scores.jsonl, before they are used."""
    records = []
    for index, row in zip(ids.tolist(), everything.tolist(), strict=True):
        slot, which = divmod(index, trainer.config.policy.group)
        prompt = chosen[slot][0]
        scores = {c: v for c, v in zip(trainer.components, row, strict=True) if v != ABSENT}
        records.append(
            {"step": step + 1, "id": sample_number(trainer, step, index), "prompt_id": prompt.id, "prompt": prompt.text,
             "category": prompt.category, "sample": which, "scores": scores}
        )  # fmt: skip
    if trainer.engine.ranks.first:
        trainer.engine.scores.append(records)


def agree_on_scores(trainer, scores: list[Scores] | UserError, counts: tuple[int, ...] = ()) -> list[int]:
    """Adds what any rank's rewards returned for the first time: a component may apply to later prompts only.

    Returns `counts` summed over the ranks. Raises the UserError of any rank on all of them.
    """
    failed = str(scores) if isinstance(scores, UserError) else None
    names = set(trainer.components) | ({name for own in scores for name in own} if failed is None else set())
    if not trainer.engine.ranks.alone:
        parts = trainer.engine.ranks.data.gather_objects((sorted(names), failed, counts))
        if errors := [error for _, error, _ in parts if error]:
            raise UserError(errors[0])
        names = {name for part, _, _ in parts for name in part}
        counts = [sum(own) for own in zip(*(part[2] for part in parts), strict=True)]
    if not names:
        raise UserError("no reward returned a component for any sample; a reward returns {component: score} per sample")
    if names != set(trainer.components):
        options = trainer.config.advantage
        if unknown := unknown_weights(options, sorted(names)):
            warnings.warn(f"no reward has returned {', '.join(unknown)} so far: those weights do nothing", stacklevel=2)
        check_categories(options, sorted(names), trainer.prompts.categories)
        trainer.engine.notes["components"] = sorted(names)
    return list(counts)
