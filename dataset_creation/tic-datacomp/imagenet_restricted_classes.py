"""Write which ImageNet classes are devices, motor vehicles, ..., dogs, birds, cats, animals, according to WordNet 3.0.

    python dataset_creation/tic-datacomp/imagenet_restricted_classes.py --output-path results/imagenet

Writes imagenet_restricted_classes.json, {group: [class id]}, and imagenet_restricted_classnames.json, {group: [name]}.
"""

import require_venv  # noqa: F401

from tic_clip import package_file
from tic_clip.cli import Parser, run_main
from tic_clip.data.clip_benchmark import CLASSNAMES, imagenet_texts
from tic_clip.storage import read_json, write_json


def main() -> None:
    """Parse the flags, write both files, and print the size of each group."""
    parser = Parser(__doc__)
    parser.add_argument("--output-path", required=True, help="folder to write to")
    folder = parser.parse_args().output_path
    groups = read_json(package_file("tic_clip", "imagenet_groups.json"))
    names = imagenet_texts()[CLASSNAMES]
    named = {group: [names[i] for i in ids] for group, ids in groups.items()}
    write_json(f"{folder}/imagenet_restricted_classes.json", groups)
    write_json(f"{folder}/imagenet_restricted_classnames.json", named)
    for group, ids in groups.items():
        print(f"{group}: {len(ids)} classes")


if __name__ == "__main__":
    run_main(main)
