"""Recall, accuracy and transfer: arrays in, floats out. No model, no loader, no file.

Shapes: N images, M texts, D features, C classes, T steps. Recall and accuracy follow clip_benchmark's definitions
(https://github.com/LAION-AI/CLIP_benchmark, metrics/zeroshot_retrieval.py and zeroshot_classification.py); its names
for the two directions are kept: image retrieval looks an image up by its text, text retrieval a text by its image.
"""

from collections.abc import Iterable

import numpy as np

KS = (1, 5, 10)
MAIN_METRIC = {"retrieval": "mean_recall@1", "classification": "acc1"}
"""The metric of each kind of task that stands in the matrix."""


def ranks(queries: np.ndarray, keys: np.ndarray, targets: np.ndarray, chunk: int = 1024) -> np.ndarray:
    """How many keys score above each query's own: (Q,) integers, 0 is a hit at 1.

    Keys that tie with the target count as above it where they come before it, as in a stable sort; a score that is no
    number counts as above, so that a diverged model finds nothing. Scores are computed ``chunk`` queries at a time, so
    memory is O(keys · chunk).

    Args:
        queries: (Q, D) normalised features.
        keys: (K, D) normalised features.
        targets: (Q,) index of each query's own key.
        chunk: queries at a time.
    """
    result = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        scores = queries[rows] @ keys.T
        own = targets[rows, None]
        target_scores = np.take_along_axis(scores, own, axis=1)
        above = (~(scores <= target_scores)).sum(axis=1)
        tied = ((scores == target_scores) & (np.arange(len(keys)) < own)).sum(axis=1)
        result[rows] = above + tied
    return result


def retrieval(images: np.ndarray, texts: np.ndarray, text_image: np.ndarray | None = None) -> dict[str, float]:
    """Recall@1, @5 and @10 in both directions, and ``mean_recall@1``, their mean at 1.

    Args:
        images: (N, D) normalised features.
        texts: (M, D) normalised features.
        text_image: (M,) index of each text's image; by default text i belongs to image i. An image with several texts
            is found by the best ranked of them.
    """
    text_image = np.arange(len(texts)) if text_image is None else text_image
    by_text = ranks(texts, images, text_image)
    best = np.full(len(images), np.iinfo(np.int64).max)  # an image without a text is never found
    np.minimum.at(best, text_image, ranks(images[text_image], texts, np.arange(len(texts))))
    recalls = {f"image_retrieval_recall@{k}": float((by_text < k).mean()) for k in KS}
    recalls |= {f"text_retrieval_recall@{k}": float((best < k).mean()) for k in KS}
    recalls["mean_recall@1"] = (recalls["image_retrieval_recall@1"] + recalls["text_retrieval_recall@1"]) / 2
    return recalls


def classification(images: np.ndarray, classifier: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """acc1, acc5 and mean per-class recall (over the classes that have samples).

    Args:
        images: (N, D) normalised features.
        classifier: (C, D) normalised class weights; C < 5 gives no acc5.
        labels: (N,) class ids, 0 … C − 1.
    """
    rank = ranks(images, classifier, labels)
    predicted = rank < 1
    hits = np.bincount(labels, weights=predicted, minlength=len(classifier))
    counts = np.bincount(labels, minlength=len(classifier))
    metrics = {"acc1": float(predicted.mean())}
    if len(classifier) >= 5:
        metrics["acc5"] = float((rank < 5).mean())
    metrics["mean_per_class_recall"] = float((hits[counts > 0] / counts[counts > 0]).mean())
    return metrics


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
