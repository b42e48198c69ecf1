"""Every C++ op refuses every tensor that does not fit, as an error in Python, and works on afterwards."""

import re
from pathlib import Path

import pytest
import torch

from qirl.kernels import _native

CSRC = Path(__file__).resolve().parents[1] / "csrc"
TOKENS, ROWS, CHANNELS = 6, 2, 8


def arguments() -> dict[str, list]:
    """Inputs that each op takes: two rows of three tokens, eight channels."""
    tokens = torch.randn(TOKENS, CHANNELS)
    row, offset, token = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 3, 6]), torch.arange(TOKENS)
    time, word = torch.full((ROWS,), 0.5), torch.arange(ROWS)
    steps = [time, time / 2, time, torch.zeros(ROWS, dtype=torch.int64)]
    pair = [tokens, tokens, tokens, tokens, tokens, row, offset]
    gradients = [time, time, torch.ones(ROWS, 2)]
    scores = torch.rand(4, 3, dtype=torch.float64)
    group = [torch.arange(4), torch.tensor([0, 0, 1, 1]), scores, scores[0].contiguous(), scores[:, 0].contiguous()]
    return {
        "philox_words": [torch.zeros(3, 4, dtype=torch.int64), 1],
        "philox_normal": [1, word, word, word, row, token, CHANNELS],
        "flow_step": [
            tokens, tokens, tokens, row, *steps, word, word, word, token, 0.5, 0.5, 2.0, False, 1, True, False,
        ],
        "policy_nft": [*pair, time, time, 1.0, True, 1.0],
        "policy_nft_backward": [*gradients, *pair, time, time, 1.0, True, 1.0],
        "policy_ratio": [*pair, *steps, time, 0.5, 0.5, 0.1, 0.1, False],
        "policy_ratio_backward": [*gradients, *pair, *steps, 0.5, 0.5],
        "velocity_match": [tokens, tokens, tokens, row, offset, 2.0, False],
        "velocity_match_backward": [time, tokens, tokens, tokens, row, offset, 2.0, False],
        "group_advantage": [scores, torch.ones(4, 3, dtype=torch.bool), *group, 1e-6, 5.0, 0],
    }  # fmt: skip


OPS = sorted(set(re.findall(r"m\.impl\(\"(\w+)\"", "".join(f.read_text() for f in CSRC.glob("*_bindings.cpp")))))


@pytest.mark.parametrize("name", OPS)
def test_a_tensor_of_another_dtype_or_dimension_is_refused(name, csrc):
    given, op = arguments()[name], _native.op_of(name)
    op(*given)
    for at, value in enumerate(given):
        if isinstance(value, torch.Tensor):
            for wrong in (value.to(torch.float16), value[None], value.sum()):
                with pytest.raises(RuntimeError, match=r"dtype|int64|dimension|must|differ|fit"):
                    op(*given[:at], wrong, *given[at + 1 :])
    op(*given)  # what was refused leaves nothing behind


@pytest.mark.parametrize("name", OPS)
def test_a_tensor_that_is_too_short_is_refused(name, csrc):
    given, op = arguments()[name], _native.op_of(name)
    tensors = [at for at, value in enumerate(given) if isinstance(value, torch.Tensor)]
    if name == "philox_words":
        tensors = []  # any number of counters
    for at in tensors:
        with pytest.raises(RuntimeError):
            op(*given[:at], given[at][:-1].contiguous(), *given[at + 1 :])
    op(*given)


@pytest.mark.parametrize(
    "file", sorted(f for f in CSRC.iterdir() if f.suffix in (".h", ".cpp", ".cu")), ids=lambda f: f.name
)
def test_csrc_throws_nothing(file):
    code = re.sub(r"//.*", "", file.read_text())
    assert not re.search(r"\bthrow\b|\bSTD_TORCH_CHECK\b", code)
