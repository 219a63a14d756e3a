"""Tests of a recall or a specificity that may be looked at after every patient, for as long as one likes.

The capital of a gambler who bets against a claim grows beyond 1 / alpha with a chance of at most alpha, at
any time, if the claim is true (Ville 1939). So a claim is refuted when that happens, and all claims not
refuted so far make up a confidence sequence (Waudby-Smith and Ramdas 2024, doi:10.1093/jrsssb/qkad009;
Podkopaev and Ramdas 2022, arXiv:2110.06177). Outcomes are 0 or 1, so the capital is a ratio of likelihoods,
averaged over what the gambler thinks possible (Robbins 1970, doi:10.1214/aoms/1177696786); both have closed
forms. After many patients these ratios are far beyond what a float holds, so everything is a logarithm here.
"""

import numpy as np
from scipy.special import betainc, betaln, xlog1py, xlogy

ALPHA = 0.05
WIDTH = 0.25  # the gambler thinks of recalls down to this far below the floor, all alike
DEEP = 1e-250  # below this the incomplete beta function loses digits, and is 0 at last
TINY = 1e-300  # what Lentz's method puts in the place of 0
HALVINGS = 60  # of an interval of length 1: to the last digit of a float


def log_beta_tail(a, b, x):
    """Log of the regularised incomplete beta function I_x(a, b), also where that is no float any more;
    float64 arrays of one shape, a and b at least 1, x in (0, 1)."""
    tail = betainc(a, b, x)
    log_tail = np.log(np.maximum(tail, DEEP))
    deep = np.flatnonzero(tail < DEEP)
    log_tail[deep] = _log_deep_tail(a[deep], b[deep], x[deep])
    return log_tail


def _log_deep_tail(a, b, x):
    """The same where x is far below the mean a / (a + b): the continued fraction DLMF 8.17.22 by Lentz's
    method (Press et al. 2007, Numerical Recipes, 6.4). So far out it takes a few dozen steps."""
    c, d = np.ones_like(a), 1 / (1 - (a + b) * x / (a + 1))
    fraction, change, step = d.copy(), np.full_like(a, np.inf), 0
    while len(a) and np.abs(change - 1).max() > 1e-14 and step < 10_000:
        step += 1
        even = step * (b - step) * x / ((a + 2 * step - 1) * (a + 2 * step))
        odd = -(a + step) * (a + b + step) * x / ((a + 2 * step) * (a + 2 * step + 1))
        for numerator in (even, odd):
            c, d = 1 + numerator / c, 1 + numerator * d
            c, d = np.where(c == 0, TINY, c), 1 / np.where(d == 0, TINY, d)
            change = c * d
            fraction = fraction * change
    return xlogy(a, x) + xlog1py(b, -x) - np.log(a) - betaln(a, b) + np.log(fraction)


def log_beta_between(a, b, low, high):
    """Log of the chance that a Beta(a, b) variable is between `low` and `high`; float64 arrays a, b [N],
    numbers 0 <= low < high < 1.

    The difference of the two lower tails, or where most of the mass lies below `low`, of the two upper ones:
    the difference of two numbers near 1 would lose every digit."""
    below = a < low * (a + b)
    a, b = np.where(below, b, a), np.where(below, a, b)
    outer = log_beta_tail(a, b, np.where(below, 1 - low, high))
    if low == 0:
        return outer
    inner = log_beta_tail(a, b, np.where(below, 1 - high, low))
    return outer + np.log1p(-np.exp(inner - outer))


def log_capital(hits, misses, floor):
    """Log of the capital against "the chance of a hit is at least `floor`", after so many hits and misses
    (arrays). The average over r, uniform in [floor - WIDTH, floor], of the likelihood ratio of r to `floor`;
    it is a supermartingale for every chance >= floor, since each ratio falls with each hit."""
    low = max(0.0, floor - WIDTH)
    a, b = np.broadcast_arrays(np.asarray(hits) + 1.0, np.asarray(misses) + 1.0)
    mass = log_beta_between(a.ravel(), b.ravel(), low, floor).reshape(a.shape)
    log_mixture = betaln(a, b) + mass - np.log(floor - low)
    return log_mixture - (a - 1) * np.log(floor) - (b - 1) * np.log1p(-floor)


def refuted_at(outcomes, floor):
    """After how many of `outcomes` (1: hit) "the chance of a hit is at least `floor`" is refuted; None if it
    never is. The capital falls with each hit, so it is looked at after the misses alone."""
    outcomes = np.asarray(outcomes, dtype=bool)
    at = np.flatnonzero(~outcomes)
    misses = np.arange(1, len(at) + 1)
    beyond = np.flatnonzero(log_capital(at + 1 - misses, misses, floor) >= -np.log(ALPHA))
    return int(at[beyond[0]]) + 1 if len(beyond) else None


def noticed_after(chance, floor, most=100_000):
    """After how many outcomes the claim of at least `floor` is refuted in half of all cases if the chance of
    a hit is `chance`, below it; None if that takes more than `most`.

    Exact: the chances of all numbers of misses are carried from outcome to outcome, those that refute are
    taken out, and counted."""
    alive, refuted, limit = np.ones(1), 0.0, 1  # alive[k]: k misses and not refuted yet
    for count in range(1, most + 1):
        alive = np.append(alive * chance, 0.0) + np.append(0.0, alive * (1 - chance))
        # The least number of misses that refutes. It never falls as the outcomes grow in number.
        while limit <= count and log_capital(count - limit, limit, floor) < -np.log(ALPHA):
            limit += 1
        refuted += alive[limit:].sum()
        alive = alive[:limit]
        if refuted >= 0.5:
            return count
    return None


def confidence_interval(hits, misses):
    """The interval of a confidence sequence after so many hits and misses, integer arrays [n] -> float64
    [n, 2]: the chances of a hit that they do not refute, for a gambler who thinks of them by Jeffreys'
    Beta(1/2, 1/2).

    A chance m is refuted once the average likelihood is 1 / alpha times its own. The likelihood falls on both
    sides of hits / n, so each end is found by halving, to the last digit on the safe side."""
    hits, misses = np.asarray(hits), np.asarray(misses)
    least = betaln(hits + 0.5, misses + 0.5) - betaln(0.5, 0.5) + np.log(ALPHA)
    mode, ends = hits / (hits + misses), []
    for end in (0.0, 1.0):
        kept, refuted = mode, np.full(len(mode), end)
        for _ in range(HALVINGS):
            middle = (kept + refuted) / 2
            good = xlogy(hits, middle) + xlog1py(misses, -middle) > least
            kept, refuted = np.where(good, middle, kept), np.where(good, refuted, middle)
        ends.append(refuted)
    return np.stack(ends, axis=1)
