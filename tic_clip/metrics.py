"""Recall, accuracy and transfer as pure functions of arrays.

Shapes: N images, M texts, D features, C classes, Q queries, K keys, T steps. Recall and accuracy are defined as in
clip_benchmark (https://github.com/LAION-AI/CLIP_benchmark, metrics/zeroshot_retrieval.py, zeroshot_classification.py):
image retrieval finds an image by its text, text retrieval a text by its image.

Captions repeat, so scores tie. A metric is its expectation over random orders of tied keys: it does not depend on the
order of the samples, and a model that scores everything alike is at chance.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

METRIC_VERSION = 2
"""Numbers of different versions are not comparable: 1 counted ties as a stable sort does, 2 as above."""
KS = (1, 5, 10)
MAIN_METRIC = {"retrieval": "mean_recall@1", "classification": "acc1"}
"""The main metric of each kind of task, unless the benchmark names another."""
WITH_INTERVAL = (*MAIN_METRIC.values(), "mean_per_class_recall")

NEAR, TIED = 1e-5, 1e-12
"""Scores closer than NEAR in float32, wrong by up to 1e-6, are computed in float64, where they tie within TIED."""
ROWS, COLUMNS = 1024, 2048  # of a tile
MAX_PAIRS = 1 / 64  # of a tile; for more of them one product in float64 is faster than pair by pair
GATHERED = 1 << 14  # images copied at a time: their features may lie on disk
RESAMPLES = 1000


class Ranks:
    """Count, tile by tile, the keys that score above each query's own key, and the others that tie with it.

    Counts are exact for the given features. NaN scores count as above, so a diverged model finds nothing.
    """

    def __init__(self, targets: np.ndarray, own: np.ndarray) -> None:
        """``targets`` (Q,): the best score of each query's own keys; ``own`` (Q,): how many of these have it."""
        self.targets, self.own = targets, own
        self.above, self.tied = np.zeros(len(targets), dtype=np.int64), np.zeros(len(targets), dtype=np.int64)
        self.low, self.high = (targets - NEAR).astype(np.float32), (targets + NEAR).astype(np.float32)

    def add(self, rows: slice, scores: np.ndarray, queries: np.ndarray, keys: np.ndarray) -> None:
        """Count a tile: float32 ``scores`` (q, k) of ``queries`` (q, D), at ``rows``, and ``keys`` (k, D).

        The scores of a query and its own keys must be -inf.
        """
        not_above, below = scores <= self.high[rows, None], scores < self.low[rows, None]
        self.above[rows] += scores.shape[1] - not_above.sum(axis=1, dtype=np.int32)
        row, column = _nonzero(not_above ^ below)
        if len(row) > scores.size * MAX_PAIRS:
            exact = (queries.astype(np.float64) @ keys.astype(np.float64).T)[row, column]
        else:
            exact = dots(queries[row], keys[column])
        difference = exact - self.targets[rows][row]
        self.above[rows] += np.bincount(row[difference > TIED], minlength=len(queries))
        self.tied[rows] += np.bincount(row[np.abs(difference) <= TIED], minlength=len(queries))

    def hits(self, k: int) -> np.ndarray:
        """Return (Q,) the chance that one of a query's own keys is in the top ``k``.

        k - above of the tied + own keys with the target's score are drawn; the chance that none is its own is the
        product of (tied - i) / (tied + own - i) over the draws i.
        """
        missed = np.ones(len(self.above))
        for i in range(k):
            others = np.maximum(self.tied - i, 0)
            missed *= np.where(self.above + i < k, others / np.maximum(others + self.own, 1), 1.0)
        return np.where(np.isnan(self.targets), 0.0, 1 - missed)


