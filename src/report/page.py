"""The report on many runs: a page in Markdown and in HTML (one file, no network), figures and CSV tables.

The page is written as Markdown, from which the HTML is made.
"""

import csv
import re
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import markdown
import numpy as np
from matplotlib.figure import Figure

from files import atomic_folder, read_object
from report import figures as draw
from report.bootstrap import Interval
from report.matrix import MEASURES
from report.runs import (
    Run, base_method, distinct, finished, interval, is_ceiling, natural, paired_difference, ranked_methods, select,
    setting, summarise,
)  # fmt: skip

TITLE = "Continual learning: methods side by side"
HERE = Path(__file__).parent
STYLE = (HERE / "page.css").read_text(encoding="utf-8")
PUBLISHED = read_object(HERE / "published.json")
"""Results by model, taken from secondary summaries, not from the papers' own tables; means over the orders."""
NOTE = (
    "AP: average performance, the mean exact match (free text: ROUGE-L) over tasks after the last one, in per cent; "
    "BWT: backward transfer; F: forgetting. ± is the standard deviation over runs (orders and seeds). 'Against the "
    "best' pairs runs of the same order and seed with those of the best method, the ceiling aside; in brackets the "
    "95 % interval over test examples and seeds. A difference whose interval contains 0 is not significant, nor is one "
    "with '(one seed)', whose interval is over test examples alone; the best is chosen from the same answers, so even "
    "between equal methods an interval may exclude 0. Methods that lack an order follow the others. Trained: most "
    "trainable parameters of a task; stored: what the last task saves. Definitions: docs/METRICS.md."
)
BY_CONTENT = ("input_files", "base_model")  # digests, which say nothing to a reader
OPTIONAL = {"average_over_rows": "over examples", "forward_transfer": "FWT", "unseen_accuracy": "unseen"}


def write_report(runs: Sequence[Run], folder: Path, pdf_folder: Path | None = None) -> None:
    """Write `report.html`, `report.md`, `figures/*.svg`, `measures.csv` and `accuracy.csv`, all or none of them, and
    each figure as PDF into `pdf_folder`."""
    figures: dict[str, Figure] = {}
    look = draw.styles(distinct(runs, "method"))
    lines = [f"# {TITLE}"]
    for model in distinct(runs, "model"):
        lines += _model_lines(select(runs, model=model), figures, look)
    text = "\n\n".join([*lines, *_foot(runs)]) + "\n"
    pictures = {name: draw.svg(figure) for name, figure in figures.items()}
    with atomic_folder(folder) as partial:
        (partial / "figures").mkdir()
        for name, picture in pictures.items():
            (partial / "figures" / f"{name}.svg").write_text(picture, encoding="utf-8")
        (partial / "report.md").write_text(text, encoding="utf-8")
        (partial / "report.html").write_text(html(text, pictures), encoding="utf-8")
        write_csv(partial / "measures.csv", [(run, _measures(run)) for run in runs])
        write_csv(partial / "accuracy.csv", [(run, cell) for run in runs for cell in _cells(run)])
    if pdf_folder is not None:
        pdf_folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(pdf_folder / f"{name}.pdf")


def html(text: str, pictures: Mapping[str, str]) -> str:
    """The Markdown page as one HTML file with its pictures."""
    body = markdown.markdown(text, extensions=["tables"])
    body = body.replace("<table>", "<div><table>").replace("</table>", "</table></div>")
    shown = r'<p><img alt="" src="figures/(.+?)\.svg" /></p>'
    body = re.sub(shown, lambda found: f"<figure>{pictures[found[1]]}</figure>", body)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{TITLE}</title><style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def conclusion(runs: Sequence[Run]) -> str:
    """Say which method is best, by how much and at what cost; `runs` are those of one model."""
    methods = [name for name in ranked_methods(runs) if summarise(select(runs, method=name), "average_performance")]
    if not methods:
        return "No order is finished yet."
    sequential = [method for method in methods if not is_ceiling(method)] or methods
    best = sequential[0]
    own = select(runs, method=best)
    result, transfer = (summarise(own, name) for name in ("average_performance", "backward_transfer"))
    named = f"Best: {best}, average" if len(methods) > 1 else f"{best}: average"
    change = f", backward transfer {transfer.mean:+.1f}" if transfer else ""
    said = [f"{named} performance {result} over {_counted(result.count, 'run')}{change}."]
    others = [method for method in sequential if base_method(method) != base_method(best)]
    rivals = dict.fromkeys([*sequential[1:2], *others[:1]])  # the next may be a variant of the best
    said += [_lead(own, select(runs, method=rival), rival) for rival in rivals]
    seconds, trained, stored = _costs(own)
    of_model = own[0].values and own[0].trained_values and 100 * own[0].trained_values / own[0].values
    share = f" ({of_model:.2g} % of the model)" if of_model else ""
    said.append(f"Cost: {seconds} of training per order, {trained} trainable parameters{share}, {stored} saved between "
                "tasks.")
    for ceiling in [method for method in methods if method not in sequential][:1]:
        if gap := paired_difference(own, select(runs, method=ceiling)):
            said.append(f"Against {ceiling}, all tasks at once: {gap} points{_caution(gap)}.")
    return " ".join(said)


