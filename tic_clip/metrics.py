"""Recall, accuracy and transfer: arrays in, floats out. No model, no loader, no file.

Shapes: N images, M texts, D features, C classes, Q queries, K keys, T steps. Recall and accuracy follow
clip_benchmark's definitions (https://github.com/LAION-AI/CLIP_benchmark, metrics/zeroshot_retrieval.py and
zeroshot_classification.py); its names for the two directions are kept: image retrieval looks an image up by its text,
text retrieval a text by its image.

**Ties.** Captions repeat, so scores do. Keys that tie stand in random order, and a figure is its expectation: it does
not depend on the order of the samples, and a model that gives all the same score is as good as chance. Where no scores
tie it is clip_benchmark's, whose top-k takes ties in any order.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

METRIC_VERSION = 2
"""Numbers of different versions are not comparable: 1 counted ties as a stable sort does, 2 as above."""
KS = (1, 5, 10)
MAIN_METRIC = {"retrieval": "mean_recall@1", "classification": "acc1"}
"""The metric of each kind of task that stands in the matrix."""

NEAR, TIED = 1e-5, 1e-12
"""Scores that differ by less than ``NEAR`` in float32 are computed again in float64; within ``TIED`` they tie then.

Both are for features of length 1, of which float32's scores are wrong by up to about 1e-6."""
ROWS, COLUMNS = 1024, 2048  # of a tile
MANY = 1 / 64  # of a tile's pairs: above that a product in float64 is faster than pair by pair
RESAMPLES = 1000


