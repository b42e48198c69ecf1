"""calibration.json: reward weights and scale per prompt category, as `qirl calibrate` writes and training uses them.

{"calibration": 1, "method", "policy", ..., "categories": {category: {"scale", "components": {component:
    {"wanted", "target", "weight", "realised", "variance", "read_noise", "reliability", "active"}}, ...}}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qirl.errors import UserError, nearest
from qirl.policy.advantages import ABSENT, variance_shares
from qirl.run.cache import content_key

NAME = "calibration.json"
VERSION = 1


@dataclass(frozen=True)
class CategoryWeights:
    """weights: by component, not all 0; scale: 1 over the advantage's RMS; target: wanted shares, None for hand weights."""

    weights: dict[str, float]
    scale: float
    target: dict[str, float | None]


@dataclass(frozen=True)
class Calibration:
    """The weights of every category that was calibrated."""

    path: Path
    categories: dict[str, CategoryWeights]

    @property
    def key(self) -> str:
        """A content hash of the numbers that training uses."""
        return content_key({name: [own.weights, own.scale] for name, own in self.categories.items()})

    def check_unchanged(self, notes: dict) -> None:
        """Raises UserError if the run (whose notes these are) began with other numbers in this file."""
        if notes.setdefault("calibration", self.key) != self.key:
            raise UserError(f"{self.path} changed since the run began; restore it, or choose another run.out")

    def tables(
        self, scores: torch.Tensor, categories: Sequence[str], components: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [N, K] and scale [N], float64, of scores [N, K] (ABSENT where a component does not apply).

        Raises UserError if a component applies to a sample whose category has no weight for it.
        """
        own = [self.categories[name] for name in categories]
        for n, k in (scores != ABSENT).nonzero().tolist():
            if components[k] not in own[n].weights:
                raise UserError(
                    f"{self.path} has no weight for '{components[k]}' in category '{categories[n]}', which a reward returned "
                    f"there; it knows {', '.join(sorted(own[n].weights))}; calibrate with the rewards of the training"
                )
        weights = [[one.weights.get(c, 0.0) for c in components] for one in own]
        return torch.tensor(weights, dtype=torch.float64), torch.tensor([one.scale for one in own], dtype=torch.float64)

    def share_metrics(
        self,
        parts: torch.Tensor,
        valid: torch.Tensor,
        group: torch.Tensor,
        categories: Sequence[str],
        components: Sequence[str],
    ) -> dict[str, float]:
        """share/<category>/<component>: of the variance of a step's advantages inside groups; beside the wanted shares.

        parts [N, K], valid [N]: of `qirl.policy.advantages.contributions`.
        """
        record: dict[str, float] = {}
        for name in sorted(set(categories)):
            own = valid & torch.tensor([c == name for c in categories])
            target = self.categories[name].target
            for component, share in zip(components, variance_shares(parts[own], group[own]).tolist(), strict=True):
                if component in target and math.isfinite(share):
                    record[f"share/{name}/{component}"] = share
                    if target[component] is not None:
                        record[f"share_wanted/{name}/{component}"] = target[component]
        return record


def load_calibration(path: str | Path) -> Calibration:
    """The calibration of a file (or of a folder that holds one). Raises UserError where it is missing or damaged."""
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"advantage.calibration={path} does not exist; make it with `qirl calibrate`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); make it again with `qirl calibrate`") from None
    try:
        if record["calibration"] != VERSION:
            raise ValueError(f"version {record['calibration']}, this qirl reads {VERSION}")
        categories = {name: _category(name, own) for name, own in record["categories"].items()}
        if not categories:
            raise ValueError("no category")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{path} is damaged or no calibration ({reason}); make it again with `qirl calibrate`"
        ) from None
    return Calibration(path, categories)


def _category(name: str, record: dict) -> CategoryWeights:
    own = record["components"]
    weights = {component: float(values["weight"]) for component, values in own.items()}
    target = {component: values.get("target") for component, values in own.items()}
    scale = float(record["scale"])
    if not all(math.isfinite(w) and w >= 0 for w in weights.values()) or not sum(weights.values()) > 0:
        raise ValueError(f"category '{name}' has the weights {weights}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"category '{name}' has the scale {scale}")
    return CategoryWeights(weights, scale, target)


def check_fit(calibration: Calibration, categories: Sequence[str], components: Sequence[str]) -> None:
    """Raises UserError if a category of the training prompts, or one of the rewards' components, was not calibrated.

    What was calibrated for other categories only, as those of the other task, does not matter. components: what the
    rewards declare; none: `Calibration.tables` finds out at the first scores.
    """
    for name in categories:
        if name not in calibration.categories:
            raise UserError(
                f"{calibration.path} has no weights for category '{name}' of the training prompts, only for "
                f"{', '.join(sorted(calibration.categories))}; calibrate on prompts of all categories"
            )
    known = sorted({name for category in categories for name in calibration.categories[category].weights})
    for name in known if components else ():
        if name not in components:
            raise UserError(f"{calibration.path} weighs '{name}', which no reward returns{nearest(name, components)}")
    for name in components:
        if name not in known:
            raise UserError(
                f"{calibration.path} has no weight for '{name}', which a reward returns; it knows {', '.join(known)}; "
                "calibrate with the rewards of the training"
            )
