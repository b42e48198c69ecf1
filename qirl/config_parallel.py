"""How a run's ranks share the work beside data parallelism."""

from __future__ import annotations

from pydantic import model_validator

from qirl.config_sections import Section, option, require


class Parallel(Section):
    dp: int = option(0, "data parallel groups; 0: as many as the ranks that torchrun starts make", ge=0)
    tp: int = option(1, "ranks that share every block's matrices and heads (tensor parallel)", ge=1)
    sequence: bool = option(False, "the ranks of tp share the tokens between the blocks' matrices as well")
    pp: int = option(1, "pipeline stages; only 1 so far", ge=1)
    cp: int = option(1, "ranks that share the tokens of attention (context parallel); only 1 so far", ge=1)

    @model_validator(mode="after")
    def _what_there_is(self):
        for name, degree in (("pp", self.pp), ("cp", self.cp)):
            require(degree == 1, f"parallel.{name}={degree} is not supported yet; use parallel.{name}=1, and tp or dp")
        require(
            not self.sequence or self.tp > 1,
            "parallel.sequence=true shares tokens over the ranks of parallel.tp, and parallel.tp=1; set parallel.tp=2 or more, "
            "or parallel.sequence=false",
        )
        return self