class Ranks:
    """How many keys score above each query's own, and how many others tie with it; counted tile by tile.

    Exact for the given features: neither the size of tiles nor the order of sums in a matrix product has a part in it.
    A score that is no number counts as above, so that a diverged model finds nothing.
    """

    def __init__(self, targets: np.ndarray, own: np.ndarray, scale: float) -> None:
        """``targets`` (Q,): the best score of each query's own keys; ``own`` (Q,): how many of these have it."""
        self.targets, self.own = targets, own
        self.above, self.tied = np.zeros(len(targets), dtype=np.int64), np.zeros(len(targets), dtype=np.int64)
        self.tolerance = TIED * scale
        self.low = (targets - NEAR * scale).astype(np.float32)
        self.high = (targets + NEAR * scale).astype(np.float32)

    def add(self, which: slice, scores: np.ndarray, queries: np.ndarray, keys: np.ndarray) -> None:
        """Count a tile: ``scores`` (q, k) in float32 of ``queries`` (q, D), those of ``which``, and ``keys`` (k, D).

        The scores of a query and its own keys must be -inf in it.
        """
        not_above, below = scores <= self.high[which, None], scores < self.low[which, None]
        self.above[which] += scores.shape[1] - not_above.sum(axis=1, dtype=np.int32)
        above, tied = self._exact(not_above ^ below, self.targets[which], queries, keys)
        self.above[which] += above
        self.tied[which] += tied

    def _exact(
        self, near: np.ndarray, targets: np.ndarray, queries: np.ndarray, keys: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many of the pairs that are ``near`` (q, k) are above, and how many tie, in float64, of each query."""
        if np.count_nonzero(near) > near.size * MANY:
            scores = queries.astype(np.float64) @ keys.astype(np.float64).T
            difference = np.where(near, scores - targets[:, None], -np.inf)
            marks = difference > self.tolerance, np.abs(difference) <= self.tolerance
            return tuple(part.sum(axis=1, dtype=np.int32) for part in marks)
        rows, columns = _places(near)
        difference = dots(queries[rows], keys[columns]) - targets[rows]
        marks = difference > self.tolerance, np.abs(difference) <= self.tolerance
        return tuple(np.bincount(rows[part], minlength=len(targets)) for part in marks)

    def hits(self, k: int) -> np.ndarray:
        """(Q,) the chance that one of a query's own keys is in the top ``k``: 1 or 0 where nothing ties.

        Of the tied + own keys that share the target's score, k - above are drawn: the chance that none is its own is
        the product of (tied - i) / (tied + own - i) over the draws i.
        """
        missed = np.ones(len(self.above))
        for i in range(k):
            others = np.maximum(self.tied - i, 0)
            missed *= np.where(self.above + i < k, others / np.maximum(others + self.own, 1), 1.0)
        return np.where(np.isnan(self.targets), 0.0, 1 - missed)


def _places(marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``np.nonzero`` of a tile, or of one transposed; some times as fast."""
    if marks.flags.c_contiguous:
        return np.divmod(np.flatnonzero(marks), marks.shape[1])
    columns, rows = np.divmod(np.flatnonzero(marks.T), marks.shape[0])
    return rows, columns


def dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(Q,) the dot product of each pair of rows, in float64."""
    return np.einsum("qd,qd->q", a.astype(np.float64), b.astype(np.float64))


def _scale(*features: np.ndarray) -> float:
    """The largest size that a score can have, by the lengths of the features; 1 for normalised ones."""
    lengths = [np.sqrt(np.einsum("nd,nd->n", part, part, dtype=np.float64)) for part in features]
    return float(np.prod([np.max(each, where=np.isfinite(each), initial=0.0) for each in lengths])) or 1.0


def retrieval(
    images: np.ndarray, texts: np.ndarray, text_image: np.ndarray | None = None
) -> tuple[dict[str, float], tuple[float, float]]:
    """Recall@1, @5 and @10 in both directions, ``mean_recall@1``, their mean at 1, and the 95 % interval of that.

    One matrix product, tile by tile, serves both directions; memory is O((N + M) · D).

    Args:
        images: (N, D) normalised features.
        texts: (M, D) normalised features.
        text_image: (M,) index of each text's image; by default text i belongs to image i. An image with several texts
            is found by the best ranked of them.
    """
    text_image = np.arange(len(texts)) if text_image is None else text_image
    by_text, by_image = _rank_both(images, texts, text_image)
    recalls = {f"image_retrieval_recall@{k}": float(by_text.hits(k).mean()) for k in KS}
    recalls |= {f"text_retrieval_recall@{k}": float(by_image.hits(k).mean()) for k in KS}
    recalls["mean_recall@1"] = (recalls["image_retrieval_recall@1"] + recalls["text_retrieval_recall@1"]) / 2
    found = np.bincount(text_image, weights=by_text.hits(1), minlength=len(images))
    samples = np.stack([by_image.hits(1), found, np.bincount(text_image, minlength=len(images))], axis=1)
    by_image_sum, by_text_sum, num_texts = resampled(samples)
    return recalls, _interval((by_image_sum / len(images) + by_text_sum / np.maximum(num_texts, 1)) / 2)


def _rank_both(images: np.ndarray, texts: np.ndarray, text_image: np.ndarray) -> tuple[Ranks, Ranks]:
    """The ranks of each text's image, and of each image's best text."""
    scale = _scale(images, texts)
    own = np.concatenate([dots(images[text_image[part]], texts[part]) for part in _parts(len(texts), ROWS)])
    best = np.full(len(images), -np.inf)
    with np.errstate(invalid="ignore"):
        np.maximum.at(best, text_image, own)
    best[best == -np.inf] = np.nan  # an image without a text is never found
    ties = np.bincount(text_image, weights=own >= best[text_image] - TIED * scale, minlength=len(images))
    by_text, by_image = Ranks(own, np.ones(len(texts)), scale), Ranks(best, ties, scale)
    for rows in _parts(len(images), ROWS):
        for columns in _parts(len(texts), COLUMNS):
            scores = _scores(images[rows], texts[columns])
            row = text_image[columns] - rows.start
            inside = np.flatnonzero((row >= 0) & (row < len(scores)))
            scores[row[inside], inside] = -np.inf
            by_image.add(rows, scores, images[rows], texts[columns])
            by_text.add(columns, scores.T, texts[columns], images[rows])
    return by_text, by_image


def classification(
    images: np.ndarray, classifier: np.ndarray, labels: np.ndarray, groups: Mapping[str, Sequence[int]] | None = None
) -> tuple[dict[str, float], tuple[float, float]]:
    """acc1, acc5 and mean per-class recall (over the classes that have samples), and the 95 % interval of acc1.

    Args:
        images: (N, D) normalised features.
        classifier: (C, D) normalised class weights; C < 5 gives no acc5.
        labels: (N,) class ids, 0 … C - 1.
        groups: name -> class ids. ``acc1/{name}`` is the accuracy on the samples of these classes, with a choice among
            these classes only (restricted ImageNet accuracy); a group without a sample is left out.
    """
    ranks = rank(images, classifier, labels)
    hits = ranks.hits(1)
    counts = np.bincount(labels, minlength=len(classifier))
    found = np.bincount(labels, weights=hits, minlength=len(classifier))
    metrics = {"acc1": float(hits.mean())}
    if len(classifier) >= 5:
        metrics["acc5"] = float(ranks.hits(5).mean())
    metrics["mean_per_class_recall"] = float((found[counts > 0] / counts[counts > 0]).mean())
    for name, classes in (groups or {}).items():
        place = np.full(len(classifier), -1)
        place[list(classes)] = np.arange(len(classes))
        some = np.flatnonzero(place[labels] >= 0)
        if some.size:
            among = rank(images[some], classifier[list(classes)], place[labels[some]])
            metrics[f"acc1/{name}"] = float(among.hits(1).mean())
    (total,) = resampled(hits[:, None])
    return metrics, _interval(total / len(images))


def rank(queries: np.ndarray, keys: np.ndarray, targets: np.ndarray) -> Ranks:
    """The rank of each query's own key.

    Args:
        queries: (Q, D) normalised features.
        keys: (K, D) normalised features.
        targets: (Q,) index of each query's own key.
    """
    own = np.concatenate([dots(queries[part], keys[targets[part]]) for part in _parts(len(queries), ROWS)])
    ranks = Ranks(own, np.ones(len(queries)), _scale(queries, keys))
    for rows in _parts(len(queries), ROWS):
        scores = _scores(queries[rows], keys)
        scores[np.arange(len(scores)), targets[rows]] = -np.inf
        ranks.add(rows, scores, queries[rows], keys)
    return ranks


def _parts(total: int, size: int) -> Iterator[slice]:
    yield from (slice(start, min(start + size, total)) for start in range(0, total, size))


def _scores(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    return queries.astype(np.float32, copy=False) @ keys.astype(np.float32, copy=False).T


def resampled(samples: np.ndarray) -> np.ndarray:
    """(F, R) the sums of ``samples`` (N, F) over R bootstrap resamples of N of them; always the same ones.

    Samples with equal values are drawn together: how many of each are in a resample is multinomial.
    """
    values, counts = np.unique(samples, axis=0, return_counts=True)
    draws = np.random.default_rng(0).multinomial(len(samples), counts / len(samples), size=RESAMPLES)
    return (draws @ values).T


def _interval(figures: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of a figure over resamples."""
    low, high = np.percentile(figures, [2.5, 97.5])
    return float(low), float(high)


def transfer(matrix: np.ndarray) -> dict[str, float]:
    """In-domain, backward and forward transfer of a step × step matrix (T, T).

    With E[i, j] the model of step i on the data of step j: ``id`` is the mean of the diagonal, ``backward`` the mean
    below it (j < i), ``forward`` the mean above it (j > i). A missing (NaN) cell makes its figure NaN.

    Raises:
        ValueError: the matrix is not square.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"a step × step matrix is square, not {matrix.shape}")
    below, above = np.tril_indices_from(matrix, -1), np.triu_indices_from(matrix, 1)
    return {"id": _mean(np.diag(matrix)), "backward": _mean(matrix[below]), "forward": _mean(matrix[above])}


def _mean(values: Iterable[float]) -> float:
    values = np.asarray(values, dtype=np.float64)
    return float(values.mean()) if values.size else float("nan")
