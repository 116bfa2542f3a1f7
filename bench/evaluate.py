"""Images a second of evaluation, by precision and number of models, beside the loader alone.

    .venv/bin/python bench/evaluate.py
    .venv/bin/python bench/evaluate.py --model ViT-B-16 --images 20000 --image 256 --workers 12    # on a GPU

One retrieval set of noise (JPEGs, a caption each) is evaluated with random weights; each row is one call of the library
after a first one on a few images. "seconds" holds reading, decoding, encoding and recall, not the imports.
"""

import tempfile
import time
from pathlib import Path

from tic_clip.cli import Parser
from tic_clip.evaluation.evaluate import Settings, evaluate
from tic_clip.evaluation.tasks import task_of
from tic_clip.models import make_model, named_model

KEY = "tic/emoji/retrieval/yearly/2014"


def main() -> None:
    """Write the set and the checkpoints, evaluate, and print a table."""
    parser = Parser(__doc__)
    parser.add_argument("--model", default="ViT-Tiny-8-48", help="OpenCLIP's name of it (default: ViT-Tiny-8-48)")
    parser.add_argument("--images", type=int, default=2000, help="images of the set (default: 2000)")
    parser.add_argument("--image", type=int, default=64, help="width of the JPEGs in pixels (default: 64)")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data (default: 0)")
    args = parser.parse_args()
    import torch
    from train import write_samples

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(
        "| precision | models | seconds | images/s | images × models/s |",
        "| --- | ---: | ---: | ---: | ---: |",
        sep="\n",
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, count in (("warm", 64), ("data", args.images)):
            write_samples(Path(folder, name, "tic/emoji/yearly/eval/retrieval/2014"), count, args.image)
        models = []
        for number in range(4):
            torch.save(make_model(args.model, "cpu")[0].state_dict(), f"{folder}/{number}.pt")
            models.append(named_model(f"{args.model} {folder}/{number}.pt", "emoji"))
        for precision in ("fp32", "amp", "amp_bf16"):
            for count in (1, 4):
                settings = Settings(device=device, precision=precision, workers=args.workers, models_at_once=count)
                for name in ("warm", "data"):
                    start = time.perf_counter()
                    evaluate(
                        models[:count],
                        [task_of(KEY, f"{folder}/{name}")],
                        f"{folder}/{precision}-{count}-{name}",
                        settings,
                    )
                seconds = time.perf_counter() - start
                rate = args.images / seconds
                print(f"| {precision} | {count} | {seconds:.1f} | {rate:,.0f} | {rate * count:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
