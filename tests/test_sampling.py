import io
import itertools
import json
import random
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tic_clip import TicError, sampling
from tic_clip.sampling import apportion, counts_before, line, merged, shuffled, worker_range
from tic_clip.storage import write_json
from tic_clip.tarshard import write_shard


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def make_split(folder, sizes, bad=()):
    """Shards of these sizes whose captions are "{folder} {shard} {sample}"; ``bad`` captions get no picture."""
    number = itertools.count()
    table = {}
    for shard, size in enumerate(sizes):
        captions = [f"{folder.name} {shard} {i}" for i in range(size)]
        content = [
            (f"{next(number):032x}-0", {"png": b"no picture" if c in bad else png((shard, i, 0)), "txt": c.encode()})
            for i, c in enumerate(captions)
        ]
        table[f"{shard:08d}.tar"] = write_shard(folder / f"{shard:08d}.tar", content)
    write_json(folder / "sizes.json", table)
    return str(folder)


def make_plan(splits, samples, batch_size, iterations, checkpoints=1, seed=0):
    """A plan that takes ``samples[i]`` of split i."""
    sources = []
    for split, count in zip(splits, samples, strict=True):
        with open(f"{split}/sizes.json") as file:
            size = sum(json.load(file).values())
        sources.append({"name": split.rsplit("/", 1)[-1], "split": split, "size": size, "samples": count})
    return {
        "step": "now",
        "seed": seed,
        "sources": sources,
        "batch_size": batch_size,
        "iterations": iterations,
        "checkpoints": checkpoints,
    }


def identity(image):
    return image.getpixel((0, 0))


def read(plan, world_size=1, num_workers=1):
    """All captions of a step: {(checkpoint, rank): [caption, …]}, through the stream of every loader worker."""
    captions = {}
    for epoch, rank in itertools.product(range(plan["checkpoints"]), range(world_size)):
        captions[epoch, rank] = [
            text
            for worker in range(num_workers)
            for _, text in sampling.stream(
                plan, epoch, rank, world_size, worker, num_workers, (identity, lambda text: [text])
            )
        ]
    return captions


def test_apportion_gives_largest_remainders():
    assert apportion([1, 1, 1], 10) == [4, 3, 3]
    assert apportion([50, 30, 20], 10) == [5, 3, 2]
    assert apportion([2, 3], 1) == [0, 1]
    assert sum(apportion([858, 776, 755, 400], 9984)) == 9984


def slow_counts(quotas, position):
    order = sorted((Fraction(2 * j + 1, 2 * q), i) for i, q in enumerate(quotas) for j in range(q))
    counts = Counter(i for _, i in order[:position])
    return [counts[i] for i in range(len(quotas))]


@pytest.mark.parametrize("quotas", [[1], [3, 5], [1, 1, 1, 1], [7, 0, 2], [100, 1, 10, 3], [1, 200], [5] * 9])
def test_counts_before_is_the_sorted_merge(quotas):
    for position in range(sum(quotas) + 1):
        assert counts_before(quotas, position) == slow_counts(quotas, position)


def test_counts_before_of_a_billion_samples_is_exact_and_proportional():
    quotas = apportion([311, 977, 13], 1_847_296_000)
    for position in (1, 90_112, 1_000_000_007, 1_847_295_999):
        counts = counts_before(quotas, position)
        assert sum(counts) == position
        assert all(abs(c - position * q / sum(quotas)) < 2 for c, q in zip(counts, quotas, strict=True))


