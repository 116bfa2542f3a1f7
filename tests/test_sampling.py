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

from tic_clip import TicError
from tic_clip.data.tar import write_shard
from tic_clip.storage import StorageError, write_json
from tic_clip.training import hooks, sampling
from tic_clip.training.sampling import apportion, counts_before, line, merged, shuffled, worker_range


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


def make_plan(splits, samples, batch_size, iterations, checkpoints=1, seed=0, used=None):
    """A plan that takes ``samples[i]`` of split i, or of ``used[i]`` of it; a block is a checkpoint interval."""
    sources = []
    for i, (split, count) in enumerate(zip(splits, samples, strict=True)):
        with open(f"{split}/sizes.json") as file:
            size = sum(json.load(file).values())
        name = split.rsplit("/", 1)[-1]
        sources.append(
            {"name": name, "split": split, "size": size, "used": used[i] if used else size, "samples": count}
        )
    return {
        "step": "now",
        "seed": seed,
        "sources": sources,
        "batch_size": batch_size,
        "iterations": iterations,
        "checkpoints": checkpoints,
        "block": iterations // checkpoints,
    }


def identity(image):
    return image.getpixel((0, 0))


TRANSFORMS = (identity, lambda text: [text])


def read(plan, world_size=1, num_workers=1, transforms=TRANSFORMS, tally=None):
    """All (picture, caption) of a step: {(block, rank): [(picture, caption), …]}, through every worker's stream."""
    found = {}
    sources, tally = sampling.sources_of(plan), Counter() if tally is None else tally
    for block, rank in itertools.product(range(plan["iterations"] // plan["block"]), range(world_size)):
        found[block, rank] = [
            item
            for worker in range(num_workers)
            for item in sampling.stream(plan, sources, block, rank, world_size, worker, num_workers, transforms, tally)
        ]
    return found


def captions_of(plan, *args, **kwargs):
    return {place: [text for _, text in items] for place, items in read(plan, *args, **kwargs).items()}


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
    captions = captions_of(plan, world, workers)
    assert {len(part) for part in captions.values()} == {total // checkpoints // world}  # nobody waits for another
    counts = Counter(itertools.chain.from_iterable(captions.values()))
    for name, size, quota in (("a", 21, quotas[0]), ("b", 8, quotas[1])):
        own = [n for caption, n in counts.items() if caption.startswith(name)]
        assert sum(own) == quota
        assert len(own) == size
        assert set(own) <= {quota // size, -(-quota // size)}
    assert counts == Counter(itertools.chain.from_iterable(captions_of(plan).values()))  # the same for any world size


def test_a_budget_below_one_pass_reads_no_sample_twice(tmp_path):
    splits = [make_split(tmp_path / "a", [30, 30]), make_split(tmp_path / "b", [20])]
    plan = make_plan(splits, [30, 10], 8, 5, checkpoints=5)
    counts = Counter(itertools.chain.from_iterable(captions_of(plan, 2, 2).values()))
    assert set(counts.values()) == {1}
    assert Counter(caption[0] for caption in counts) == {"a": 30, "b": 10}


def test_sources_are_interleaved_on_every_rank_and_in_every_interval(tmp_path):
    splits = [make_split(tmp_path / "a", [60]), make_split(tmp_path / "b", [30, 30])]
    for part in captions_of(make_plan(splits, [60, 60], 8, 15, checkpoints=3), 2, 2).values():
        assert abs(sum(caption[0] == "a" for caption in part) - len(part) / 2) <= 2
        runs = [len(list(group)) for _, group in itertools.groupby(caption[0] for caption in part)]
        assert max(runs) <= 2


def test_steps_read_the_same_split_in_their_own_order(tmp_path):
    plan = make_plan([make_split(tmp_path / "a", [10] * 10)], [40], 8, 5)
    assert captions_of(plan) == captions_of(plan)
    assert set(captions_of(plan)[0, 0]) != set(captions_of({**plan, "step": "next"})[0, 0])
    assert captions_of(plan) != captions_of({**plan, "seed": 1})


def test_augmentation_depends_on_the_place_in_the_line_only(tmp_path):
    plan = make_plan([make_split(tmp_path / "a", [20])], [40], 8, 5)

    def draws(num_workers):
        found = {}
        for draw, text in read(plan, 1, num_workers, (lambda _: random.random(), lambda t: [t]))[0, 0]:
            found.setdefault(text, []).append(draw)
        return {text: sorted(values) for text, values in found.items()}

    assert draws(1) == draws(3)
    assert len({value for values in draws(1).values() for value in values}) == 40  # each pass draws anew


def test_what_cannot_be_used_is_counted_and_replaced_from_its_split(tmp_path, caplog):
    splits = [make_split(tmp_path / "a", [16], bad={"a 0 3", "a 0 7"}), make_split(tmp_path / "b", [16])]
    tally = Counter()
    captions = captions_of(make_plan(splits, [16, 16], 8, 4), 2, 1, tally=tally)
    counts = Counter(itertools.chain.from_iterable(captions.values()))
    assert {len(part) for part in captions.values()} == {16}
    assert sum(n for caption, n in counts.items() if caption[0] == "a") == 16
    assert not {"a 0 3", "a 0 7"} & set(counts)
    assert (tally["a", "read"], tally["b", "read"]) == (16, 16)
    assert tally["a", "undecodable"] >= 2
    assert set(tally) == {("a", "read"), ("b", "read"), ("a", "undecodable")}
    assert "is left out: cannot identify image file" in caplog.text


def test_a_missing_picture_or_caption_is_a_reason_of_its_own(tmp_path):
    content = [(f"{i:032x}-0", {"png": png((i, 0, 0)), "txt": b"a caption"}) for i in range(4)]
    del content[1][1]["txt"], content[2][1]["png"]
    write_shard(tmp_path / "a/00000000.tar", content)
    write_json(tmp_path / "a/sizes.json", {"00000000.tar": 4})
    tally = Counter()
    read(make_plan([str(tmp_path / "a")], [4], 4, 1), tally=tally)
    assert tally == {("a", "read"): 4, ("a", "no text"): 2, ("a", "no image"): 2}  # met again by those that replace


def test_a_split_without_a_usable_sample_is_an_error_that_names_it(tmp_path):
    split = make_split(tmp_path / "a", [2], bad={"a 0 0", "a 0 1"})
    with pytest.raises(TicError, match=r"a/00000000.tar: no sample of this shard can be used \({'undecodable': 2}\)"):
        read(make_plan([split], [8], 8, 1))


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 3)])
def test_a_shard_without_a_usable_sample_is_an_error_that_names_it(tmp_path, world, workers):
    """However it is cut among ranks and workers; a cut without a usable sample is none."""
    bad = {f"a 1 {i}" for i in range(9)}
    split = make_split(tmp_path / "a", [10, 9, 10], bad)
    with pytest.raises(TicError, match=r"a/00000001.tar: no sample of this shard can be used \({'undecodable': 9}\)"):
        read(make_plan([split], [24], 12, 2), world, workers)
    split = make_split(tmp_path / "b", [10, 9, 10], {caption.replace("a", "b") for caption in bad - {"a 1 4"}})
    captions = captions_of(make_plan([split], [24], 12, 2), world, workers)
    assert sum(map(len, captions.values())) == 24


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
        info = hooks.get_exact_dataset(args, to_tensor, True, 0, tokens)
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
    message = r"/a/00000000.tar: no sample of this shard can be used \({'undecodable': 2}\)$"
    with pytest.raises(TicError, match=message):
        list(hooks.get_exact_dataset(args, to_tensor, True, 0, tokens).dataloader)


def test_the_hook_refuses_another_global_batch(tmp_path):
    write_json(tmp_path / "plan.json", make_plan([make_split(tmp_path / "a", [4])], [8], 8, 1))
    args = SimpleNamespace(train_data=str(tmp_path / "plan.json"), batch_size=3, world_size=2, rank=0, workers=0)
    with pytest.raises(TicError, match=r"the plan's batch is 8, not 3 × 2 ranks"):
        hooks.get_exact_dataset(args, to_tensor, True)


def to_tensor(image):
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def tokens(text):
    import torch

    return torch.tensor([[int(word) for word in text.split()[1:]]])


@pytest.mark.parametrize(("blocks", "batches", "workers"), [(5, 7, 3), (4, 2, 4), (3, 1, 2), (6, 4, 4)])
def test_workers_take_turns_through_blocks_of_any_size(blocks, batches, workers):
    """Batch i of a row of blocks comes from worker i modulo their number; its place in a block is i's there."""
    for first in range(blocks):
        row = range(first, blocks)
        made = {
            worker: [
                (block, i)
                for block, place in sampling.turns(row, batches, worker, workers)
                for i in range(place, batches, workers)
            ]
            for worker in range(workers)
        }
        wanted = [(block, i) for block in row for i in range(batches)]
        assert [made[i % workers].pop(0) for i in range(len(wanted))] == wanted


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_loader_that_begins_at_any_block_goes_on_with_the_same_batches(tmp_path, workers):
    """What a restart needs; from block to block the worker processes stay."""
    splits = [make_split(tmp_path / "a", [17, 14]), make_split(tmp_path / "b", [9])]
    plan = make_plan(splits, [56, 24], 4, 20, checkpoints=5)
    write_json(tmp_path / "plan.json", plan)
    args = SimpleNamespace(train_data=str(tmp_path / "plan.json"), batch_size=4, world_size=1, rank=0, workers=workers)

    def batches(first):
        info = hooks.get_exact_dataset(args, to_tensor, True, first, tokens)
        for block in range(first, 5):
            info.set_epoch(block)
            yield [[image.flatten().tolist(), text.tolist()] for image, text in info.dataloader]

    whole = list(batches(0))
    assert [len(block) for block in whole] == [4] * 5
    assert all(list(batches(first)) == whole[first:] for first in (1, 3, 4))


def test_a_block_reads_the_same_samples_for_any_number_of_ranks_and_workers(tmp_path):
    """So a step can go on with others after any block."""
    splits = [make_split(tmp_path / "a", [17, 14]), make_split(tmp_path / "b", [9])]
    plan = make_plan(splits, [56, 24], 4, 20, checkpoints=5)

    def blocks(world, workers):
        found = {}
        for (block, _), captions in captions_of(plan, world, workers).items():
            found.setdefault(block, Counter()).update(captions)
        return found

    assert blocks(1, 1) == blocks(2, 1) == blocks(2, 3) == blocks(4, 2)


def test_a_part_of_a_source_is_the_first_of_each_shard_and_the_rest_is_never_read(tmp_path):
    split = make_split(tmp_path / "a", [10, 6, 4])
    plan = make_plan([split], [40], 8, 5, used=[10])
    counts = Counter(itertools.chain.from_iterable(captions_of(plan, 2, 2).values()))
    assert counts == {f"a {shard} {i}": 4 for shard, used in enumerate([5, 3, 2]) for i in range(used)}


def test_the_loader_counts_what_it_read(tmp_path):
    splits = [make_split(tmp_path / "a", [16], bad={"a 0 3"}), make_split(tmp_path / "b", [16])]
    write_json(tmp_path / "plan.json", make_plan(splits, [16, 16], 4, 8, checkpoints=2))
    for workers in (0, 2):
        args = SimpleNamespace(
            train_data=str(tmp_path / "plan.json"), batch_size=4, world_size=1, rank=0, workers=workers
        )
        info = hooks.get_exact_dataset(args, to_tensor, True, 0, tokens)
        for block in range(2):
            info.set_epoch(block)
            list(info.dataloader)
        tally = info.dataloader.tally
        assert (tally["a", "read"], tally["b", "read"]) == (16, 16)
        assert tally["a", "undecodable"] >= 1


def test_shards_are_drawn_with_replacement_by_the_share_of_samples(tmp_path):
    """A shard that is drawn gives all its samples: weight × samples, summed over a source, is its share."""
    splits = [make_split(tmp_path / "a", [8, 4]), make_split(tmp_path / "b", [3])]
    plan = make_plan(splits, [10, 30], 8, 5)
    write_json(tmp_path / "plan.json", plan)
    shards, weights = hooks.weighted_shards(str(tmp_path / "plan.json"))
    assert shards == [f"{splits[0]}/00000000.tar", f"{splits[0]}/00000001.tar", f"{splits[1]}/00000000.tar"]
    assert 8 * weights[0] + 4 * weights[1] == pytest.approx(10)
    assert 3 * weights[2] == pytest.approx(30)
    write_json(tmp_path / "plan.json", make_plan(splits, apportion([12, 3], 4000), 8, 500))
    assert hooks.weighted_shards(str(tmp_path / "plan.json"))[1] is None  # in proportion to the sizes: all alike


def test_sources_in_a_cloud_are_read_like_local_ones(tmp_path, s3):
    import os

    from tic_clip.storage import upload

    split = make_split(tmp_path / "a", [7, 6])
    for name in os.listdir(split):
        upload(tmp_path / "a" / name, f"{s3}/a/{name}")
    local, cloud = make_plan([split], [26], 13, 2), make_plan([split], [26], 13, 2)
    cloud["sources"][0]["split"] = f"{s3}/a"
    assert captions_of(cloud, 1, 2) == captions_of(local, 1, 2)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_store_that_refuses_is_one_line_without_the_workers_traceback(num_workers):
    from torch.utils.data import DataLoader, IterableDataset

    from tic_clip.training.loader import iterate_batches

    class Refused(IterableDataset):
        def __iter__(self):
            raise StorageError("s3://b/x: Access Denied")

    with pytest.raises(TicError, match=r"^s3://b/x: Access Denied$"):
        list(iterate_batches(DataLoader(Refused(), num_workers=num_workers)))
