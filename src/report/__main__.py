"""Reports: an order's accuracy matrix, or methods, orders and seeds side by side.

    python src/report logs_and_outputs/order_1                 one order: prints its table, writes order_results.json
    python src/report logs_and_outputs more_runs --out report  every order below: writes a report into that folder

An order's folder holds `outputs/<i>-<dataset>/`. The report is `report.html` (one file, opens offline), `report.md`,
`figures/*.svg`, `measures.csv` and `accuracy.csv`. `--figures FOLDER` also writes the figures as PDF, for papers.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a program, a folder has only itself on the path

from errors import InputError, entry_point
from files import write_json
from report.matrix import accuracy_matrix, format_table, measure, unfinished_steps
from report.runs import distinct, find_runs, is_order, select

CONTENT = {"report.html", "report.md", "figures", "measures.csv", "accuracy.csv"}  # of a report's folder


@entry_point
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+", help="an order's output folder, or folders with orders below")
    parser.add_argument("--out", type=Path, help="folder of the report; default: report/ in the first folder")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="also write the figures as PDF into this folder")
    options = parser.parse_args(arguments)
    first = options.folders[0]
    try:
        if len(options.folders) == 1 and options.out is options.figures is None and is_order(first):
            report_order(first)
        else:
            report_runs(options.folders, options.out or first / "report", options.figures)
    except OSError as error:
        raise InputError(f"{error.filename or options.out or first}: cannot be written ({error.strerror})") from None


def report_order(order_dir: Path) -> None:
    """Print an order's table, and write its measures to `order_results.json`, with 4 decimals."""
    tasks, matrix = accuracy_matrix(order_dir)
    measures = measure(order_dir, tasks, matrix)
    print(format_table(tasks, matrix, measures))
    rounded = {name: value if value is None else round(value, 4) for name, value in measures.items()}
    results = {"tasks": tasks, "accuracy": matrix, **rounded, "unfinished": unfinished_steps(tasks, matrix)}
    write_json(order_dir / "order_results.json", results)


def report_runs(folders: Sequence[Path], out: Path, pdf_folder: Path | None) -> None:
    """Write the report over every order below the folders, and print its summaries."""
    if out.exists():
        others = sorted({path.name for path in out.iterdir()} - CONTENT) if out.is_dir() else ["a file"]
        if others:  # replacing the folder would delete them
            raise InputError(f"--out: {out} is or holds {others[0]}; allowed: a new folder, or one with a report alone")
    from report.page import conclusion, write_report  # imports matplotlib, which one order's table does without

    runs = find_runs(folders)
    write_report(runs, out, pdf_folder)
    for model in distinct(runs, "model"):
        print(f"{model}: {conclusion(select(runs, model=model))}")
    print(f"report: {out / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