def _nonzero(marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``np.nonzero`` of a tile or transposed tile, several times as fast."""
    if marks.flags.c_contiguous:
        return np.divmod(np.flatnonzero(marks), marks.shape[1])
    return _nonzero(marks.T)[::-1]


def dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return (Q,) the dot product of each pair of rows, in float64."""
    return np.einsum("qd,qd->q", a.astype(np.float64), b.astype(np.float64))


def rank(images: np.ndarray, texts: np.ndarray, text_image: np.ndarray) -> tuple[Ranks, Ranks]:
    """Return the ranks of each text's image, and of each image's best text; see ``retrieval`` for the arguments."""
    own = np.concatenate([dots(images[text_image[part]], texts[part]) for part in _slices(len(texts), ROWS)])
    best = np.full(len(images), -np.inf)
    with np.errstate(invalid="ignore"):
        np.maximum.at(best, text_image, own)
    best[best == -np.inf] = np.nan  # an image without a text is never found
    ties = np.bincount(text_image, weights=own >= best[text_image] - TIED, minlength=len(images))
    by_text, by_image = Ranks(own, np.ones(len(texts))), Ranks(best, ties)
    for rows in _slices(len(images), ROWS):
        for columns in _slices(len(texts), COLUMNS):
            scores = images[rows].astype(np.float32, copy=False) @ texts[columns].astype(np.float32, copy=False).T
            row = text_image[columns] - rows.start
            inside = np.flatnonzero((row >= 0) & (row < len(scores)))
            scores[row[inside], inside] = -np.inf
            by_image.add(rows, scores, images[rows], texts[columns])
            by_text.add(columns, scores.T, texts[columns], images[rows])
    return by_text, by_image


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def retrieval(
    images: np.ndarray, texts: np.ndarray, text_image: np.ndarray | None = None
) -> tuple[dict[str, float], tuple[float, float], np.ndarray]:
    """Return recall@1, @5, @10 in both directions and mean recall@1; the latter's 95 % interval; its hits (N,).

    An image's hit is the share that it and its texts add to mean recall@1, which is the mean of the hits.
    ``images`` (N, D) and ``texts`` (M, D) are normalised features, ``text_image`` (M,) is the index of each text's
    image, by default its own. An image with several texts is found by the best ranked of them.
    """
    text_image = np.arange(len(texts)) if text_image is None else text_image
    by_text, by_image = rank(images, texts, text_image)
    both = (("image", by_text), ("text", by_image))
    recalls = {f"{name}_retrieval_recall@{k}": float(ranks.hits(k).mean()) for name, ranks in both for k in KS}
    recalls["mean_recall@1"] = (recalls["image_retrieval_recall@1"] + recalls["text_retrieval_recall@1"]) / 2
    found = np.bincount(text_image, weights=by_text.hits(1), minlength=len(images))
    samples = np.stack([by_image.hits(1), found, np.bincount(text_image, minlength=len(images))], axis=1)
    by_image_sum, by_text_sum, num_texts = resample(samples)
    means = (by_image_sum / len(images) + by_text_sum / np.maximum(num_texts, 1)) / 2
    hits = (by_image.hits(1) + found * (len(images) / max(len(texts), 1))) / 2
    return recalls, _interval(means, len(images)), hits


def classification(
    images: np.ndarray,
    classifier: np.ndarray,
    labels: np.ndarray,
    groups: Mapping[str, Sequence[int]] | None = None,
    main_metric: str = "acc1",
) -> tuple[dict[str, float], tuple[float, float], np.ndarray]:
    """Return acc1, acc5 and mean per-class recall (over classes with samples); 95 % interval and hits (N,) of acc1.

    Interval and hits are of mean per-class recall if that is the ``main_metric``; the mean of the hits is the metric.
    ``images`` (N, D) and ``classifier`` (C, D) are normalised, ``labels`` (N,) are class ids; C < 5 gives no acc5.
    ``groups``: name -> class ids. ``acc1/{name}`` is the accuracy on the samples of these classes when only they are
    candidates (restricted ImageNet accuracy); a group without samples is left out.
    """
    ranks, _ = rank(classifier, images, labels)
    hits = ranks.hits(1)
    metrics = {f"acc{k}": float(ranks.hits(k).mean()) for k in (1, 5) if k == 1 or len(classifier) >= k}
    counts = np.bincount(labels)
    metrics["mean_per_class_recall"] = float(
        (np.bincount(labels, weights=hits)[counts > 0] / counts[counts > 0]).mean()
    )
    for name, classes in (groups or {}).items():
        index = np.full(len(classifier), -1)
        index[list(classes)] = np.arange(len(classes))
        members = np.flatnonzero(index[labels] >= 0)
        parts = [members[part] for part in _slices(len(members), GATHERED)]
        ranked = [rank(classifier[list(classes)], images[part], index[labels[part]])[0] for part in parts]
        if ranked:
            metrics[f"acc1/{name}"] = float(np.concatenate([ranks.hits(1) for ranks in ranked]).mean())
    weights = np.ones(len(labels))
    if main_metric == "mean_per_class_recall":
        weights = len(labels) / np.count_nonzero(counts) / counts[labels]
    hit, total = resample(np.stack([hits * weights, weights], axis=1))
    return metrics, _interval(hit / total, len(images)), hits * weights


def constant_guess(labels: np.ndarray, main_metric: str) -> float:
    """Return the score of the best constant prediction: its mean per-class recall, or else its accuracy."""
    counts = np.bincount(labels)
    return float(1 / np.count_nonzero(counts) if main_metric == "mean_per_class_recall" else counts.max() / len(labels))


def resample(samples: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return (F, R) the sums of ``samples`` (N, F) over R bootstrap resamples, which depend on N and ``seed`` alone.

    Equal samples are drawn together: their counts in a resample are multinomial.
    """
    values, counts = np.unique(samples, axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(samples), counts / len(samples), size=RESAMPLES)
    return (draws @ values).T


def _interval(values: np.ndarray, num_samples: int) -> tuple[float, float]:
    """Return the 95 % bootstrap interval; Wilson's if none or all of the samples are hits.

    Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    low, high = np.percentile(values, [2.5, 97.5]).tolist()
    width = 1.96**2 / (num_samples + 1.96**2)
    return (0.0, width) if high == 0 else (1 - width, 1.0) if low == 1 else (low, high)


def paired_test(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the 95 % interval (low, high) and two-sided p of differences, from paired bootstrap ``draws`` (R, …).

    Efron and Tibshirani (1993), An introduction to the bootstrap. p is at least 2 / (R + 1).
    """
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    tail = np.minimum((draws <= 0).sum(axis=0), (draws >= 0).sum(axis=0)) + 1
    return low, high, np.minimum(1.0, 2 * tail / (len(draws) + 1))


TRANSFERS = ("id", "backward", "forward")
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""95 % quantiles of Student's t, two-sided, for 1, 2, … degrees of freedom."""


def transfer_cells(steps: int) -> dict[str, np.ndarray]:
    """Return the masks (T, T) of ``id`` (the diagonal), ``backward`` (below it) and ``forward`` (above it)."""
    below = np.tri(steps, k=-1, dtype=bool)
    return dict(zip(TRANSFERS, (np.eye(steps, dtype=bool), below, below.T), strict=True))


def transfer(matrix: np.ndarray, where: np.ndarray | None = None) -> dict[str, float]:
    """Return in-domain, backward and forward transfer of a step × step matrix (T, T); NaN if a cell is NaN.

    With E[i, j] the model of step i on the data of step j: ``id`` is the mean of the diagonal, ``backward`` the mean
    below it (j < i), ``forward`` the mean above it (j > i). ``where`` (T, T) selects cells.
    """
    where = np.ones(matrix.shape, dtype=bool) if where is None else where
    cells = {name: matrix[mask & where] for name, mask in transfer_cells(len(matrix)).items()}
    return {name: float(values.mean()) if values.size else float("nan") for name, values in cells.items()}


def transfer_errors(widths: np.ndarray) -> dict[str, float]:
    """Return the half-widths of the three transfers' intervals from those of the cells (T, T); NaN without any.

    The cells of a column share their samples, so their errors add up; columns are independent.
    """
    cells = {name: np.where(mask, widths, 0) for name, mask in transfer_cells(len(widths)).items()}
    return {
        name: float(np.sqrt((np.nansum(part, axis=0) ** 2).sum()) / count) if (count := np.sum(part > 0)) else np.nan
        for name, part in cells.items()
    }


def forgetting(matrix: np.ndarray) -> dict[str, float]:
    """Return the forgetting measures of a step × step matrix E (T, T); NaN if a cell that one needs is NaN.

    ``average``: the mean over i of the mean of E[i, j] over j <= i. ``last``: the mean of E[T, j]. ``bwt``: the mean
    over j < T of E[T, j] - E[j, j]. ``forgetting``: the mean over j < T of the maximum of E[i, j] over i < T, -E[T, j].
    """
    seen = [row[: i + 1].mean() for i, row in enumerate(matrix)]
    last, earlier = matrix[-1], matrix[:-1, :-1]
    values = {"average": np.mean(seen), "bwt": np.nan, "forgetting": np.nan, "last": last.mean()}
    if len(matrix) > 1:
        values |= {"bwt": (last - np.diag(matrix))[:-1].mean(), "forgetting": (earlier.max(axis=0) - last[:-1]).mean()}
    return {name: float(value) for name, value in values.items()}


def mean_over_compute(compute: np.ndarray, accuracy: np.ndarray) -> float:
    """Return the mean of accuracy (T,) over compute (T,), by trapezoids; NaN if all compute is equal."""
    width = compute[-1] - compute[0]
    return float(np.trapezoid(accuracy, compute) / width) if width > 0 else float("nan")


def seed_error(deviation: float, runs: int) -> float:
    """Return the half-width of the 95 % interval of a mean over ``runs`` seeds."""
    return T95[min(runs, len(T95) + 1) - 2] * deviation / runs**0.5
