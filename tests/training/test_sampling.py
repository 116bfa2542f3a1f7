"""Exact sampling: how often each sample is read, by whom, and that it does not depend on ranks, workers or restarts."""

import itertools
import os
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_png
from miniature import make_image, write_split
from open_clip.transform import image_transform

from tic_clip import TicError
from tic_clip.data.decode import decode_image
from tic_clip.data.split import split_sizes
from tic_clip.storage import upload, write_json
from tic_clip.training import hooks, loader
from tic_clip.training.sampling import apportion, draws, interleave, slices, source_counts, source_ranges


def make_plan(sources, batch_size, iterations, block, **more):
    """A plan that reads ``samples`` of each source; more settings replace its own."""
    sources = [{"name": f"s{i}", **source} for i, source in enumerate(sources)]
    plan = {"step": "now", "seed": 0, "batch_size": batch_size, "iterations": iterations, "block": block}
    return plan | {"sources": sources} | more


# --- Pure: positions ---


def test_apportion_gives_largest_remainders_and_interleave_proportions():
    assert apportion([1, 1, 1], 10) == [4, 3, 3]
    assert apportion([50, 30, 20], 10) == [5, 3, 2]
    assert apportion([2, 3], 1) == [0, 1]
    assert sum(apportion([858, 776, 755, 400], 9984)) == 9984
    assert "".join("abc"[i] for i in interleave([6, 3, 0], [5, 2, 0])) == "ba"


def test_source_counts_of_a_billion_samples_are_exact_and_proportional():
    quotas = apportion([311, 977, 13], 1_847_296_000)
    for position in (1, 90_112, 1_000_000_007, 1_847_295_999):
        counts = source_counts(quotas, position)
        assert sum(counts) == position
        assert all(abs(c - position * q / sum(quotas)) < 2 for c, q in zip(counts, quotas, strict=True))


def items(sizes, seed, positions):
    """(pass, shard, sample) at each of the positions."""
    pieces = slices(np.array(sizes), seed, positions)
    return [(piece.number, piece.shard, i) for piece in pieces for i in range(piece.start, piece.stop)]


def test_each_pass_has_an_order_of_its_own():
    shards = [shard for _, shard, _ in items([1] * 50, (0,), range(100))]
    assert shards[:50] != shards[50:]
    assert sorted(shards[:50]) == sorted(shards[50:]) == list(range(50))


def test_shards_are_drawn_with_replacement_and_read_from_anywhere_to_everywhere():
    sizes = np.array([3, 1, 6])
    counts, starts = Counter(), Counter()
    for seed in range(400):
        pieces = list(itertools.islice(draws(sizes, (seed,), 0), 12))
        starts[pieces[0].shard, pieces[0].start] += 1
        for number, parts in itertools.groupby(pieces[:-2], key=lambda piece: piece.number):
            parts = list(parts)
            shard, read = parts[0].shard, [i for piece in parts for i in range(piece.start, piece.stop)]
            assert read == [(read[0] + i) % sizes[shard] for i in range(len(read))]
            if number < pieces[-3].number:
                assert sorted(read) == list(range(sizes[shard]))
                counts[shard] += 1
    assert len(starts) == 10  # a worker that reads little of a shard does not always read its beginning
    assert all(abs(counts[shard] / counts.total() - 1 / 3) < 0.05 for shard in range(3))
    first = [list(itertools.islice(draws(sizes, seed, start), 50)) for seed in ((0,), (1,)) for start in (0, 64)]
    assert len({tuple(piece.shard for piece in pieces) for pieces in first}) == 4
    assert list(itertools.islice(draws(sizes, (0,), 64), 50)) == first[1]