def _lead(own: Sequence[Run], second: Sequence[Run], name: str) -> str:
    """Say by how much one method's runs lead another's."""
    gap = paired_difference(own, second)
    if gap is None:
        return f"It has no order and seed in common with {name} for which both have predictions."
    # It may lead on average and yet be behind on the orders and seeds that both have.
    place = f"It leads {name}" if gap.mean >= 0 else f"On the same orders and seeds {name} leads"
    low, high = (gap.low, gap.high) if gap.mean >= 0 else (-gap.high, -gap.low)
    pairs = _counted(gap.runs, "paired run")
    return f"{place} by {abs(gap.mean):.1f} [{low:.1f}, {high:.1f}] points ({pairs}){_caution(gap)}."


def _caution(gap: Interval) -> str:
    """Say why a difference is not significant; empty if it is."""
    if gap.contains_zero:
        return ", not significant: the interval contains 0"
    return "" if gap.is_significant else "; an order has one seed only, so others may differ"


def _mean_cost(runs: Sequence[Run], name: str) -> float | None:
    values = [getattr(run, name) for run in finished(runs)]
    return None if None in values else statistics.mean(values)


def _costs(runs: Sequence[Run]) -> list[str]:
    """Mean training time, trainable parameters and stored bytes, as text."""
    forms = {"seconds": lambda s: f"{s:.0f} s" if s < 600 else f"{s / 60:.0f} min",
             "trained_values": "{:,.0f}".format, "stored_bytes": lambda stored: f"{stored / 1e6:.2f} MB"}
    return ["-" if (mean := _mean_cost(runs, name)) is None else form(mean) for name, form in forms.items()]


def _model_lines(runs: Sequence[Run], figures: dict[str, Figure], look: draw.Styles) -> list[str]:
    """The page's paragraphs on one model, whose figures are added to `figures`."""
    model, methods = runs[0].model, ranked_methods(runs)
    lines = [f"## {_plain(model)}", f"**{_plain(conclusion(runs))}**", _method_table(runs, methods), _plain(NOTE)]
    if variants := dict.fromkeys(f"{run.method}: {_settings(run.varying)}" for run in runs if run.varying):
        lines.append(_plain(f"Options in which runs of one method differ. {'; '.join(variants)}."))
    own = {method: select(runs, method=method) for method in methods}
    scores = {method: (result.mean, interval(mine)) for method, mine in own.items()
              if (result := summarise(mine, "average_performance"))}
    if scores:
        lines.append(_figure(figures, f"{model}-methods", draw.bars(scores, look, model)))
    points = {method: (mean, _mean_cost(own[method], "seconds"), (_mean_cost(own[method], "stored_bytes") or 0) / 1e6)
              for method, (mean, _) in scores.items()}
    points = {method: values for method, values in points.items() if all(values[1:])}
    if len(points) > 1:
        lines.append(_figure(figures, f"{model}-costs", draw.costs(points, look, f"{model}: what accuracy costs")))
    orders = sorted(distinct(runs, "order"), key=natural)
    rows = [[method, *(str(summarise(select(mine, order=order), "average_performance") or "-") for order in orders)]
            for method, mine in own.items()]
    lines += [f"### {_plain(model)}: AP of each order", _table(["method", *orders], rows)]
    for order in orders:
        lines += _order_lines(select(runs, order=order), methods, figures, look)
    unfinished = [f"{run.method}, {run.order}, seed {run.seed} (without {', '.join(run.unfinished)})"
                  for run in runs if run.unfinished]
    lines += [_plain(f"Unfinished, and so not compared: {'; '.join(unfinished)}")] * bool(unfinished)
    for published in PUBLISHED.values():
        if abs((runs[0].values or 0) / published["parameters"] - 1) < 0.05:
            rows = [[*names, f"{performance:.1f}"] for *names, performance in published["orders, method, AP"]]
            note = "Not measured here, and taken from secondary summaries, not from the papers' own tables."
            lines += ["### Published results of this size", note, _table(["orders", "method", "AP"], rows)]
    return lines


