"""csrc against an independent Philox4x32-10 in Python integers, and against the torch reference."""

import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qirl.kernels import _native, philox

ROOT = Path(__file__).resolve().parents[1]
needs_csrc = pytest.mark.usefixtures("csrc")


def compiler():
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


@pytest.mark.skipif(not compiler(), reason="csrc needs a C++ compiler, and there is none")
def test_csrc_is_built():
    """The one test that fails where it is not: the others that need it are skipped."""
    assert _native.load(), "csrc is not built: run `python setup.py build_ext --inplace`"


def words(counter, seed):
    return _native.op_of("philox_words")(counter, _native.signed(seed))


def normals(seed, prompt, sample, row, token, channels, step):
    """csrc's normals, every row at the same step."""
    word = torch.full_like(prompt, step)
    return _native.op_of("philox_normal")(_native.signed(seed), prompt, sample, word, row, token, channels)


def philox_in_python(counter, seed):
    c, k = list(counter), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = divmod(0xD2511F53 * c[0], 2**32), divmod(0xCD9E8D57 * c[2], 2**32)
        c = [b[0] ^ c[1] ^ k[0], b[1], a[0] ^ c[3] ^ k[1], a[1]]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@needs_csrc
def test_words_of_counter_zero_and_key_zero_are_the_published_ones():
    found = words(torch.zeros(1, 4, dtype=torch.int64), 0)[0].tolist()
    assert [f"{w:08x}" for w in found] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@needs_csrc
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_words_equal_python_integers_for_any_key(seed):
    draw = random.Random(seed)
    counters = [[draw.getrandbits(32) for _ in range(4)] for _ in range(200)] + [[2**32 - 1] * 4]
    expected = [philox_in_python(c, seed) for c in counters]
    assert words(torch.tensor(counters), seed).tolist() == expected


