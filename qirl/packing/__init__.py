"""Packs: several prompts with all their targets in one sequence of tokens, nothing padded.

What a transformer sees of a prompt is either a prefix that its targets share (`shared`), or every target carries it along
(`joint`). Conditions say which; all of one pack are alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from qirl.packing.blocks import Condition, Span, Target, cut, image_positions, send
from qirl.packing.joint import JointPack, pack_joint
from qirl.packing.shared import PackedBatch, pack_shared

Pack = PackedBatch | JointPack


def pack(
    conditions: Sequence[Condition], targets: Sequence[Target], prefix: bool = True, device="cpu", pad: int = 1
) -> PackedBatch | JointPack | None:
    """The pack of these targets, which must be sorted by prompt; prefix and pad: see `pack_shared`.

    None where conditions share no prefix and there are no targets: nothing is to be run. Raises UserError as
    `pack_shared` and `pack_joint` do.
    """
    if all(condition.shared for condition in conditions):
        return pack_shared(conditions, targets, prefix, device, pad)
    return pack_joint(conditions, targets, device, pad) if targets else None


__all__ = [
    "Condition", "JointPack", "Pack", "PackedBatch", "Span", "Target", "cut", "image_positions", "pack", "pack_joint",
    "pack_shared", "send",
]  # fmt: skip
