import math

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification
from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from tic_clip.metrics import KS, classification, ranks, retrieval, transfer


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


@pytest.mark.parametrize("texts_per_image", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_recall_is_that_of_clip_benchmark(seed, texts_per_image):
    rng = np.random.default_rng(seed)
    text_image = np.repeat(np.arange(50), texts_per_image)
    images = features(rng, 50)
    texts = images[text_image] + features(rng, len(text_image))
    ours = retrieval(images, texts, text_image)
    mean = ours.pop("mean_recall@1")
    assert ours == pytest.approx(peer_recalls(images, texts, text_image), abs=1e-6)
    assert mean == (ours["image_retrieval_recall@1"] + ours["text_retrieval_recall@1"]) / 2
    assert 0.05 < mean < 0.95, "features on which nothing or everything is found show nothing"


def test_texts_in_any_order():
    rng = np.random.default_rng(3)
    text_image = rng.permutation(np.repeat(np.arange(20), [1, 2, 3, 4] * 5))
    images, texts = features(rng, 20), features(rng, 50)
    ours = retrieval(images, texts, text_image)
    del ours["mean_recall@1"]
    assert ours == pytest.approx(peer_recalls(images, texts, text_image), abs=1e-6)


def test_hand_worked_similarities():
    # Queries are the rows of the identity, so keys.T is the similarity matrix itself.
    similarities = np.array(
        [
            [0.9, 0.1, 0.2, 0.3],  # its own (0) is first
            [0.5, 0.4, 0.6, 0.1],  # two are above its own (1)
            [0.9, 0.8, 0.1, 0.7],  # all are above its own (2)
            [0.1, 0.3, 0.2, 0.2],  # one is above its own (3); key 2 ties with it and comes before
        ]
    )
    assert ranks(np.eye(4), similarities.T, np.arange(4)).tolist() == [0, 2, 3, 2]
    metrics = retrieval(images=similarities.T, texts=np.eye(4))
    assert metrics["image_retrieval_recall@1"] == 1 / 4
    assert metrics["image_retrieval_recall@5"] == 1
    # By column: image 0 ties with text 2 but comes first, image 1 has 0.8 above 0.4, image 2 is below three and image 3
    # below two.
    assert ranks(similarities.T, np.eye(4), np.arange(4)).tolist() == [0, 1, 3, 2]
    assert metrics["text_retrieval_recall@1"] == 1 / 4
    assert metrics["mean_recall@1"] == 1 / 4


def test_of_several_texts_the_best_counts():
    images = np.eye(2)
    texts = np.array([[0.1, 0.2], [0.9, 0.1], [0.5, 0.4], [0.3, 0.3]])  # texts 0 and 1 are of image 0, 2 and 3 of 1
    metrics = retrieval(images, texts, np.array([0, 0, 1, 1]))
    assert metrics["text_retrieval_recall@1"] == 1  # text 1 is image 0's best, text 2 is image 1's
    assert metrics["image_retrieval_recall@1"] == 1 / 4  # only text 1 finds its image: text 3's tie goes to image 0


def test_an_image_without_a_text_is_not_found():
    metrics = retrieval(np.eye(3), np.eye(3)[:2], np.array([0, 1]))
    assert metrics["text_retrieval_recall@10"] == pytest.approx(2 / 3)
    assert metrics["image_retrieval_recall@1"] == 1


def test_ties_count_as_in_a_stable_sort():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 3, size=(30, 12)).astype(float)
    targets = rng.integers(0, 12, size=30)
    order = np.argsort(-scores, axis=1, kind="stable")
    slow = [row.tolist().index(target) for row, target in zip(order, targets, strict=True)]
    assert ranks(np.eye(30), scores.T, targets).tolist() == slow


@pytest.mark.parametrize("chunk", [1, 7, 30, 1000])
def test_any_chunk_gives_the_same_ranks(chunk):
    rng = np.random.default_rng(1)
    queries, keys, targets = features(rng, 30), features(rng, 20), rng.integers(0, 20, size=30)
    slow = [
        sum(float(query @ key) > float(query @ keys[target]) for key in keys)
        for query, target in zip(queries, targets, strict=True)
    ]
    assert ranks(queries, keys, targets, chunk).tolist() == slow


def test_a_model_that_diverged_finds_nothing():
    broken = np.full((12, 4), np.nan, dtype=np.float32)
    assert set(retrieval(broken, broken).values()) == {0.0}
    assert set(classification(broken, broken, np.arange(12)).values()) == {0.0}


def test_accuracy_is_that_of_clip_benchmark_and_sklearn(monkeypatch):
    # Its `accuracy` calls float() on an array of one element, which NumPy refuses from 2.4 on.
    monkeypatch.setattr(zeroshot_classification, "float", lambda value: np.asarray(value).item(), raising=False)
    rng = np.random.default_rng(0)
    classifier, labels = features(rng, 10), rng.integers(0, 9, size=200)  # class 9 has no sample
    images = classifier[labels] + 1.5 * features(rng, 200)
    logits = images @ classifier.T
    ours = classification(images, classifier, labels)
    logits_labels = torch.from_numpy(logits), torch.from_numpy(labels)
    acc1, acc5 = zeroshot_classification.accuracy(*logits_labels, topk=(1, 5))
    recall = balanced_accuracy_score(labels, logits.argmax(axis=1))
    assert ours == pytest.approx({"acc1": acc1, "acc5": acc5, "mean_per_class_recall": recall}, abs=1e-6)
    assert ours["acc5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=np.arange(10)))
    assert 0.3 < ours["acc1"] < ours["acc5"] < 1


def test_mean_per_class_recall_leaves_out_classes_without_samples():
    classifier = np.eye(6)
    images, labels = np.eye(6)[[0, 0, 0, 1, 2]], np.array([0, 0, 0, 1, 1])  # class 0: 3 of 3, class 1: 1 of 2
    metrics = classification(images, classifier, labels)
    assert metrics["acc1"] == pytest.approx(4 / 5)
    assert metrics["mean_per_class_recall"] == pytest.approx((1 + 1 / 2) / 2)


def test_fewer_than_five_classes_have_no_acc5():
    assert classification(np.eye(4), np.eye(4), np.arange(4)) == {"acc1": 1.0, "mean_per_class_recall": 1.0}
    assert classification(np.eye(5), np.eye(5), np.arange(5))["acc5"] == 1.0


def test_transfer_by_hand():
    matrix = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 12]])
    assert transfer(matrix) == {"id": 6.0, "backward": pytest.approx(19 / 3), "forward": pytest.approx(11 / 3)}


def test_a_missing_cell_makes_its_figure_missing():
    matrix = np.ones((3, 3))
    matrix[2, 0] = np.nan
    figures = transfer(matrix)
    assert math.isnan(figures["backward"])
    assert (figures["id"], figures["forward"]) == (1, 1)


def test_one_step_has_no_transfer():
    figures = transfer(np.array([[0.5]]))
    assert figures["id"] == 0.5
    assert math.isnan(figures["backward"])
    assert math.isnan(figures["forward"])


@pytest.mark.parametrize("shape", [(2, 3), (4,), (2, 2, 2)])
def test_only_a_square_matrix_has_transfer(shape):
    with pytest.raises(ValueError, match="square"):
        transfer(np.zeros(shape))