@needs_csrc
def test_each_normal_is_the_formula_of_its_own_counter():
    seed, step, prompt, sample, token, channels = (
        2**63 + 5,
        3 | 1 << 16,
        [7, 2**32 - 1],
        [5, 9 | 4 << 12],
        1234,
        12,
    )
    z = normals(seed, *map(torch.tensor, (prompt, sample, [1, 0], [token, 0])), channels, step)
    for n, (row, at) in enumerate([(1, token), (0, 0)]):
        for channel in range(channels):
            element = at * channels + channel
            drawn = philox_in_python([element // 4, step, sample[row], prompt[row]], seed)
            pair = drawn[2:] if element % 4 >= 2 else drawn[:2]
            turn = 2 * math.pi * (pair[1] >> 8) / 2**24
            expected = math.sqrt(-2 * math.log(((pair[0] >> 8) + 1) / 2**24))
            expected *= math.sin(turn) if element % 2 else math.cos(turn)
            assert abs(z[n, channel].item() - expected) < 2e-6


@needs_csrc
def test_normals_equal_the_torch_reference():
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(0, 3, (5001,), generator=generator)
    token = torch.randint(0, 100_000, (5001,), generator=generator)
    prompt, sample = torch.tensor([3, 0, 2**32 - 1]), torch.tensor([1, 2 | 7 << 12, 4095])
    native = normals(2**64 - 3, prompt, sample, row, token, 12, 5)
    reference = philox.reference(2**64 - 3, prompt, sample, torch.full_like(prompt, 5), row, token, 12)
    assert native.dtype == torch.float32 and native.shape == (5001, 12)
    assert (native - reference).abs().max() <= 2e-6


@needs_csrc
def test_normals_are_within_two_millionths_wherever_the_radius_and_the_angle_are_delicate():
    """u next to 0 and 1, angles next to the eighths of a turn: counters are found by search, since words come from Philox."""
    quad = torch.arange(400_000)
    one = torch.zeros(1, dtype=torch.int64)
    given = one, one, torch.zeros_like(quad), quad
    exact = philox.reference(5, one, one, one, *given[2:], 4)
    assert exact.abs().max() > 4.9 and (exact.abs() < 1e-4).any()
    assert (normals(5, *given, 4, 0) - exact).abs().max() <= 2e-6


@needs_csrc
def test_every_row_has_its_own_step():
    row, token = torch.arange(3).repeat_interleave(7), torch.arange(7).repeat(3)
    draws, steps = philox.stream(3, [5, 5, 6], [0, 1, 0], 2), torch.tensor([4, 0, 4])
    together = philox.normal(draws, row, token, 8, steps, philox.LOSS)
    for r in range(3):
        own = row == r
        alone = philox.normal(draws, row[own], token[own], 8, int(steps[r]), philox.LOSS)
        assert torch.equal(together[own], alone)


@needs_csrc
def test_a_normal_does_not_depend_on_what_is_drawn_with_it():
    prompt, sample = torch.tensor([3, 8]), torch.tensor([0, 1])
    row, token = torch.arange(2).repeat_interleave(4096), torch.arange(4096).repeat(2)
    together = normals(11, prompt, sample, row, token, 16, 0)
    order = torch.randperm(8192, generator=torch.Generator().manual_seed(1))
    assert torch.equal(normals(11, prompt, sample, row[order], token[order], 16, 0), together[order])
    assert torch.equal(normals(11, prompt[1:], sample[1:], row[:5], token[:5], 16, 0), together[4096:4101])


@needs_csrc
def test_no_tokens_make_no_noise():
    nothing = torch.empty(0, dtype=torch.int64)
    assert normals(0, nothing, nothing, nothing, nothing, 8, 0).shape == (0, 8)


@needs_csrc
@pytest.mark.parametrize(
    "change, message",
    [
        ({"row": torch.tensor([2])}, "every row must index"),
        ({"row": torch.tensor([-1])}, "every row must index"),
        ({"prompt": torch.tensor([2**32, 2**32])}, "must fit uint32"),
        ({"token": torch.tensor([2**31])}, "must fit uint32"),  # the element's call index, not the token
        ({"token": torch.tensor([-1])}, "must fit uint32"),
        ({"step": 2**32}, "must fit uint32"),
        ({"channels": 6}, "channels=6 is not a positive multiple of 4"),
        ({"prompt": torch.tensor([1])}, "differ in length"),
        ({"row": torch.tensor([0], dtype=torch.int32)}, "row must be contiguous int64"),
    ],
)
def test_what_does_not_fit_a_counter_is_refused(change, message):
    given = dict(
        prompt=torch.tensor([1, 2]),
        sample=torch.tensor([0, 0]),
        row=torch.tensor([0]),
        token=torch.tensor([0]),
    )
    given |= {"channels": 16, "step": 0} | change
    with pytest.raises(RuntimeError, match=message):
        normals(0, **given)


@needs_csrc
def test_ops_have_the_fakes_that_compile_needs():
    counter, row = torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    torch.library.opcheck(torch.ops.qirl.philox_words.default, (counter, 1))
    torch.library.opcheck(torch.ops.qirl.philox_normal.default, (1, row, row, row, row, row, 8))


def test_the_build_names_what_is_missing(tmp_path):
    env = {"PATH": str(tmp_path), "QIRL_BUILD_CSRC": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "csrc needs a C++20 compiler" in done.stderr


@needs_csrc
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_words_equal_the_cpu_and_normals_agree():
    assert _native.library("cuda").is_file(), "csrc has no CUDA part: build it where nvcc is"
    row, token = torch.arange(3).repeat_interleave(5000), torch.arange(5000).repeat(3)
    counter = torch.stack([token, row, row + 1, row + 2], -1)
    assert torch.equal(words(counter.cuda(), 9).cpu(), words(counter, 9))
    given = (torch.tensor([3, 8, 1]), torch.tensor([0, 1, 2]), row, token)
    on_gpu = normals(9, *(t.cuda() for t in given), 64, 5).cpu()
    assert (on_gpu - normals(9, *given, 64, 5)).abs().max() <= 2e-6
