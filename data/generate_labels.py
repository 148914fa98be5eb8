"""Write labels.json, the list of answers that a prompt offers, from the labels of train.json.

FOLDER is the folder of a dataset or of a benchmark. An existing labels.json is kept, and checked, unless --overwrite is
given: its order is the order of the options in every prompt, so it is part of the task. Tasks of free-text answers, as
the instruction file declares them, get none.

Example: python data/generate_labels.py CL_Benchmark/TC/mine
"""

import argparse
import sys
from pathlib import Path
from typing import Sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
from errors import InputError, entry_point
from files import check_writable, read_json, write_json
from order_config import SUBSETS, benchmark_datasets
from uie_dataset_lora import UNLABELLED, check_labels, read_instructions, read_labelled, read_labels

INSTRUCTIONS = Path(__file__).resolve().parent.parent / "configs" / "instruction_config.json"


def dataset_folders(folder: str | Path) -> list[Path]:
    """The folder itself if it holds train.json, else the datasets of a benchmark that do.

    Raises:
        InputError: there is neither.
    """
    folder = Path(folder)
    candidates = [folder, *(folder / name for name in benchmark_datasets(folder))]
    found = [candidate for candidate in candidates if (candidate / "train.json").is_file()]
    if not found:
        raise InputError(f"{folder}: no train.json; allowed: a dataset's folder, or a folder of TASK/DATASET folders")
    return found


def generate_labels(folder: str | Path, *, sort: bool = False, overwrite: bool = False) -> bool:
    """Write labels.json of one dataset and check that it covers train, dev and test; False if it already existed.

    Args:
        sort: sort the labels; otherwise they come in the order in which train.json first uses them.
        overwrite: replace labels.json if it exists.

    Raises:
        InputError: an unreadable file, an invalid example, a label that is not in the list, labels that the score
            cannot distinguish, or a folder that cannot be written. Nothing is written.
    """
    folder = Path(folder)
    path = folder / "labels.json"
    keep = path.exists() and not overwrite
    labels = read_labels(path) if keep else _used_labels(folder / "train.json", sort)
    for subset in SUBSETS:
        read_labelled(folder / f"{subset}.json", labels)
    if not keep:
        check_labels(labels, f"{folder / 'train.json'}, label")
        check_writable(folder)
        if path.is_dir():
            raise InputError(f"{path}: a folder; the file belongs there")
        write_json(path, labels)
    return not keep


def _used_labels(path: Path, sort: bool) -> list[str]:
    """The distinct labels of a file. Malformed examples are left to `read_labelled`, which names them."""
    content = read_json(path)
    used = [row.get("label") for row in content if isinstance(row, dict)] if isinstance(content, list) else []
    if UNLABELLED in used:
        raise InputError(f"{path}, example {used.index(UNLABELLED)}: label '-', which stands for none; remove such "
                         "examples, or write labels.json by hand if '-' is an answer")
    labels = list(dict.fromkeys(label for label in used if isinstance(label, str)))
    return sorted(labels) if sort else labels


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a dataset's folder, or a benchmark such as CL_Benchmark")
    parser.add_argument("--sort", action="store_true", help="sort the labels, instead of order of first appearance")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing labels.json")
    parser.add_argument("--instruction_file", type=Path, default=INSTRUCTIONS, help="declares free-text tasks")
    arguments = parser.parse_args(argv)
    instructions = read_instructions(arguments.instruction_file)
    for folder in dataset_folders(arguments.folder):
        if instructions.get(folder.resolve().parent.name, {}).get("metric") == "rougeL":
            print(f"{folder}: free-text answers, so no labels.json")
            continue
        written = generate_labels(folder, sort=arguments.sort, overwrite=arguments.overwrite)
        print(f"{folder / 'labels.json'}: {'written' if written else 'kept'}; covers train, dev and test")


if __name__ == "__main__":
    sys.exit(main())
