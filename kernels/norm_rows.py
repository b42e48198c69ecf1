"""Whole rows of tokens in a kernel's registers, and their LayerNorm: what the ops with a norm share.

A row of `width` values is held as two blocks: BLOCK values from the row's start, REST after them (0 for none). 3072 is
2048 + 1024, so that no thread stands idle; one block of 4096 would leave a quarter of them so. Where REST is 0 the second
block of a pair is the first one again, and nobody computes with it.

LANES threads share a token: each adds up its own values first, then they exchange one number for each sum.
"""

from __future__ import annotations

from qirl.kernels.tritons import jit, tl


@jit
def block_of(begin, there, width: tl.constexpr, START: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Where the columns from START on of rows lie that begin at `begin` [TOKENS], and which exist."""
    column = START + tl.arange(0, BLOCK)
    inside = tl.full([TOKENS, BLOCK], True, tl.int1)
    if TOKENS > 1:
        inside = inside & there[:, None]
    if START + BLOCK > width:
        inside = inside & (column < width)[None, :]
    return begin[:, None] + column[None, :], inside


@jit
def load(data, begin, there, width: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr):
    """Rows in float32; 0 where nothing is."""
    at, inside = block_of(begin, there, width, 0, TOKENS, BLOCK)
    a = tl.load(data + at, inside, other=0).to(tl.float32)
    b = a
    if REST:
        at, inside = block_of(begin, there, width, BLOCK, TOKENS, REST)
        b = tl.load(data + at, inside, other=0).to(tl.float32)
    return a, b


@jit
def load_one(data, begin, width: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr):
    """The row [1, ...] that begins at `begin`."""
    first = begin + tl.arange(0, 1)
    return load(data, first, first >= 0, width, 1, BLOCK, REST)


@jit
def store(
    data, begin, there, a, b, width: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    at, inside = block_of(begin, there, width, 0, TOKENS, BLOCK)
    tl.store(data + at, a.to(data.dtype.element_ty), inside)
    if REST:
        at, inside = block_of(begin, there, width, BLOCK, TOKENS, REST)
        tl.store(data + at, b.to(data.dtype.element_ty), inside)


@jit
def store_sum(data, begin, a, b, width: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr):
    """Stores the sum over the tokens of rows (a, b) where one row begins."""
    column = tl.arange(0, BLOCK)
    tl.store(data + begin + column, tl.sum(a, 0), column < width)
    if REST:
        column = BLOCK + tl.arange(0, REST)
        tl.store(data + begin + column, tl.sum(b, 0), column < width)


@jit
def zeros(TOKENS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr):
    a = tl.zeros([TOKENS, BLOCK], tl.float32)
    b = a
    if REST:
        b = tl.zeros([TOKENS, REST], tl.float32)
    return a, b


@jit
def folded(a, b, REST: tl.constexpr, LANES: tl.constexpr):
    """[TOKENS, LANES]: the sums of each thread's own values."""
    total = tl.sum(tl.reshape(a, [a.shape[0], LANES, a.shape[1] // LANES]), 2)
    if REST:
        total += tl.sum(tl.reshape(b, [b.shape[0], LANES, b.shape[1] // LANES]), 2)
    return total


@jit
def mean_of(a, b, width: tl.constexpr, REST: tl.constexpr, LANES: tl.constexpr):
    """The mean of each row, [TOKENS, 1]."""
    return tl.sum(folded(a, b, REST, LANES), 1)[:, None] * (1.0 / width)


@jit
def means_of(a, b, c, d, width: tl.constexpr, REST: tl.constexpr, LANES: tl.constexpr):
    """The means of the rows (a, b) and of the rows (c, d), [TOKENS, 1] each, in one exchange between threads."""
    both = tl.join(folded(a, b, REST, LANES), folded(c, d, REST, LANES))
    first, second = tl.split(tl.sum(both, 1))
    return first[:, None] * (1.0 / width), second[:, None] * (1.0 / width)


@jit
def away(x, mean, width: tl.constexpr, START: tl.constexpr):
    """x - mean of a block that begins at column START; 0 beyond the row."""
    centred = x - mean
    if START + x.shape[1] > width:
        column = START + tl.arange(0, x.shape[1])
        centred = tl.where((column < width)[None, :], centred, 0)
    return centred


@jit
def centred(a, b, mean, width: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr):
    first = away(a, mean, width, 0)
    second = first
    if REST:
        second = away(b, mean, width, BLOCK)
    return first, second


@jit
def normed(a, b, eps, width: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, LANES: tl.constexpr):
    """(x - mean) / sqrt(var + eps) of the rows x = (a, b)."""
    a, b = centred(a, b, mean_of(a, b, width, REST, LANES), width, BLOCK, REST)
    inverse = tl.rsqrt(mean_of(a * a, b * b, width, REST, LANES) + eps)
    return a * inverse, b * inverse


@jit
def norm_and_gradient(
    a, b, dn_a, dn_b, eps, width: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """n of the rows x = (a, b), and the gradient of x from that of n: (dn - mean(dn) - n mean(dn n)) / sqrt(var + eps)."""
    mean, slope = means_of(a, b, dn_a, dn_b, width, REST, LANES)
    a, b = centred(a, b, mean, width, BLOCK, REST)
    variance, along = means_of(a * a, b * b, dn_a * a, dn_b * b, width, REST, LANES)
    inverse = tl.rsqrt(variance + eps)
    a, b, along = a * inverse, b * inverse, along * inverse
    return a, b, inverse * (dn_a - slope - a * along), inverse * (dn_b - slope - b * along)
