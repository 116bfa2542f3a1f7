import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification
from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
from sklearn.metrics import balanced_accuracy_score

from tic_clip import metrics as metrics_module
from tic_clip.metrics import (
    KS,
    RESAMPLES,
    classification,
    constant_guess,
    forgetting,
    mean_over_compute,
    paired_test,
    rank,
    resample,
    retrieval,
    seed_error,
    transfer,
    transfer_errors,
)


def features(rng, count, dim=8):
    values = rng.normal(size=(count, dim)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def peer_recalls(images, texts, text_image):
    """Recalls as ``clip_benchmark.metrics.zeroshot_retrieval.evaluate`` computes them from its embeddings."""
    scores = torch.from_numpy(texts) @ torch.from_numpy(images).t()
    positive = torch.zeros_like(scores, dtype=bool)
    positive[torch.arange(len(scores)), torch.from_numpy(text_image)] = True
    recalls = {}
    for k in KS:
        for name, x, y in (("image", scores, positive), ("text", scores.T, positive.T)):
            hits = batchify(recall_at_k, x, y, 16, "cpu", k=k) > 0
            recalls[f"{name}_retrieval_recall@{k}"] = hits.float().mean().item()
    return recalls


@pytest.mark.parametrize("texts_per_image", [[1], [3], [1, 2, 3, 4]])
@pytest.mark.parametrize("seed", range(2))
def test_recall_is_that_of_clip_benchmark(seed, texts_per_image):
    rng = np.random.default_rng(seed)
    text_image = rng.permutation(np.repeat(np.arange(48), texts_per_image * (48 // len(texts_per_image))))
    images = features(rng, 48)
    texts = images[text_image] + features(rng, len(text_image))
    ours, *_ = retrieval(images, texts, text_image)
    mean = ours.pop("mean_recall@1")
    assert ours == pytest.approx(peer_recalls(images, texts, text_image), abs=1e-6)
    assert mean == (ours["image_retrieval_recall@1"] + ours["text_retrieval_recall@1"]) / 2
    assert 0.05 < mean < 0.95, "features on which nothing or everything is found show nothing"


def slow_hits(scores, own, k):
    """The mean over all orders of the keys (K,) of whether one of ``own`` is in the top ``k`` of a stable sort."""
    found = []
    for order in itertools.permutations(range(len(scores))):
        top = sorted(order, key=lambda key: -scores[key])[:k]
        found.append(bool(set(top) & set(own)))
    return np.mean(found)


@pytest.mark.parametrize("seed", range(5))
def test_ties_count_as_the_mean_over_all_orders(seed):
    rng = np.random.default_rng(seed)
    similarities = rng.integers(0, 3, size=(3, 6)).astype(float)  # images x texts
    text_image = np.array([0, 0, 1, 1, 1, 2])
    metrics, *_ = retrieval(np.eye(3), similarities.T, text_image)
    by_text = [slow_hits(similarities[:, j], [image], 1) for j, image in enumerate(text_image)]
    assert metrics["image_retrieval_recall@1"] == pytest.approx(np.mean(by_text))
    for k in (1, 5):
        by_image = [slow_hits(similarities[i], np.flatnonzero(text_image == i), k) for i in range(3)]
        assert metrics[f"text_retrieval_recall@{k}"] == pytest.approx(np.mean(by_image))
    assert set(metrics.values()) - {0.0, 1.0}, "no tie has shown"


@pytest.mark.parametrize("distance", [0, 1e-7, 1e-3])
def test_ranks_are_exact_where_float32_can_not_tell(distance, monkeypatch):
    """Many keys are next to each other: equal, nearer than float32's error, or apart."""
    rng = np.random.default_rng(2)
    keys = np.repeat(features(rng, 30, 64), 4, axis=0)
    keys = (keys + distance * rng.normal(size=keys.shape)).astype(np.float32)
    queries, targets = features(rng, 70, 64), rng.integers(0, len(keys), size=70)
    scores = queries.astype(np.float64) @ keys.astype(np.float64).T
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    above = (scores > own + 1e-12).sum(axis=1)
    tied = ((np.abs(scores - own) <= 1e-12) & (np.arange(len(keys)) != targets[:, None])).sum(axis=1)
    for rows, share in ((7, 64), (1024, 1), (7, 10**9)):  # also by a product in float64, and never by one
        monkeypatch.setattr(metrics_module, "ROWS", rows)
        monkeypatch.setattr(metrics_module, "MAX_PAIRS", 1 / share)
        found, _ = rank(keys, queries, targets)
        assert (found.above.tolist(), found.tied.tolist()) == (above.tolist(), tied.tolist())
    assert (tied == 3).all() if distance == 0 else not tied.any()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 50), (64, 7)])
def test_tiles_and_order_change_nothing(rows, columns, monkeypatch):
    rng = np.random.default_rng(4)
    text_image = np.repeat(np.arange(40), [1, 2, 3, 2] * 10)
    images, texts = features(rng, 40), features(rng, 80)
    texts[20:40] = texts[:20]  # captions repeat
    usual = retrieval(images, texts, text_image)
    monkeypatch.setattr(metrics_module, "ROWS", rows)
    monkeypatch.setattr(metrics_module, "COLUMNS", columns)
    assert retrieval(images, texts, text_image)[:2] == usual[:2]
    at, of = rng.permutation(40), rng.permutation(80)
    found, interval, hits = retrieval(images[at], texts[of], np.argsort(at)[text_image[of]])
    assert found == pytest.approx(usual[0], abs=1e-12)
    assert interval == pytest.approx(usual[1])
    assert hits == pytest.approx(usual[2][at])
    assert hits.mean() == pytest.approx(found["mean_recall@1"])


def test_what_is_not_a_number_finds_nothing():
    broken = np.full((12, 4), np.nan, dtype=np.float32)
    assert set(retrieval(broken, broken)[0].values()) == {0.0}
    assert set(classification(broken, broken, np.arange(12))[0].values()) == {0.0}
    assert set(retrieval(broken[:3], broken[:3])[0].values()) == {0.0}  # also with fewer keys than places
    images = np.eye(4)
    images[2] = np.nan  # it stands above all others
    metrics, *_ = retrieval(images, np.eye(4))
    assert (metrics["image_retrieval_recall@1"], metrics["image_retrieval_recall@5"]) == (0, 3 / 4)
    assert metrics["text_retrieval_recall@1"] == 3 / 4
    metrics, *_ = retrieval(np.eye(3), np.eye(3)[:2], np.array([0, 1]))  # an image without a text
    assert metrics["text_retrieval_recall@10"] == pytest.approx(2 / 3)


def test_memory_does_not_grow_with_all_pairs():
    """6,000 x 6,000 scores are 144 MB; all captions are equal, so that every pair is near every other."""
    program = """
import resource, numpy as np
from tic_clip.metrics import retrieval
features = np.random.default_rng(0).normal(size=(6000, 16)).astype(np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found, *_ = retrieval(features, np.tile(features[:1], (6000, 1)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, found["mean_recall@1"] * 6000)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    grown, chance = map(float, done.stdout.split())
    assert grown < 140_000, f"{grown} kB more"
    assert chance == pytest.approx(1)


# --- The interval ---


def test_the_interval_is_that_of_drawing_one_by_one():
    rng = np.random.default_rng(1)
    values = rng.choice([0, 0.25, 1], size=(60, 1), p=[0.5, 0.2, 0.3])
    slow = [values[rng.integers(0, 60, size=60)].sum() for _ in range(20_000)]
    (ours,) = resample(values)
    assert len(ours) == RESAMPLES
    assert ours.mean() == pytest.approx(np.mean(slow), abs=0.5)
    assert ours.std() == pytest.approx(np.std(slow), rel=0.1)
    assert np.percentile(ours, [2.5, 97.5]) == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=1)
    assert (resample(values) == resample(values[::-1])).all()


def test_the_interval_where_none_or_all_are_hits_is_wilsons():
    """By hand: 1.96² / (100 + 1.96²) = 3.8416 / 103.8416 = 0.036995."""
    images, classifier = np.tile([1.0, 0], (100, 1)), np.eye(2)
    metrics, interval, _ = classification(images, classifier, np.zeros(100, int))
    assert (metrics["acc1"], interval) == (1, pytest.approx((0.963005, 1)))
    metrics, interval, _ = classification(images, classifier, np.ones(100, int))
    assert (metrics["acc1"], interval) == (0, pytest.approx((0, 0.036995), rel=1e-4))


def test_the_interval_of_retrieval_keeps_an_image_and_its_texts_together():
    """Image 0 has nine of ten texts: whether it is drawn decides over nearly all of them."""
    text_image = np.array([0] * 9 + [1])
    texts = np.array([[1.0, 0]] * 10)  # image 1's text finds image 0
    metrics, (low, high), _ = retrieval(np.eye(2), texts, text_image)
    zeros = (np.random.default_rng(6).integers(0, 2, size=(20_000, 2)) == 0).sum(axis=1)
    by_text = 9 * zeros / (9 * zeros + (2 - zeros))
    by_image = (zeros * 9 / 10 + (2 - zeros) / 10) / 2  # each image has one score with all ten texts
    slow = (by_image + by_text) / 2
    assert (low, high) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])))
    assert metrics["image_retrieval_recall@1"] == 0.9


def test_the_paired_test_is_that_of_drawing_one_by_one():
    """Two models of 200 samples, of which the first finds 10 that the second does not, and loses 2."""
    difference = np.array([1] * 10 + [-1] * 2 + [0] * 188, dtype=float)
    rng = np.random.default_rng(1)
    slow = np.array([difference[rng.integers(0, 200, size=200)].mean() for _ in range(20_000)])
    low, high, p = paired_test(resample(difference[:, None], seed=3).T / 200)
    assert (low, high) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])), abs=0.006)
    assert p == pytest.approx(2 * (slow <= 0).mean(), abs=0.02)
    assert 0 < p < 0.05
    assert (resample(difference[:, None], 1) != resample(difference[:, None], 2)).any()
    assert paired_test(np.zeros((10, 1)))[2] == 1


# --- Accuracy and transfer ---


def test_accuracy_is_that_of_clip_benchmark_and_sklearn(monkeypatch):
    # Its `accuracy` calls float() on an array of one element, which NumPy refuses from 2.4 on.
    monkeypatch.setattr(zeroshot_classification, "float", lambda value: np.asarray(value).item(), raising=False)
    rng = np.random.default_rng(0)
    classifier, labels = features(rng, 10), rng.integers(0, 9, size=200)  # class 9 has no sample
    images = classifier[labels] + 1.5 * features(rng, 200)
    logits = images @ classifier.T
    ours, *_ = classification(images, classifier, labels)
    logits_labels = torch.from_numpy(logits), torch.from_numpy(labels)
    acc1, acc5 = zeroshot_classification.accuracy(*logits_labels, topk=(1, 5))
    recall = balanced_accuracy_score(labels, logits.argmax(axis=1))
    assert ours == pytest.approx({"acc1": acc1, "acc5": acc5, "mean_per_class_recall": recall}, abs=1e-6)
    assert 0.3 < ours["acc1"] < ours["acc5"] < 1
    assert "acc5" not in classification(np.eye(4), np.eye(4), np.arange(4))[0]


def test_mean_per_class_recall_and_its_interval_by_hand():
    """Ninety of a hundred images of class 0 are right and five of ten of class 1: recalls of 0.9 and 0.5."""
    labels, classifier = np.repeat([0, 1], [100, 10]), np.eye(3)
    answers = np.repeat([0, 2, 1, 2], [90, 10, 5, 5])
    numbers, (low, high), hits = classification(classifier[answers], classifier, labels, None, "mean_per_class_recall")
    assert (hits.mean(), sorted(set(hits.round(9)))) == (pytest.approx(0.7), pytest.approx([0, 110 / 2 / 100, 5.5]))
    assert (numbers["acc1"], numbers["mean_per_class_recall"]) == pytest.approx((95 / 110, 0.7))
    deviation = (0.9 * 0.1 / 100 + 0.5 * 0.5 / 10) ** 0.5 / 2  # of the mean of two independent shares
    assert (low, high) == pytest.approx((0.7 - 1.96 * deviation, 0.7 + 1.96 * deviation), abs=0.02)
    _, accuracy, _ = classification(classifier[answers], classifier, labels)
    assert accuracy == pytest.approx((95 / 110 - 1.96 * 0.0327, 95 / 110 + 1.96 * 0.0327), abs=0.01)


@pytest.mark.parametrize(("metric", "best"), [("acc1", 0.75), ("mean_per_class_recall", 0.5)])
def test_the_best_answer_that_is_the_same_for_all(metric, best):
    labels, classifier = np.array([4, 4, 4, 7]), np.eye(8)
    assert constant_guess(labels, metric) == best
    always = [classification(np.tile(row, (4, 1)), classifier, labels)[0][metric] for row in classifier]
    assert max(always) == pytest.approx(best)


def test_the_accuracy_of_a_group_is_a_choice_within_it():
    """Three samples of class 1: two look most like class 5, and of these one more like 1 than like 2."""
    images = np.array([[0, 8, 1, 0, 0, 2], [0, 5, 1, 0, 0, 9], [0, 1, 5, 0, 0, 9], [0, 0, 0, 1, 0, 0]])
    groups = {"first": [2, 1], "last": [3, 4, 5], "none": [0]}
    metrics, *_ = classification(images, np.eye(6), np.array([1, 1, 1, 3]), groups)
    assert (metrics["acc1"], metrics["acc1/first"], metrics["acc1/last"]) == pytest.approx((2 / 4, 2 / 3, 1))
    assert "acc1/none" not in metrics


def test_transfer_by_hand():
    matrix = np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 12]])
    assert transfer(matrix) == {"id": 6.0, "backward": pytest.approx(19 / 3), "forward": pytest.approx(11 / 3)}
    where = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=bool)
    found = transfer(matrix, where)  # (1 + 5) / 2 and (4 + 8) / 2
    assert (found["id"], found["backward"], math.isnan(found["forward"])) == (3, 6, True)
    matrix[2, 0] = np.nan  # a missing cell
    found = transfer(matrix)
    assert (found["id"], math.isnan(found["backward"]), found["forward"]) == (6, True, pytest.approx(11 / 3))


def test_forgetting_by_hand():
    """The first period falls from its best, 0.6, to 0.3 and was 0.5 at its own step; the second from 0.7 to 0.6."""
    matrix = np.array([[0.5, 0.1, np.nan], [0.6, 0.7, 0.2], [0.3, 0.6, 0.9]])  # no figure needs the missing cell
    assert forgetting(matrix) == {
        "average": pytest.approx((0.5 + (0.6 + 0.7) / 2 + (0.3 + 0.6 + 0.9) / 3) / 3),
        "last": pytest.approx((0.3 + 0.6 + 0.9) / 3),
        "bwt": pytest.approx((0.3 - 0.5 + 0.6 - 0.7) / 2),
        "forgetting": pytest.approx((0.6 - 0.3 + 0.7 - 0.6) / 2),
    }
    matrix[2, 0] = np.nan
    assert all(map(math.isnan, forgetting(matrix).values()))
    one = [*map(forgetting(np.array([[0.5]])).get, ("average", "last", "bwt", "forgetting"))]
    assert one == pytest.approx([0.5, 0.5, math.nan, math.nan], nan_ok=True)


def test_accuracy_over_compute_by_hand():
    """From 1 to 3 the mean is 0.3, from 3 to 7 it is 0.5: (2 * 0.3 + 4 * 0.5) / 6."""
    assert mean_over_compute(np.array([1.0, 3, 7]), np.array([0.2, 0.4, 0.6])) == pytest.approx(2.6 / 6)
    assert math.isnan(mean_over_compute(np.array([1.0]), np.array([0.2])))


def test_errors_of_a_column_add_up_and_columns_are_independent():
    """Backward of three steps: two cells share the first period's samples, one has the second's."""
    errors = transfer_errors(np.full((3, 3), 0.1))
    assert errors["id"] == pytest.approx(0.1 / 3**0.5)
    assert errors["backward"] == errors["forward"] == pytest.approx((0.2**2 + 0.1**2) ** 0.5 / 3)
    assert all(map(math.isnan, transfer_errors(np.full((3, 3), np.nan)).values()))


def test_errors_of_seeds_are_students():
    """scipy's quantiles of t: 12.706 for one degree of freedom, 4.303 for two."""
    assert seed_error(0.1, 2) == pytest.approx(12.706 * 0.1 / 2**0.5, rel=1e-3)
    assert seed_error(0.1, 3) == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert seed_error(0.1, 10) == pytest.approx(2.262 * 0.1 / 10**0.5, rel=1e-3)
