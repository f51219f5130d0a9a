"""A convolutional code and its soft decoder, over many received words at once.

Rate 1/2, constraint length 7, generators (133, 171) octal, ended by 6 zeros: n bits become 2 (n + 6). Output g of step t is

    c_{t,g} = sum_i k_i g_{t-i}  mod 2,     t = 0 .. n + 5,     g_0 the highest bit of the octal number

Viterbi's algorithm finds the message whose word has the largest correlation sum_p y_p (-1)^{c_p}: maximum likelihood under Gaussian noise. Cost:
64 states x 2 branches x (n + 6) steps a word. Source: Odenwalder, 1970, for the generators; Viterbi, IEEE Trans. Information Theory 13, 1967.
"""

from __future__ import annotations

import numpy as np

from dither.special.spright.gf2 import Masks, Reals

GENERATORS = (0o133, 0o171)
MEMORY = 6  # inputs that the encoder remembers
STATES = 1 << MEMORY
CHUNK = 256  # words whose metrics stay in the second cache


def length(n: int) -> int:
    """Bits of the word of an n-bit message."""
    return 2 * (n + MEMORY)


def columns(n: int) -> Masks:
    """The generator matrix's columns ``[2 (n + 6)]``: bit i of column 2 t + g says whether message bit i is in output g of step t."""
    found = []
    for t in range(n + MEMORY):
        for g in GENERATORS:
            taps = (i for i in range(max(0, t - MEMORY), min(n, t + 1)) if g >> (MEMORY - (t - i)) & 1)
            found.append(sum(1 << i for i in taps))
    return np.array(found, dtype=np.uint64)


def _branches() -> Reals:
    """``[2, 128]``: the two outputs, +-1, on the branch to state s' from 2 (s' mod 32) + x, at column 64 x + s'. A state's highest bit is its
    newest input."""
    found = np.empty((len(GENERATORS), 2, STATES))
    for x in range(2):
        for to in range(STATES):
            register = to >> (MEMORY - 1) << MEMORY | (to % (STATES // 2)) << 1 | x  # the input of this step, then the state it was in
            for g, taps in enumerate(GENERATORS):
                found[g, x, to] = 1 - 2 * ((register & taps).bit_count() & 1)
    return found.reshape(len(GENERATORS), -1)


BRANCHES = _branches()


def decode(y: Reals, n: int) -> tuple[Masks, Reals]:
    """The messages ``[A]`` behind the words ``y [A, 2 (n + 6)]``, positive where a bit is likely 0, and their correlations ``[A]``."""
    parts = [_decode(y[i : i + CHUNK], n) for i in range(0, len(y), CHUNK)]
    if not parts:
        return np.zeros(0, dtype=np.uint64), np.zeros(0)
    return np.concatenate([k for k, _ in parts]), np.concatenate([m for _, m in parts])


def _decode(y: Reals, n: int) -> tuple[Masks, Reals]:
    steps = n + MEMORY
    metric = np.full((len(y), STATES), -np.inf)  # the best of all paths to a state
    metric[:, 0] = 0
    came = np.empty((steps, len(y), STATES), dtype=np.uint8)  # x of the branch that it came by
    for t in range(steps):
        gain = (y[:, 2 * t : 2 * t + 2] @ BRANCHES).reshape(-1, 2, 2, STATES // 2)  # [A, x, input, s' mod 32]
        gain += metric.reshape(-1, STATES // 2, 2).transpose(0, 2, 1)[:, :, None]
        zero, one = gain.reshape(-1, 2, STATES).transpose(1, 0, 2)
        came[t] = one > zero
        metric = np.maximum(zero, one)
        if t >= n:
            metric[:, STATES // 2 :] = -np.inf  # only zeros end a word
    state = np.zeros(len(y), dtype=np.int64)
    found = np.zeros(len(y), dtype=np.uint64)
    every = np.arange(len(y))
    for t in reversed(range(steps)):
        if t < n:
            found |= (state >> (MEMORY - 1)).astype(np.uint64) << np.uint64(t)
        state = (state % (STATES // 2)) << 1 | came[t, every, state]
    return found, metric[:, 0]
