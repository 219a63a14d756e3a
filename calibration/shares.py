"""At which shares of its classes is a batch of images like those of validation? Tests under label shift.

Label shift (Lipton et al. 2018, arXiv:1802.03916): the images of each class are as before, only the classes'
shares are others. For given shares, as many validation images of each class are drawn, by their true
labels, as chance would have at these shares. They and the batch are then exchangeable, so permutation tests
are exact, whatever the model makes of the images. Which shares are tried is learnt from the batch: for two
classes, all on a grid that a test of the mean scores at level OUTSIDE does not exclude. The greatest p-value
over these, plus OUTSIDE, is valid for unknown shares (Berger and Boos 1994, JASA 89:1012).

For more classes, the shares tried are estimates from resampled validation images and batches (a bootstrap),
a cloud that spreads as the estimate does; simulation shows the level. In a table, a person may have several
findings. Then the share of one finding at a time may differ, or of people with any: all combinations of
findings would be too many shares to try, and validation has too few images of most.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls
from scipy.spatial.distance import cdist
from scipy.special import bdtr, bdtrc
from scipy.stats import betabinom, norm, rankdata

LEVEL = 0.05  # of all tests together
OUTSIDE = 0.001  # chance that the true shares are not among those tried
SHORT = 0.001  # chance that validation has too few images of a class for a draw
STEP = 0.25  # of the grid of shares, in standard errors of a batch's share
EVERY = 4  # shares of the grid from one on which all tests are made to the next
CLOUD = 60  # estimates of the shares of three classes or more
RARE = 5  # a class of fewer validation images has no share of its own
ODD = 0.01  # the share of validation images beyond the limit of odd ones
ODD_NEEDS = 99  # validation images that it takes: the oddest of n has typicality 1 / (n + 1)
DRAWS = 999  # of the permutation tests
FIRST = 99  # of these, after which a p-value above CLEAR is left as it is
CLEAR = 0.2
TESTS = ("odd", "features", "scores")


# ---------------------------------------------------------------- tests


def odd_test(odd, n, validated, rank=None):
    """P(at least `odd` of n images are odd), if they are drawn like `validated` validation images, none tied:
    beta-binomial, since the limit is the rank-th largest distance of validation; by default the ODD largest.
    None if validation is too small for any image to be odd."""
    rank = int(ODD * (validated + 1)) if rank is None else rank
    if not 1 <= rank <= validated:
        return None
    return 1.0 if odd == 0 else float(betabinom.sf(odd - 1, n, rank, validated + 1 - rank))


def gaussian_kernel(values):
    """Values [N, D] -> float32 [N, N]: exp(-d^2 / median of d^2)."""
    squared = cdist(values, values, "sqeuclidean")
    return np.exp(-squared / max(np.median(squared), 1e-12)).astype(np.float32)


def two_sample_test(kernel, new, draws=None, seed=0):
    """Whether the images `new` (bool [N]) and the others come from one distribution: the p-value of a
    permutation test of the squared maximum mean discrepancy under kernel float [N, N] (Gretton et al. 2012,
    JMLR 13:723). None if one side has fewer than two images."""
    n_new = int(new.sum())
    n_known = len(new) - n_new
    if min(n_known, n_new) < 2:
        return None
    weights = np.where(new, 1 / n_new, -1 / n_known).astype(np.float32)
    rng, draws = np.random.default_rng(seed), draws or DRAWS
    least = float(weights @ kernel @ weights) * (1 - 1e-5)  # what is equal up to rounding counts as a tie

    def exceeding(count):
        mixed = rng.permuted(np.tile(weights, (count, 1)), axis=1).T  # (N, count)
        return int((((kernel @ mixed) * mixed).sum(axis=0) >= least).sum())

    # A p-value that is large after a few draws decides nothing. Smaller ones get all draws.
    first = min(FIRST, draws)
    found = exceeding(first)
    if (1 + found) / (1 + first) > CLEAR or first == draws:
        return (1 + found) / (1 + first)
    return (1 + found + exceeding(draws - first)) / (1 + draws)


class Pool:
    """Validation images [M] and a batch [n] side by side: what the tests compare of them.

    distances [M + n]: from the training images; samples: {name: values [M + n, D]}. The kernels are
    computed once, for all shares."""

    def __init__(self, distances, samples, M):
        self.distances, self.M, self.n = distances, M, len(distances) - M
        self.kernels = {name: gaussian_kernel(values) for name, values in samples.items()}
        self.batch = np.arange(M, M + self.n)

    def odd(self, chosen):
        """The test of the share of odd images against `chosen` validation images."""
        if self.M < ODD_NEEDS or not len(chosen):
            return None
        rank = max(1, int(ODD * (len(chosen) + 1)))
        limit = np.sort(self.distances[chosen])[-rank]
        return odd_test(int((self.distances[self.batch] > limit).sum()), self.n, len(chosen), rank)

    def tests(self, chosen, enough=0.0):
        """{test: p-value or None} of the batch against validation images `chosen` (positions). The first test
        whose p-value is at most `enough` is the last one made."""
        both = np.concatenate([chosen, self.batch])
        new, found = np.arange(len(both)) >= len(chosen), {"odd": self.odd(chosen)}
        for seed, (name, kernel) in enumerate(self.kernels.items()):
            if any(p is not None and p <= enough for p in found.values()):
                break
            found[name] = two_sample_test(kernel[np.ix_(both, both)], new, seed=seed)
        return found


def joint(tests):
    """One p-value of the tests together (Bonferroni); None if no test could be made."""
    known = [p for p in tests.values() if p is not None]
    return min(1.0, len(TESTS) * min(known)) if known else None


# ---------------------------------------------------------------- whose share may differ


class Question(NamedTuple):
    """A division of people into groups, the shares of which may differ.

    people: whom the shares count, as text; groups: their names; labels int [M]: the true group of each
    validation image, -1 unknown; values float [M + n, k]: ranks of scores that tell the groups apart, in
    (0, 1)."""

    people: str
    groups: tuple
    labels: np.ndarray
    values: np.ndarray


def kinds(task, targets):
    """The columns of labels that `questions` asks about, int16 [N, G]: softmax: the class; sigmoid: whether
    there is any finding, then each finding (1 present, 0 absent). -1 unknown."""
    targets = np.asarray(targets)
    if task.kind == "softmax":
        return targets[:, None].astype(np.int16)
    truth = task.truth(targets).astype(np.int16)
    if truth.shape[1] == 1 or task.findings != task.classes:  # "any finding" is there already
        return truth
    absent = np.where((truth == 0).all(axis=1), 0, -1)
    any_of_them = np.where((truth == 1).any(axis=1), 1, absent)
    return np.concatenate([any_of_them[:, None], truth], axis=1).astype(np.int16)


def questions(task, labels, scores):
    """The Questions that validation can answer: labels int [M, G] of `kinds`, scores float [M + n, F] of
    task.scores. A class with fewer than RARE images has no share of its own: it is counted with the most
    frequent one."""
    ranks = rankdata(scores, axis=0) / (len(scores) + 1)
    found = []
    if task.kind == "softmax":
        people = "sick people" if len(task.classes) == 2 else "each class"
        found.append(Question(people, task.classes, labels[:, 0], ranks))
    else:
        findings = list(task.findings)
        if labels.shape[1] > len(findings):  # without "No Finding", the greatest score tells of any finding
            ranks = np.concatenate([rankdata(scores.max(axis=1))[:, None] / (len(scores) + 1), ranks], axis=1)
            findings = ["any finding", *findings]
        for k, name in enumerate(findings):
            groups = (f"no {name}", name)
            found.append(Question(f"people with {name}", groups, labels[:, k], ranks[:, [k]]))
    return [q for q in map(_without_rare, found) if q is not None]


def _without_rare(question):
    """The Question after rare groups have joined the most frequent one; None if fewer than two are left."""
    counts = np.bincount(question.labels[question.labels >= 0], minlength=len(question.groups))
    frequent = counts >= RARE
    if frequent.sum() < 2:
        return None
    number = np.cumsum(frequent) - 1
    number[~frequent] = number[counts.argmax()]
    labels = np.where(question.labels >= 0, number[question.labels], -1)
    groups = tuple(name for name, kept in zip(question.groups, frequent) if kept)
    return question._replace(groups=groups, labels=labels)


# ---------------------------------------------------------------- shares to try


def most(shares, sizes):
    """How many images can be drawn in these shares from groups of these sizes, without running short with a
    chance above SHORT."""
    counts = np.arange(1, sum(sizes) + 1)
    enough = np.ones(len(counts), dtype=bool)
    for share, size in zip(shares, sizes):
        short = bdtrc(size, np.maximum(counts, size + 1), share)  # P(binomial count > size)
        enough &= (counts <= size) | (short <= SHORT / len(sizes))
    return int(enough.sum())  # the chance of running short rises with the count


def subsample(shares, orders, chances):
    """Positions of validation images, drawn without replacement: multinomial counts with `shares` [K].

    orders: the positions of each group, in random order; chances float [K]: uniform numbers that decide the
    counts. With the same orders and chances, near shares give almost the same images."""
    left, rest, chosen = most(shares, [len(o) for o in orders]), 1.0, []
    for share, order, chance in zip(shares[:-1], orders, chances):
        count = 0
        if left and rest > 0:
            below = bdtr(np.arange(left), left, min(1.0, share / rest))  # P(binomial count <= 0, 1, ...)
            count = min(int((below < chance).sum()), len(order))
        chosen.append(order[:count])
        left, rest = left - count, rest - share
    chosen.append(orders[-1][:left])
    return np.concatenate(chosen).astype(int)


def mean_test(values, chosen, batch):
    """Whether rows `chosen` and `batch` of values [N, k] have one mean: a permutation test of each column by
    its normal approximation, Bonferroni over the columns."""
    a, b = values[chosen], values[batch]
    both = np.concatenate([a, b])
    spread = both.std(axis=0, ddof=1) * np.sqrt(1 / len(a) + 1 / len(b))
    z = np.abs(a.mean(axis=0) - b.mean(axis=0)) / np.maximum(spread, 1e-12)
    return min(1.0, float(values.shape[1] * 2 * norm.sf(z).min()))


def shares_test(values, orders, batch, shares):
    """Whether the batch's mean values are those of validation's groups, mixed with shares [S, K]: p-values
    [S] of a z-test of each column, Bonferroni over the columns. orders: the positions of each group."""
    means = np.stack([values[o].mean(axis=0) for o in orders])  # (K, k)
    variances = np.stack([values[o].var(axis=0, ddof=1) for o in orders])
    sizes = np.array([len(o) for o in orders])[:, None]
    expected = shares @ means  # (S, k)
    of_one = shares @ (variances + means**2) - expected**2  # the variance of one image of the mixture
    variance = shares**2 @ (variances / sizes) + of_one / len(batch)
    z = np.abs(values[batch].mean(axis=0) - expected) / np.sqrt(np.maximum(variance, 1e-12))
    return (values.shape[1] * 2 * norm.sf(z).min(axis=1)).clip(max=1.0)


def grid(count):
    """Shares in [0, 1], STEP standard errors of the share among `count` people apart."""
    steps = int(np.ceil(np.pi * np.sqrt(count) / STEP))
    return np.sin(np.linspace(0, np.pi / 2, steps + 1)) ** 2


def estimate(values, labels, batch):
    """The shares [K] whose mixture of validation's group means is nearest to the batch's mean values."""
    groups = np.arange(labels.max() + 1)
    means = np.stack([values[: len(labels)][labels == k].mean(axis=0) for k in groups], axis=1)
    system = np.concatenate([means, np.full((1, len(groups)), 1e3)])  # the last row: they add up to 1
    shares = nnls(system, np.append(values[batch].mean(axis=0), 1e3))[0]
    return shares / shares.sum()


def cloud(question, orders, batch, rng):
    """The estimated shares, and CLOUD estimates from resampled images: float [1 + CLOUD, K]."""
    labels = np.repeat(np.arange(len(orders)), [len(o) for o in orders])
    found = []
    for i in range(1 + CLOUD):
        rows = [*orders, batch] if i == 0 else [rng.choice(o, len(o)) for o in (*orders, batch)]
        values = question.values[np.concatenate(rows)]
        found.append(estimate(values, labels, np.arange(len(labels), len(values))))
    return np.array(found)


# ---------------------------------------------------------------- the search


class Found(NamedTuple):
    """tests: {name: p-value} at the shares at which the batch is most like validation; p_joint: over all
    shares, above CLEAR that of the first such shares; spans [K, 2]: of each group's share."""

    tests: dict
    p_joint: float
    spans: np.ndarray


