"""What an order's runs add up to: its accuracy matrix, and methods, orders and seeds side by side.

    python src/report logs_and_outputs/order_1                    one order: prints its table
    python src/report logs_and_outputs --out report --baseline olora      all orders below: writes a report as well

An order's folder holds `outputs/<i>-<dataset>/`; its measures are written there as `order_results.json`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a folder run as a program has only itself on the path

from errors import InputError
from files import write_json
from report.matrix import accuracy_matrix, format_table, measure, order_results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="report", description="The accuracy of every task after every task.")
    parser.add_argument("order_dir", type=Path, help="output folder of an order, with outputs/<i>-<dataset>/ in it")
    options = parser.parse_args(arguments)
    try:
        tasks, matrix = accuracy_matrix(options.order_dir)
        measures = measure(options.order_dir, tasks, matrix)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    print(format_table(tasks, matrix, measures))
    try:
        write_json(options.order_dir / "order_results.json", order_results(tasks, matrix, measures))
    except OSError as error:
        parser.exit(2, f"error: {options.order_dir}: cannot be written ({error.strerror})\n")


if __name__ == "__main__":
    main()
