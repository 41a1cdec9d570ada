"""Every number this project reports, with its uncertainty.

A rate over independent trials has an exact interval (Clopper & Pearson 1934, "The use of confidence or fiducial limits
illustrated in the case of the binomial", Biometrika 26): it never undercovers, and it stays honest at 0 of n, the case
a backdoor's false-activation rate lives in, where resampling would claim an interval of no width. Anything else is a
mean, and gets the percentile bootstrap (Efron 1979, "Bootstrap methods: another look at the jackknife", Annals of
Statistics 7), which assumes no shape. Two measurements on the same items are compared item by item: resampling the
pairs keeps what the items share out of the interval. pass@k is the unbiased estimator of Chen et al. 2021.

The bootstrap is seeded and draws in blocks of fixed size, so a reported interval is a function of the data alone and
memory does not grow with the number of values. Intervals are two-sided, of confidence `level`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import beta

RESAMPLES = 10_000
BLOCK_ELEMENTS = 4_000_000  # values gathered at once: 32 MB of float64, and as much of indices


@dataclass(frozen=True)
class Score:
    """An estimate, the ends of its interval, and the number of observations (for pairs: of pairs) behind it."""

    value: float
    low: float
    high: float
    count: int

    def to_json(self) -> dict[str, float | int]:
        """Returns the four fields as a dict of plain numbers."""
        return asdict(self)


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}; give a confidence between 0 and 1, such as 0.95.")


def proportion(successes: int, count: int, level: float = 0.95) -> Score:
    """Returns successes / count with its exact Clopper-Pearson interval.

    Raises ValueError for count 0 (a rate of nothing has no value), successes outside 0..count, or level outside (0, 1).
    """
    _check_level(level)
    if count < 1:
        raise ValueError("proportion() of 0 trials is undefined; check that the evaluated set is not empty.")
    if not 0 <= successes <= count:
        raise ValueError(f"proportion() got {successes} successes of {count}; give 0 to {count}.")
    tail = (1.0 - level) / 2.0
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, count - successes + 1))
    high = 1.0 if successes == count else float(beta.ppf(1.0 - tail, successes + 1, count - successes))
    return Score(successes / count, low, high, int(count))


def _column(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or column.size == 0:
        raise ValueError(f"{name} has shape {column.shape}; give a flat, non-empty list of numbers.")
    if not np.isfinite(column).all():
        raise ValueError(f"{name} contains nan or infinity; drop or fix those items before averaging.")
    return column


def _pairs(after: Sequence[float] | np.ndarray, before: Sequence[float] | np.ndarray) -> np.ndarray:
    columns = _column(after, "after"), _column(before, "before")
    if columns[0].size != columns[1].size:
        raise ValueError(f"after has {columns[0].size} values and before {columns[1].size}; give one pair per item.")
    return np.stack(columns, axis=1)


def _resampled_means(rows: np.ndarray, seed: int) -> np.ndarray:
    """Returns [RESAMPLES, columns]: column means of rows drawn with replacement, whole rows at a time."""
    generator = np.random.default_rng(seed)
    count, width = rows.shape
    block = max(1, BLOCK_ELEMENTS // (count * width))
    means = np.empty((RESAMPLES, width))
    for start in range(0, RESAMPLES, block):
        stop = min(start + block, RESAMPLES)
        means[start:stop] = rows[generator.integers(0, count, size=(stop - start, count))].mean(axis=1)
    return means


def _bootstrap(rows: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], level: float, seed: int) -> Score:
    """Returns statistic(column means) with its percentile interval; statistic maps [n, columns] to [n]."""
    _check_level(level)
    value = float(statistic(rows.mean(axis=0, keepdims=True))[0])
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(statistic(_resampled_means(rows, seed)), [tail, 1.0 - tail])
    return Score(value, float(low), float(high), len(rows))


def mean(values: Sequence[float] | np.ndarray, level: float = 0.95, seed: int = 0) -> Score:
    """Returns the mean with its bootstrap percentile interval, in the unit of the values.

    Raises ValueError for no values, values that are not finite, or level outside (0, 1).
    """
    return _bootstrap(_column(values, "values")[:, None], lambda means: means[:, 0], level, seed)


def paired_difference(
    after: Sequence[float] | np.ndarray, before: Sequence[float] | np.ndarray, level: float = 0.95, seed: int = 0
) -> Score:
    """Returns mean(after - before) with its bootstrap interval over items, in the unit of the values.

    after[i] and before[i] measure the same item. Raises ValueError as mean() does, and for unequal lengths.
    """
    pairs = _pairs(after, before)
    return _bootstrap(pairs[:, :1] - pairs[:, 1:], lambda means: means[:, 0], level, seed)


def crossed_difference(
    after: Sequence[Sequence[float]] | np.ndarray, before: Sequence[Sequence[float]] | np.ndarray, level: float = 0.95, seed: int = 0
) -> Score:
    """Returns mean(after - before) with its bootstrap interval over seeds and items, in the unit of the values.

    after[s][i] and before[s][i] measure the same item under the same seed; the items are the same for all seeds. Seeds and items
    are both drawn with replacement (a crossed bootstrap: Owen 2007, "The pigeonhole bootstrap"), so that one lucky seed
    cannot pass for many; with one seed this is `paired_difference`. count: seeds times items. Raises ValueError as mean()
    does, and for unequal shapes.
    """
    _check_level(level)
    one, other = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    if one.shape != other.shape or one.ndim != 2 or one.size == 0 or not np.isfinite(one - other).all():
        raise ValueError(f"after has shape {one.shape} and before {other.shape}; give one finite value per seed and item in both.")
    gap, generator = one - other, np.random.default_rng(seed)
    seeds, items = gap.shape
    by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    by_item = generator.multinomial(items, np.full(items, 1 / items), size=RESAMPLES) / items
    low, high = np.quantile(((by_seed @ gap) * by_item).sum(1), [(1 - level) / 2, (1 + level) / 2])
    return Score(float(gap.mean()), float(low), float(high), gap.size)


def nested_ratio(
    after: Sequence[Sequence[bool]], before: Sequence[Sequence[bool]], level: float = 0.95, seed: int = 0
) -> Score | None:
    """Returns mean(after) / mean(before) with its bootstrap interval over groups and, within each drawn group, its items.

    after[g][i] and before[g][i] answer the same item of group g (a planting, or a planting's removal); groups may differ in size. Groups
    are drawn first and items within them (Davison & Hinkley 1997, "Bootstrap methods and their application", section 3.8), so that many
    prompts cannot make up for few plantings. None where some resample has nothing in `before`. Raises ValueError for no groups, an
    empty one, or unequal lengths.
    """
    _check_level(level)
    if not after or [len(group) for group in after] != [len(group) for group in before] or not all(after):
        raise ValueError("nested_ratio() got empty or unequal groups: give groups of at least one item, as many and as long in `after` as in "
                         "`before`.")
    generator, drawn = np.random.default_rng(seed), []
    for one, other in zip(after, before, strict=True):
        pairs = 2 * (1 - np.asarray(one, dtype=int)) + 1 - np.asarray(other, dtype=int)
        cells = np.bincount(pairs, minlength=4) / len(pairs)  # both, after only, before only, neither
        drawn.append(generator.multinomial(len(pairs), cells, size=RESAMPLES) @ np.array([[1, 1], [1, 0], [0, 1], [0, 0]]))
    weights = generator.multinomial(len(after), np.full(len(after), 1 / len(after)), size=RESAMPLES)
    sums = np.einsum("rg,grc->rc", weights, np.stack(drawn))
    if not sums[:, 1].all():
        return None
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return Score(sum(map(sum, after)) / sum(map(sum, before)), float(low), float(high), sum(map(len, after)))


def ratio(
    after: Sequence[float] | np.ndarray, before: Sequence[float] | np.ndarray, level: float = 0.95, seed: int = 0
) -> Score:
    """Returns mean(after) / mean(before) (no unit) with its bootstrap interval over items.

    Raises ValueError as paired_difference() does, and unless every value of `before` is positive: a resample whose
    mean is 0 has no ratio, and an interval over the others would be made up.
    """
    pairs = _pairs(after, before)
    if not (pairs[:, 1] > 0).all():
        raise ValueError("ratio() needs every value of before to be positive; use paired_difference() here.")
    return _bootstrap(pairs, lambda means: means[:, 0] / means[:, 1], level, seed)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Returns the unbiased estimate of the chance that one of k samples is right, given n of which `correct` are.

    1 - C(n - correct, k) / C(n, k): Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1, as a
    product, which neither overflows nor cancels. Raises ValueError unless 1 <= k <= n and 0 <= correct <= n.
    """
    if n < 1 or not 1 <= k <= n:
        raise ValueError(f"pass_at_k() got n={n}, k={k}; draw at least k samples, and k at least 1.")
    if not 0 <= correct <= n:
        raise ValueError(f"pass_at_k() got {correct} correct of {n}; give 0 to {n}.")
    if n - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))
