"""Tests of a recall or a specificity that may be looked at after every patient, for as long as one likes.

The capital of a gambler who bets against a claim grows beyond 1 / alpha with a chance of at most alpha, at
any time, if the claim is true (Ville 1939). So a claim is refuted when that happens, and all claims not
refuted so far make up a confidence sequence (Waudby-Smith and Ramdas 2024, doi:10.1093/jrsssb/qkad009;
Podkopaev and Ramdas 2022, arXiv:2110.06177). Outcomes are 0 or 1, so the capital is a ratio of likelihoods,
averaged over what the gambler thinks possible (Robbins 1970, doi:10.1214/aoms/1177696786); both have closed
forms.
"""

import numpy as np
from scipy.special import betainc, betaln

ALPHA = 0.05
WIDTH = 0.25  # the gambler thinks of recalls down to this far below the floor, all alike


def log_capital(hits, misses, floor):
    """Log of the capital against "the chance of a hit is at least `floor`", after so many hits and misses
    (arrays). The average over r, uniform in [floor - WIDTH, floor], of the likelihood ratio of r to `floor`;
    it is a supermartingale for every chance >= floor, since each ratio falls with each hit."""
    low, a, b = max(0.0, floor - WIDTH), np.asarray(hits) + 1.0, np.asarray(misses) + 1.0
    mass = np.maximum(betainc(a, b, floor) - betainc(a, b, low), 1e-300)
    log_mixture = betaln(a, b) + np.log(mass) - np.log(floor - low)
    return log_mixture - (a - 1) * np.log(floor) - (b - 1) * np.log1p(-floor)


def refuted_at(outcomes, floor, alpha=ALPHA):
    """After how many of `outcomes` (1: hit) "the chance of a hit is at least `floor`" is refuted; None if it
    never is."""
    hits = np.cumsum(outcomes)
    capital = log_capital(hits, np.arange(1, len(hits) + 1) - hits, floor)
    beyond = np.flatnonzero(capital >= -np.log(alpha))
    return int(beyond[0]) + 1 if len(beyond) else None


def confidence_sequence(outcomes, alpha=ALPHA, grid=2000):
    """Intervals [n, 2] for the chance of a hit after each of n outcomes, all of them right at once with a
    probability of at least 1 - alpha if that chance stays the same: the chances m that all outcomes so far do
    not refute, for a gambler who thinks of them by Jeffreys' Beta(1/2, 1/2), widened to a grid."""
    hits = np.cumsum(outcomes)[:, None]
    misses = np.arange(1, len(hits) + 1)[:, None] - hits
    m = np.linspace(0, 1, grid + 1)[1:-1]
    log_mixture = betaln(hits + 0.5, misses + 0.5) - betaln(0.5, 0.5)
    kept = log_mixture - hits * np.log(m) - misses * np.log1p(-m) < -np.log(alpha)  # (n, grid - 1)
    low = np.where(kept.any(1), m[kept.argmax(1)], np.nan) - 1 / grid
    high = np.where(kept.any(1), m[len(m) - 1 - kept[:, ::-1].argmax(1)], np.nan) + 1 / grid
    return np.stack([low.clip(min=0), high.clip(max=1)], axis=1)