def search(question, pool, seed=0):
    """The Found of a Question and a Pool. `seed` decides which validation images are drawn."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(np.flatnonzero(question.labels == k)) for k in range(len(question.groups))]
    chances, two = rng.random(len(orders)), len(orders) == 2
    if two:
        second = grid(min(pool.n, sum(map(len, orders))))
        shares = np.stack([1 - second, second], axis=1)
    else:
        shares = cloud(question, orders, pool.batch, rng)

    # A quick test says which shares are worth the other tests.
    quick = shares_test(question.values, orders, pool.batch, shares)
    inside, spans = np.flatnonzero(quick > OUTSIDE), _spans(shares, quick, two)
    if two:
        inside = inside[(len(inside) - 1) % EVERY // 2 :: EVERY]

    # The likeliest shares come first: one that explains the batch ends the search.
    p, chosen, tests = 0.0, subsample(shares[quick.argmax()], orders, chances), {}
    for i in inside[np.argsort(-quick[inside], kind="stable")]:
        drawn = subsample(shares[i], orders, chances)
        found = pool.tests(drawn, enough=(LEVEL - OUTSIDE - SHORT) / len(TESTS))
        here = joint(found)
        if here is not None and here > p:
            p, chosen, tests = here, drawn, found
        if p > CLEAR:
            break
    if set(tests) != set(TESTS):  # a rejected share was left after the first test that rejected it
        tests = pool.tests(chosen, enough=-1.0)
    return Found(tests, min(1.0, p + OUTSIDE + SHORT), spans)


def _spans(shares, quick, is_grid):
    """A span of each group's share. On a grid: the 95% interval, between the last shares excluded on either
    side. Else the range of the cloud."""
    if not is_grid:
        return np.stack([shares.min(axis=0), shares.max(axis=0)], axis=1)
    inside = np.flatnonzero(quick > LEVEL)
    inside = inside if len(inside) else np.array([quick.argmax()])
    lo, hi = max(0, inside[0] - 1), min(len(shares) - 1, inside[-1] + 1)
    return np.sort(shares[[lo, hi]], axis=0).T
