"""Write the JSON files of an order of your own, for ``bash scripts/order.sh NAME``; docs/ORDERS.md describes them.

    python data/make_order.py --name mine --tasks TC/dbpedia SC/amazon TC/agnews
    python data/make_order.py --name short --from order4 --drop WiC MultiRC
    python data/make_order.py --name turned --from order1 --tasks agnews yahoo amazon dbpedia
"""

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
from errors import InputError, entry_point  # noqa: E402
from order_config import SAMPLING, benchmark_datasets, check_name, is_complete, read_order, write_order  # noqa: E402

MINI_BENCHMARK = ROOT / "data" / "mini_benchmark"


def make_order(
    name: str,
    tasks: Sequence[str],
    *,
    base: str | None = None,
    drop: Sequence[str] = (),
    configs_dir: str | Path = "configs",
    data_dir: str | Path = "CL_Benchmark",
    sampling: str = "full",
    overwrite: bool = False,
) -> tuple[Path, list[str]]:
    """Write ``<configs_dir>/<name>_configs``; return it and the ``TASK/DATASET`` of each step.

    Args:
        tasks: ``TASK/DATASET`` of each step, first to last, or ``DATASET`` where only one task has it; with `base`,
            an empty list for all of its steps.
        base: an order in `configs_dir`, whose steps are the ones to choose from; `drop` leaves some of them out.
        data_dir: benchmark; if this folder exists, every dataset must have a folder in it.

    Raises:
        InputError: a bad name, a bad or unknown dataset, or an order that exists and may not be overwritten.
    """
    check_name(name, "--name")
    if name == "ds":
        raise InputError("--name: 'ds'; allowed: another name, ds_configs holds the DeepSpeed files")
    if re.fullmatch("order_[0-9]+", name):
        raise InputError(f"--name: {name!r}; allowed: another name, as the results of {name.replace('_', '')} would be "
                         "in the same folder")
    known, where = benchmark_datasets(data_dir), data_dir
    if base is not None:
        where = Path(configs_dir) / f"{base}_configs"
        known = [f"{step.task}/{step.dataset}" for step in read_order(where)]
    elif not tasks:
        raise InputError("--tasks: missing; one TASK/DATASET or more, or --from an order")
    chosen = [_find(task, known, where, "--tasks") for task in tasks] or known
    dropped = {_find(task, chosen, where, "--drop") for task in drop}
    chosen = [task for task in chosen if task not in dropped]
    folder = Path(configs_dir) / f"{name}_configs"
    write_order(folder, [tuple(task.split("/")) for task in chosen], sampling=sampling, overwrite=overwrite)
    return folder, chosen


def _find(task: str, known: Sequence[str], where: str | Path, flag: str) -> str:
    """The known ``TASK/DATASET`` that `task` means; if none are known, `task` itself."""
    if task.count("/") != 1 and not (known and "/" not in task):
        raise InputError(f"{flag}: {task!r}; allowed: TASK/DATASET")
    found = [one for one in known if task in (one, one.split("/")[1])] if known else [task]
    if len(found) != 1:
        fault = f"is {' and '.join(found)}" if found else "is not there"
        raise InputError(f"{flag}: {task} {fault} in {where}; allowed: {', '.join(known)}")
    return found[0]


def command(name: str, data_dir: str | Path, configs_dir: str | Path = "configs") -> str:
    """The command that runs an order on the data that it was made for; the scripts know only orders in configs/."""
    if Path(configs_dir).resolve() != ROOT / "configs":
        return f"python src/run_order.py {shlex.quote(f'{configs_dir}/{name}_configs')} --data_dir ..."
    if Path(data_dir).resolve() == MINI_BENCHMARK:
        return f"bash scripts/order.sh --tiny {name}"
    own = "" if Path(data_dir) == Path("CL_Benchmark") else f"DATA_DIR={shlex.quote(str(data_dir))} "
    tiny = f"DATA_DIR={shlex.quote(str(data_dir))} bash scripts/order.sh --tiny {name}"
    return f"{own}bash scripts/order.sh {name}   (on a tiny model: {tiny})"


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="the order's name; its folder is <configs_dir>/<name>_configs")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK/DATASET", help="the steps, first to last; the "
                        "task may be left out where only one has the dataset")
    parser.add_argument("--from", dest="base", metavar="ORDER", help="take the steps from this order, such as order4")
    parser.add_argument("--drop", nargs="+", default=[], metavar="DATASET", help="leave these steps out")
    parser.add_argument("--configs_dir", default="configs", help="default: %(default)s")
    parser.add_argument("--data_dir", default="CL_Benchmark", help="benchmark to look the datasets up in (%(default)s)")
    parser.add_argument("--sampling", choices=SAMPLING, default="full", help="sampling strategy (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing order of this name")
    options = parser.parse_args(argv)
    folder, tasks = make_order(**vars(options))
    print(f"{folder}: {' > '.join(tasks)}; run it with: "
          f"{command(options.name, options.data_dir, options.configs_dir)}")
    if unprepared := [task for task in tasks if not is_complete(Path(options.data_dir) / task)]:
        print(f"not complete in {options.data_dir}: {', '.join(unprepared)}; the published datasets come "
              "from data/prepare_benchmark.py, a labels.json from data/generate_labels.py")


if __name__ == "__main__":
    sys.exit(main())