@pytest.mark.parametrize(("world", "workers", "batches"), [(1, 1, 7), (2, 3, 7), (3, 4, 2), (2, 5, 11)])
def test_worker_ranges_tile_the_interval(world, workers, batches):
    ranges = [worker_range(batches, 4, rank, w, workers) for rank in range(world) for w in range(workers)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == world * batches * 4
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    for w, (start, stop) in enumerate(ranges[:workers]):
        assert stop - start == 4 * len(range(w, batches, workers))  # what the loader takes from worker w in turn


def test_line_goes_pass_after_pass_over_every_sample():
    sizes = np.array([3, 1, 5])
    whole = [
        (piece.number, piece.shard, i) for piece in line(sizes, (0,), 0, 27) for i in range(piece.start, piece.stop)
    ]
    assert len(whole) == 27
    for number in range(3):
        assert Counter((s, i) for n, s, i in whole[9 * number : 9 * number + 9] if n == number) == Counter(
            (s, i) for s, size in enumerate(sizes) for i in range(size)
        )
    for start, stop in [(0, 1), (2, 11), (8, 9), (9, 9), (13, 27)]:
        part = [(p.number, p.shard, i) for p in line(sizes, (0,), start, stop) for i in range(p.start, p.stop)]
        assert part == whole[start:stop]


def test_passes_and_seeds_have_their_own_order():
    def order(seed, number):
        return [piece.shard for piece in line(np.ones(50, int), (seed,), 50 * number, 50 * number + 50)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_shuffled_keeps_every_item_and_mixes():
    items = list(shuffled(range(1000), 100, 20, random.Random(0)))
    assert sorted(items) == list(range(1000))
    assert items != list(range(1000))
    assert items == list(shuffled(range(1000), 100, 20, random.Random(0)))
    assert list(shuffled(range(5), 1, 1, random.Random(0))) == list(range(5))


def test_merged_interleaves_in_proportion():
    streams = [iter("aaaaaa"), iter("bbb"), iter("")]
    assert "".join(merged(streams, [6, 3, 0])) == "abaabaaba"


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 3), (2, 1), (2, 4), (4, 2)])
@pytest.mark.parametrize(("batches", "checkpoints"), [(10, 2), (9, 3)])
def test_every_sample_is_read_floor_or_ceil_times(tmp_path, world, workers, batches, checkpoints):
    """Two splits, fewer shards than workers; 80 or 72 samples of 21 + 8: shares in proportion to the sizes."""
    splits = [make_split(tmp_path / "a", [10, 11]), make_split(tmp_path / "b", [8])]
    total = batches * 8
    quotas = apportion([21, 8], total)
    plan = make_plan(splits, quotas, 8, batches, checkpoints)
    captions = read(plan, world, workers)
    assert {len(part) for part in captions.values()} == {total // checkpoints // world}  # nobody waits for another
    counts = Counter(itertools.chain.from_iterable(captions.values()))
    for name, size, quota in (("a", 21, quotas[0]), ("b", 8, quotas[1])):
        own = [n for caption, n in counts.items() if caption.startswith(name)]
        assert sum(own) == quota
        assert len(own) == size
        assert set(own) <= {quota // size, -(-quota // size)}
    assert counts == Counter(itertools.chain.from_iterable(read(plan).values()))  # the same for any world size


def test_a_budget_below_one_pass_reads_no_sample_twice(tmp_path):
    splits = [make_split(tmp_path / "a", [30, 30]), make_split(tmp_path / "b", [20])]
    plan = make_plan(splits, [30, 10], 8, 5, checkpoints=5)
    counts = Counter(itertools.chain.from_iterable(read(plan, 2, 2).values()))
    assert set(counts.values()) == {1}
    assert Counter(caption[0] for caption in counts) == {"a": 30, "b": 10}


def test_sources_are_interleaved_on_every_rank_and_in_every_interval(tmp_path):
    splits = [make_split(tmp_path / "a", [60]), make_split(tmp_path / "b", [30, 30])]
    for part in read(make_plan(splits, [60, 60], 8, 15, checkpoints=3), 2, 2).values():
        assert abs(sum(caption[0] == "a" for caption in part) - len(part) / 2) <= 2
        runs = [len(list(group)) for _, group in itertools.groupby(caption[0] for caption in part)]
        assert max(runs) <= 2


def test_steps_read_the_same_split_in_their_own_order(tmp_path):
    plan = make_plan([make_split(tmp_path / "a", [10] * 10)], [40], 8, 5)
    assert read(plan) == read(plan)
    assert set(read(plan)[0, 0]) != set(read({**plan, "step": "next"})[0, 0])
    assert read(plan) != read({**plan, "seed": 1})


def test_augmentation_depends_on_the_place_in_the_line_only(tmp_path):
    plan = make_plan([make_split(tmp_path / "a", [20])], [40], 8, 5)

    def draws(num_workers):
        found = {}
        for worker in range(num_workers):
            for draw, text in sampling.stream(
                plan, 0, 0, 1, worker, num_workers, (lambda _: random.random(), lambda t: [t])
            ):
                found.setdefault(text, []).append(draw)
        return {text: sorted(values) for text, values in found.items()}

    assert draws(1) == draws(3)
    assert len({value for values in draws(1).values() for value in values}) == 40  # each pass draws anew


def test_a_picture_that_cannot_be_decoded_is_replaced_from_its_split(tmp_path, caplog):
    splits = [make_split(tmp_path / "a", [16], bad={"a 0 3", "a 0 7"}), make_split(tmp_path / "b", [16])]
    captions = read(make_plan(splits, [16, 16], 8, 4), 2, 1)
    counts = Counter(itertools.chain.from_iterable(captions.values()))
    assert {len(part) for part in captions.values()} == {16}
    assert sum(n for caption, n in counts.items() if caption[0] == "a") == 16
    assert not {"a 0 3", "a 0 7"} & set(counts)
    assert "samples left out and replaced: {'undecodable': " in caplog.text


def test_a_split_without_a_usable_sample_is_an_error_that_names_it(tmp_path):
    split = make_split(tmp_path / "a", [2], bad={"a 0 0", "a 0 1"})
    with pytest.raises(TicError, match=r"a: no sample can be used"):
        read(make_plan([split], [8], 8, 1))


def test_a_shard_shorter_than_its_table_is_an_error_that_names_it(tmp_path):
    split = make_split(tmp_path / "a", [4])
    write_json(tmp_path / "a" / "sizes.json", {"00000000.tar": 6})
    with pytest.raises(TicError, match=r"00000000.tar has only 4 samples"):
        read(make_plan([split], [8], 8, 1))


def test_a_split_that_changed_since_the_plan_is_refused(tmp_path):
    split = make_split(tmp_path / "a", [4])
    plan = make_plan([split], [8], 8, 1)
    plan["sources"][0]["size"] = 5
    with pytest.raises(TicError, match="has 4 samples, the plan says 5"):
        read(plan)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_open_clips_loader_gives_the_plan_as_batches(tmp_path, workers):
    """Through the hook and real loader processes: equal batches, each sample as often as the stream reads it."""
    import torch

    split = make_split(tmp_path / "a", [7, 6])
    plan = make_plan([split], [40], 8, 5)
    write_json(tmp_path / "plan.json", plan)
    counts = Counter()
    for rank in range(2):
        args = SimpleNamespace(
            train_data=str(tmp_path / "plan.json"), batch_size=4, world_size=2, rank=rank, workers=workers
        )
        info = sampling.get_exact_dataset(args, to_tensor, True, 0, tokens)
        info.set_epoch(0)
        batches = list(info.dataloader)
        assert info.dataloader.num_batches == len(batches) == 5
        assert info.dataloader.num_samples == 40
        assert all(images.shape == (4, 3, 4, 4) and texts.shape == (4, 2) for images, texts in batches)
        counts.update(tuple(row) for _, texts in batches for row in torch.as_tensor(texts).tolist())
    assert set(counts.values()) <= {3, 4}
    assert len(counts) == 13


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_loader_process_is_one_line(tmp_path, workers):
    split = make_split(tmp_path / "a", [2], bad={"a 0 0", "a 0 1"})
    write_json(tmp_path / "plan.json", make_plan([split], [16], 8, 2))
    args = SimpleNamespace(train_data=str(tmp_path / "plan.json"), batch_size=8, world_size=1, rank=0, workers=workers)
    with pytest.raises(TicError, match=r"^a: no sample can be used \({'undecodable': \d+}\)$"):
        list(sampling.get_exact_dataset(args, to_tensor, True, 0, tokens).dataloader)


def test_the_hook_refuses_another_global_batch(tmp_path):
    write_json(tmp_path / "plan.json", make_plan([make_split(tmp_path / "a", [4])], [8], 8, 1))
    args = SimpleNamespace(train_data=str(tmp_path / "plan.json"), batch_size=3, world_size=2, rank=0, workers=0)
    with pytest.raises(TicError, match=r"the plan's batch is 8, not 3 × 2 ranks"):
        sampling.get_exact_dataset(args, to_tensor, True)


def to_tensor(image):
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def tokens(text):
    import torch

    return torch.tensor([[int(word) for word in text.split()[1:]]])