def _method_table(runs: Sequence[Run], methods: Sequence[str]) -> str:
    best = next((method for method in methods if not is_ceiling(method)), methods[0])
    optional = [name for name in OPTIONAL if any(run.measures.get(name) is not None for run in runs)]
    against, most = ["against the best"] * (len(methods) > 1), len({run.order for run in finished(runs)})
    rows = []
    for method in methods:
        own = select(runs, method=method)
        gap = None if method == best else paired_difference(own, select(runs, method=best))
        average, *shown = [str(summarise(own, name) or "-") for name in (
            "average_performance", "backward_transfer", "forgetting", *optional)]
        marked = f"{gap or '-'}{' (one seed)' if gap and gap.seeds == 1 else ''}"
        tested = len({run.order for run in finished(own)})
        name = f"{method} (ceiling)" if is_ceiling(method) else method
        name += f" ({tested} of {most} orders)" if 0 < tested < most else ""
        rows.append([name, average, *[marked] * len(against), *shown, *_costs(own),
                     str(sum(not run.unfinished for run in own))])
    names = [OPTIONAL[name] for name in optional]
    return _table(["method", "AP", *against, "BWT", "F", *names, "training", "trained", "stored", "runs"], rows)


def _order_lines(
    runs: Sequence[Run], methods: Sequence[str], figures: dict[str, Figure], look: draw.Styles
) -> list[str]:
    """Curves and heat maps of one order's finished runs; runs over fewer or other tasks are left out."""
    runs = finished(runs)
    model, order, tasks = runs[0].model, runs[0].order, max((run.tasks for run in runs), key=len)
    alike = [run for run in runs if run.tasks == tasks]
    own = {method: mine for method in methods if (mine := select(alike, method=method))}
    lines = [f"### {_plain(model)}: {_plain(order)}", _plain(" > ".join(tasks))]
    curves = draw.curves(own, look, f"{model}, {order}: accuracy of each task over time")
    lines.append(_figure(figures, f"{model}-{order}-curves", curves))
    for method, mine in own.items():
        title = f"{method}, {order}" + (f", mean of {len(mine)} seeds" if len(mine) > 1 else "")
        picture = draw.heat_map(tasks, np.array([run.matrix for run in mine], float).mean(axis=0), title)
        lines.append(_figure(figures, f"{model}-{order}-{method}-matrix", picture))
    return lines


def _foot(runs: Sequence[Run]) -> list[str]:
    """What the runs were made with: code, versions, machine, and the settings that all of a model's runs share."""
    made = dict.fromkeys(_plain("; ".join(f"{key} {value}" for key, value in run.made_with.items())) for run in runs)
    lines = ["## Made with", *filter(None, made)]
    for model in distinct(runs, "model"):
        own = select(runs, model=model)
        found = [{key: setting(values) for key, values in run.options.items()} for run in own]
        shared = {key: value for key, value in found[0].items()
                  if all(one.get(key) == value for one in found) and value not in (None, [])}
        lines.append(_plain(f"{model}, settings of all runs: {_settings(shared) or '-'}."))
        for method in distinct(own, "method"):  # whatever differs between methods should meet the eye
            mine = [one for run, one in zip(own, found) if run.method == method]
            rest = {key: value for key, value in mine[0].items() if key not in shared and value not in (None, [])
                    and key not in BY_CONTENT and all(one.get(key) == value for one in mine)}
            lines += [_plain(f"{model}, {method}: {_settings(rest)}.")] * bool(rest)
    return lines


def _settings(options: Mapping) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _figure(figures: dict[str, Figure], name: str, figure: Figure) -> str:
    """Add a figure under a unique file name, and return the line that shows it."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:100]
    while slug in figures:
        slug += "-"
    figures[slug] = figure
    return f"![](figures/{slug}.svg)"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[_plain(value) for value in row] for row in (head, *rows)]
    cells.insert(1, ["---", *["---:"] * (len(head) - 1)])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _measures(run: Run) -> dict:
    """A run's measures and costs in full precision, None where there is none."""
    costs = {name: getattr(run, name) for name in ("seconds", "trained_values", "values", "stored_bytes")}
    return {name: run.measures.get(name) for name in MEASURES} | costs | {"unfinished": " ".join(run.unfinished)}


def _cells(run: Run) -> list[dict]:
    """The measured cells of a run's accuracy matrix."""
    return [{"step": i + 1, "after": run.tasks[i], "task": task, "accuracy": value}
            for i, row in enumerate(run.matrix) for task, value in zip(run.tasks, row) if value is not None]


def write_csv(path: Path, rows: Sequence[tuple[Run, dict]]) -> None:
    """Write a table whose rows hold what identifies a run, then its values; the first row's keys name the columns."""
    table = [{name: getattr(run, name) for name in ("model", "method", "order", "seed")} | row for run, row in rows]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def _plain(text: str) -> str:
    """Escape what HTML and Markdown would read as markup, also within a table's cell."""
    return re.sub(r"([\\|*_`\[\]])", r"\\\1", escape(" ".join(text.split()), quote=False))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
