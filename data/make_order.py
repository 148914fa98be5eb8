"""Write the JSON files of an order of your own, ready for ``bash scripts/order.sh NAME``.

Example: python data/make_order.py --name mine --tasks TC/dbpedia SC/amazon TC/agnews
"""

import argparse
import sys
from pathlib import Path
from typing import Sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
from errors import InputError, entry_point
from order_config import SAMPLING, TASKS, benchmark_datasets, check_name, is_complete, write_order


def make_order(
    name: str,
    tasks: Sequence[str],
    *,
    configs_dir: str | Path = "configs",
    data_dir: str | Path = "CL_Benchmark",
    sampling: str = "full",
    overwrite: bool = False,
) -> tuple[Path, list[str]]:
    """Write ``<configs_dir>/<name>_configs``; return it and the datasets whose files are still to be prepared.

    Args:
        tasks: ``TASK/DATASET`` of each step, first to last.
        data_dir: benchmark; where this folder exists, every dataset must have a folder in it.

    Raises:
        InputError: a bad name, a bad or unknown dataset, or an order that exists and may not be overwritten.
    """
    check_name(name, "--name")
    if name == "ds":
        raise InputError("--name: 'ds'; allowed: another name, ds_configs holds the DeepSpeed files")
    known = benchmark_datasets(data_dir)
    for task in tasks:
        if task.count("/") != 1:
            raise InputError(f"--tasks: {task!r}; allowed: TASK/DATASET with a task of {', '.join(TASKS)}")
        if known and task not in known:
            raise InputError(f"--tasks: {task} is not in {data_dir}; allowed: {', '.join(known)}")
    folder = Path(configs_dir) / f"{name}_configs"
    write_order(folder, [tuple(task.split("/")) for task in tasks], sampling=sampling, overwrite=overwrite)
    return folder, [task for task in tasks if not is_complete(Path(data_dir) / task)]


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="the order's name; its folder is <configs_dir>/<name>_configs")
    parser.add_argument("--tasks", required=True, nargs="+", metavar="TASK/DATASET", help="the steps, first to last")
    parser.add_argument("--configs_dir", default="configs", help="default: %(default)s")
    parser.add_argument("--data_dir", default="CL_Benchmark", help="benchmark to look the datasets up in (%(default)s)")
    parser.add_argument("--sampling", choices=SAMPLING, default="full", help="sampling strategy (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an order of this name")
    arguments = vars(parser.parse_args(argv))
    folder, unprepared = make_order(**arguments)
    print(f"{folder}: {len(arguments['tasks'])} steps; run it with: bash scripts/order.sh {arguments['name']}")
    if unprepared:
        print(
            f"not complete in {arguments['data_dir']}: {', '.join(unprepared)} (see data/prepare_benchmark.py --help)"
        )


if __name__ == "__main__":
    sys.exit(main())
