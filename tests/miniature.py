"""Images and splits for tests; YFCC15M and RedCaps in miniature, in the formats that their sources have."""

import csv
import hashlib
import io
import json
import zipfile
from datetime import UTC, datetime
from itertools import count, islice

import numpy as np
from PIL import Image

from tic_clip.data.split import SIZES, read_sizes
from tic_clip.data.tar import write_shard
from tic_clip.storage import write_json


def make_image(text, kind="JPEG", size=(48, 48)):
    """An image that is another for each text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size).save(file, kind)
    return file.getvalue()


def write_split(folder, *shards, names="{:08d}.tar"):
    """Write each of ``shards``, a list of (key, members), and the table of sizes; return the folder."""
    names = [names.format(i) for i in range(len(shards))]
    counts = {name: write_shard(folder / name, content) for name, content in zip(names, shards, strict=True)}
    write_json(folder / SIZES, counts)
    read_sizes.cache_clear()  # a process of its own would read the new table
    return str(folder)


def held_out(dataset, key, share=0.01, seed=0):
    """Whether a key is of the test set, as create_splits.py has it."""
    return int(hashlib.sha256(f"{seed}/{dataset}/{key}".encode()).hexdigest(), 16) < share * 2**256


def keys_of(dataset, step, train, test, length):
    """Keys of ``length`` hex digits, of which ``train`` are to train on and ``test`` are held out."""
    for wanted, number in ((False, train), (True, test)):
        keys = (hashlib.md5(f"{dataset} {step} {i}".encode()).hexdigest()[:length] for i in count())
        yield from islice((key for key in keys if held_out(dataset, key) == wanted), number)


def seconds(year, place=0):
    return int(datetime(year, 6, 1, tzinfo=UTC).timestamp()) + 3600 * place


def write_yfcc(folder, train=40, test=8):
    """yfcc15m.csv, and images/: half of them files, the others in one zip archive for each first three digits."""
    rows = []
    for year in (2005, 2009, 2012, 2014):
        for place, key in enumerate(keys_of("yfcc15m", year, train, test, 32)):
            text = f"<b>Tom</b> &amp; {key[:4]},\nby the sea" if place % 3 else "a+%22walk%22"
            rows.append((key, f"Picture {place}", text, "sea,new+york", seconds(year, place)))
            path, data = f"{key[3:6]}/{key}.jpg", make_image(key)
            images = folder / "images"
            if place % 2:
                images.mkdir(parents=True, exist_ok=True)
                with zipfile.ZipFile(images / f"{key[:3]}.zip", "a") as archive:
                    archive.writestr(path, data)
            else:
                (images / key[:3] / path).parent.mkdir(parents=True, exist_ok=True)
                (images / key[:3] / path).write_bytes(data)
    with open(folder / "yfcc15m.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["key", "title", "description", "usertags", "dateuploaded"])
        table.writerows(rows)


def write_redcaps(folder, train=40, test=8):
    """annotations/{subreddit}_{year}.json with odd types, and images/{subreddit}/; one is missing, one no image."""
    (folder / "annotations").mkdir(parents=True)
    for year in (2013, 2018, 2019, 2020):
        rows = []
        for place, key in enumerate(keys_of("redcaps", year, train + 2, test, 6)):
            subreddit = ("birds", "house_plants")[place % 2]
            when = (seconds(year, place), str(seconds(year, place)), float(seconds(year, place)))[place % 3]
            rows.append({"image_id": key, "subreddit": subreddit, "caption": f"[USR] and {key}", "created_utc": when})
            path = folder / f"images/{subreddit}/{key}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if place != train:
                path.write_bytes(make_image(key, "PNG") if place % 5 else make_image(key))
            if place == train + 1:
                path.write_text("<html>removed</html>")
        for subreddit in ("birds", "house_plants"):
            mine = [row for row in rows if row["subreddit"] == subreddit]
            text = json.dumps({"info": {"year": year}, "annotations": mine})
            (folder / f"annotations/{subreddit}_{year}.json").write_text(text)