def read_positions(plan, sizes, world_size, num_workers):
    """{(block, rank): [(source, shard, sample), …]}, through the ranges of every worker."""
    blocks = range(plan["iterations"] // plan["block"])
    found = defaultdict(list)
    for block, rank, worker in itertools.product(blocks, range(world_size), range(num_workers)):
        ranges = source_ranges(plan, block, rank, world_size, worker, num_workers)
        for source, positions in enumerate(ranges):
            found[block, rank] += [(source, *item[1:]) for item in items(sizes[source], (source,), positions)]
    return found


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (1, 3), (2, 1), (2, 4), (4, 2), (8, 5)])
@pytest.mark.parametrize(
    ("iterations", "block", "quotas"), [(10, 5, [58, 22]), (9, 3, [52, 20]), (20, 4, [160, 0]), (2, 1, [12, 4])]
)
def test_every_sample_is_read_floor_or_ceil_times(iterations, block, quotas, world_size, num_workers):
    """Two splits of 21 and 8 samples, fewer shards than workers; the last budget is less than a pass."""
    sizes = [[10, 11], [8]]
    plan = make_plan([{"samples": quota} for quota in quotas], 8, iterations, block)
    found = read_positions(plan, sizes, world_size, num_workers)
    assert {len(part) for part in found.values()} == {8 * block // world_size}  # nobody waits for another
    counts = Counter(itertools.chain.from_iterable(found.values()))
    for source, (shards, quota) in enumerate(zip(sizes, quotas, strict=True)):
        every = [counts[source, shard, i] for shard, size in enumerate(shards) for i in range(size)]
        assert sum(every) == quota
        assert set(every) <= {quota // sum(shards), -(-quota // sum(shards))}
    for number, alone in enumerate(read_positions(plan, sizes, 1, 1).values()):  # so a step can resume after any block
        assert sorted(alone) == sorted(item for rank in range(world_size) for item in found[number, rank])


# --- From shards ---


def make_split(folder, sizes, bad=()):
    """Shards of these sizes; sample i of shard s has the caption "s i"; those in ``bad`` are bad in four ways."""
    faults, shards = itertools.cycle([{"png": b"not an image"}, {"png": None}, {"txt": None}, {"txt": b" \n"}]), []
    for shard, size in enumerate(sizes):
        samples = {f"{shard} {i}": {"png": make_png(7), "txt": f"{shard} {i}".encode()} for i in range(size)}
        samples |= {name: samples[name] | next(faults) for name in samples if name in bad}
        names = [f"{shard:016x}{i:016x}-0" for i in range(size)]
        content = [{suffix: data for suffix, data in members.items() if data} for members in samples.values()]
        shards.append(list(zip(names, content, strict=True)))
    return write_split(folder, *shards)


def source(split, samples, used=None):
    size = sum(split_sizes(split).values())
    return {"split": split, "size": size, "used": used or size, "samples": samples}


def read(plan, world_size=1, num_workers=1, load=lambda data: decode_image(data) and None, counts=None):
    """The items of a step, [(image, caption), …] of each (block, rank)."""
    sources, found, functions = loader.read_sources(plan), defaultdict(list), (load, lambda text: [text])
    counts = defaultdict(Counter) if counts is None else counts
    blocks = range(plan["iterations"] // plan["block"])
    for block, rank, worker in itertools.product(blocks, range(world_size), range(num_workers)):
        ranges = source_ranges(plan, block, rank, world_size, worker, num_workers)
        found[block, rank] += loader.read_samples(sources, ranges, functions, counts)
    return found


def captions(plan, *arguments, **options):
    found = read(plan, *arguments, **options)
    return [text for part in found.values() for _, text in part]


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def tokens(text):
    return torch.tensor([[int(word) for word in text.split()]])


def open_loader(tmp_path, plan, world_size=1, rank=0, workers=0, first=0, preprocess=to_tensor):
    """OpenCLIP's ``DataInfo``, through the hook."""
    write_json(tmp_path / "plan.json", plan)
    args = SimpleNamespace(train_data=str(tmp_path / "plan.json"), batch_size=plan["batch_size"] // world_size)
    args.world_size, args.rank, args.workers, args.device = world_size, rank, workers, "cpu"
    return hooks.get_exact_dataset(args, preprocess, True, first, tokens)


def batches(info, first, end):
    """The batches of some blocks, as lists."""
    for block in range(first, end):
        info.set_epoch(block)
        yield from ((images.tolist(), texts.tolist()) for images, texts in info.dataloader)


@pytest.mark.parametrize("workers", [0, 3])
def test_the_loader_gives_every_block_in_equal_batches_wherever_it_begins(tmp_path, workers):
    """What a restart needs; with real loader processes, which live from block to block."""
    split = make_split(tmp_path / "a", [7, 6])
    plan = make_plan([source(split, 40)], 8, 5, 1)

    def read_from(first, rank):
        info = open_loader(tmp_path, plan, 2, rank, workers, first)
        yield from batches(info, first, 5)
        assert (info.dataloader.num_batches, info.dataloader.num_samples) == (1, 8)
        assert info.dataloader.counts == {"s0": {"read": 4 * (5 - first)}}

    every = [list(read_from(0, rank)) for rank in range(2)]
    assert [len(part) for part in every] == [5, 5]
    assert {(len(images), len(texts)) for part in every for images, texts in part} == {(4, 4)}
    counts = Counter(tuple(text) for part in every for _, texts in part for text in texts)
    assert len(counts) == 13
    assert set(counts.values()) <= {3, 4}
    assert list(read_from(3, 1)) == every[1][3:]


def test_the_samples_of_a_worker_are_shuffled_and_interleaved(tmp_path):
    splits = [make_split(tmp_path / "a", [60]), make_split(tmp_path / "b", [0, 30, 30])]
    plan = make_plan([source(split, 60) for split in splits], 8, 15, 5)
    parts = [[text for _, text in part] for part in read(plan, 2, 2).values()]
    for part in parts:
        from_a = [text.startswith("0 ") for text in part]
        assert abs(sum(from_a) - len(part) / 2) <= 2
        assert max(len(list(group)) for _, group in itertools.groupby(from_a)) <= 2
    numbers = [int(text.split()[1]) for text in parts[0] if text.startswith("0 ")]
    assert numbers != sorted(numbers)


def test_steps_and_seeds_read_the_same_split_in_their_own_order(tmp_path):
    plan = make_plan([source(make_split(tmp_path / "a", [10] * 10), 40)], 8, 5, 5)
    first = captions(plan)
    assert captions(plan) == first
    assert set(captions(plan | {"step": "next"})) != set(first)
    assert set(captions(plan | {"seed": 1})) != set(first)


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_augmentation_depends_on_the_place_in_the_line_only(tmp_path, backend):
    plan = make_plan([source(make_split(tmp_path / "a", [20]), 40)], 8, 5, 5)
    load, _ = loader.image_functions(backend, image_transform(8, is_train=True))
    data = make_image("in place of each sample's")
    parts = [read(plan, 1, num_workers, lambda _: load(data))[0, 0] for num_workers in (1, 3)]
    alone, shared = (sorted((text, image.numpy().tobytes()) for image, text in part) for part in parts)
    assert alone == shared
    assert len({draw for _, draw in alone}) > 20  # each pass draws anew: without that they would be 20 at most


def test_undecodable_samples_are_counted_and_replaced_from_their_split(tmp_path, caplog):
    """So are those without image or caption; also a whole shard, or all of a source that a worker should read."""
    bad = {f"1 {i}" for i in range(9)}
    split, other = make_split(tmp_path / "a", [10, 9, 10], bad), make_split(tmp_path / "b", [4], {"0 0", "0 1"})
    plan = make_plan([source(split, 44), source(other, 4)], 12, 4, 1)
    counts = defaultdict(Counter)
    found = captions(plan, 2, 3, counts=counts)
    assert len(found) == 48
    assert not bad & set(found)
    assert (counts["s0"]["read"], counts["s1"]["read"]) == (44, 4)
    assert counts["s0"]["undecodable"] >= 9
    assert counts["s1"]["undecodable"] >= 2
    assert f"{split}/00000001.tar:" in caplog.text
    reasons = ("cannot identify image file", "no image", "empty caption")
    assert all(f"is left out: {why}" in caplog.text for why in reasons)


def test_with_replacement_each_source_gives_its_share_and_each_part_its_own_draw(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "SHUFFLE_INITIAL", 20)  # else each worker reads a thousand for its ten
    splits = [make_split(tmp_path / "a", [9] * 8, {f"{i} 4" for i in range(8)}), make_split(tmp_path / "b", [5])]
    sources = [source(split, n) for split, n in zip(splits, (60, 20), strict=True)]
    plan = make_plan(sources, 8, 10, 5, sampling="resampled")
    counts = defaultdict(Counter)
    parts = read(plan, 2, 2, counts=counts)
    assert {source: numbers["read"] for source, numbers in counts.items()} == {"s0": 60, "s1": 20}
    assert counts["s0"]["undecodable"] > 0
    found = Counter(text for part in parts.values() for _, text in part)
    from_a = Counter({text: n for text, n in found.items() if not text.startswith("0 ")})
    assert len(from_a) < 55  # 60 of 64 without replacement would be 60 different ones
    assert len({tuple(text for _, text in part) for part in parts.values()}) == 4
    assert read(plan, 2, 2) == parts
    assert captions(plan | {"seed": 1}, 2, 2) != captions(plan, 2, 2)


@pytest.mark.parametrize("sampling", ["exact", "resampled"])
@pytest.mark.parametrize(
    ("workers", "fault", "message"),
    [
        (0, "undecodable", r"^s0: none of \d+ samples can be used, \S+/a/00000000.tar:\w+-0 for one: \w.*$"),
        (2, "missing", r"^\S+/a/00000000.tar is missing$"),
        (0, "short", r"^\S+/a/00000000.tar has fewer samples than its sizes.json says: "),
    ],
)
def test_an_error_is_one_line_without_a_loader_processs_traceback(tmp_path, workers, fault, message, sampling):
    split = make_split(tmp_path / "a", [2], {"0 0", "0 1"} if fault == "undecodable" else ())
    if fault == "missing":
        (tmp_path / "a/00000000.tar").unlink()
    elif fault == "short":
        write_json(tmp_path / "a/sizes.json", {"00000000.tar": 4})
    plan = make_plan([source(split, 16)], 8, 2, 2, sampling=sampling)
    with pytest.raises(TicError, match=message):
        list(open_loader(tmp_path, plan, workers=workers).dataloader)


@pytest.mark.parametrize("size", [(90, 60), (40, 40), (30, 200)])
def test_both_image_backends_make_the_same_input(tmp_path, size):
    """Of JPEGs, crops of them enlarged or made smaller: at most two of 255 levels apart, as normalised."""
    content = [(f"{i:032x}-0", {"jpg": make_image(f"{i}", size=size), "txt": b"1 2"}) for i in range(8)]
    plan, transform = make_plan([source(write_split(tmp_path / "a", content), 8)], 8, 1, 1), image_transform(48, True)
    pil, ours = (
        next(iter(open_loader(tmp_path, plan | {"image_backend": backend}, preprocess=transform).dataloader))[0]
        for backend in ("pil", "torchvision")
    )
    assert (ours.dtype, ours.shape) == (pil.dtype, pil.shape) == (torch.float32, (8, 3, 48, 48))
    levels = (ours - pil).abs() * torch.tensor(transform.transforms[-1].std).view(3, 1, 1) * 255
    assert levels.max() < 2.01
    assert levels.mean() < 0.05
    assert torch.equal(pil, next(iter(open_loader(tmp_path, plan, preprocess=transform).dataloader))[0])


def test_what_a_loader_refuses(tmp_path):
    plan = make_plan([source(make_split(tmp_path / "a", [8]), 8)], 8, 1, 1, image_backend="torchvision")
    with pytest.raises(TicError, match="the plan's batch is 8, not 2 × 3 ranks"):
        open_loader(tmp_path, plan, world_size=3)
    more = {"color_jitter": (0.3, 0.3, 0.3, 0.1), "color_jitter_prob": 0.8}
    with pytest.raises(TicError, match="--aug-cfg needs --image_backend pil"):
        open_loader(tmp_path, plan, preprocess=image_transform(48, is_train=True, aug_cfg=more))


def test_a_part_of_a_source_is_the_first_of_each_shard_and_the_rest_is_never_read(tmp_path):
    split = make_split(tmp_path / "a", [10, 6, 4])
    counts = Counter(captions(make_plan([source(split, 40, used=10)], 8, 5, 5), 2, 2))
    assert counts == {f"{shard} {i}": 4 for shard, used in enumerate([5, 3, 2]) for i in range(used)}


def test_sources_in_a_cloud_are_read_like_local_ones(tmp_path, s3, s3_server):
    """With a cache, loader processes of all ranks fetch each shard once."""
    split, kept = make_split(tmp_path / "a", [7, 6, 5, 4]), tmp_path / "cache"
    for name in os.listdir(split):
        upload(tmp_path / "a" / name, f"{s3}/a/{name}")
    local, cloud = (make_plan([source(folder, 80)], 8, 10, 5) for folder in (split, f"{s3}/a"))
    assert captions(cloud, 1, 2) == captions(local, 1, 2)
    cloud["keep"] = {"cache": str(kept), "cache_gb": 1}
    s3_server.requests.clear()
    for rank in range(2):
        expected, found = ([*batches(open_loader(tmp_path, plan, 2, rank, workers=2), 0, 2)] for plan in (local, cloud))
        assert found == expected
        assert len(found) == 10
    assert [s3_server.count("GET", f"/a/{shard:08d}.tar") for shard in range(4)] == [1] * 4
    assert len(list(kept.glob("*.tar"))) == 4
