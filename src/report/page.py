"""The report on many runs: a page in Markdown and in HTML (one file, no network), SVG figures and CSV tables.

Both pages are made from one list of blocks: ("heading", text), ("text", text), ("table", rows), ("figure", name).
"""

import csv
import io
import re
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from files import whole_folder
from report import svg
from report.bootstrap import Interval
from report.matrix import MEASURES
from report.published import RESULTS
from report.runs import (
    Run,
    base_method,
    distinct,
    finished,
    is_ceiling,
    mean_matrix,
    natural,
    paired_difference,
    ranked_methods,
    select,
    summarise,
)

Block = tuple[str, object]

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #111; background: #fff; margin: 2rem auto; max-width: 70rem;
       padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .7rem; text-align: right;
        border-bottom: 1px solid #ddd; white-space: nowrap } td:first-child, th:first-child { text-align: left;
        white-space: normal; min-width: 9rem }
p.answer { font-size: 1.15rem } figure { display: inline-block; vertical-align: top; margin: .5rem 1.5rem .5rem 0;
         max-width: 100%; overflow-x: auto } div.wide { overflow-x: auto }
"""


def write_report(runs: Sequence[Run], folder: Path) -> None:
    """Write `report.html`, `report.md`, `figures/*.svg`, `measures.csv` and `accuracy.csv`, all or none of them."""
    figures = {}
    blocks = [block for model in distinct(runs, "model") for block in _model_blocks(select(runs, model=model), figures)]
    blocks += _published_blocks()
    with whole_folder(folder) as partial:
        (partial / "figures").mkdir()
        for name, picture in figures.items():
            (partial / "figures" / f"{name}.svg").write_text(picture, encoding="utf-8")
        (partial / "report.md").write_text(markdown(blocks), encoding="utf-8")
        (partial / "report.html").write_text(html(blocks, figures), encoding="utf-8")
        (partial / "measures.csv").write_text(measures_csv(runs), encoding="utf-8")
        (partial / "accuracy.csv").write_text(accuracy_csv(runs), encoding="utf-8")


# Content


def answer(runs: Sequence[Run]) -> str:
    """Say which method is best, by how much and at what cost; `runs` are those of one model."""
    methods = [method for method in ranked_methods(runs)
               if summarise(select(runs, method=method), "average_performance")]
    if not methods:
        return "No order is finished yet."
    sequential = [method for method in methods if not is_ceiling(method)] or methods
    best = sequential[0]
    own = select(runs, method=best)
    result = summarise(own, "average_performance")
    transfer = summarise(own, "backward_transfer")
    said = [f"Best: {best}, average performance {result} over {_counted(result.count, 'run')}"
            + (f", backward transfer {transfer.mean:+.1f}." if transfer else ".")]
    others = [method for method in sequential if base_method(method) != base_method(best)]
    rivals = dict.fromkeys([*sequential[1:2], *others[:1]])  # the next may be a variant of the best
    said += [_lead(own, select(runs, method=rival), rival) for rival in rivals]
    said.append(f"Cost: {_cost(own)}.")
    for ceiling in [method for method in methods if method not in sequential][:1]:
        if gap := paired_difference(own, select(runs, method=ceiling)):
            said.append(f"Against {ceiling}, all tasks at once: {gap} points{_caution(gap)}.")
    return " ".join(said)


def _lead(own: Sequence[Run], second: Sequence[Run], name: str) -> str:
    gap = paired_difference(own, second)
    if gap is None:
        return f"It shares no order and seed that have predictions with {name}."
    # It may lead on average and yet be behind on the orders and seeds that both have.
    place = f"It leads {name}" if gap.mean >= 0 else f"On the same orders and seeds {name} leads"
    low, high = sorted((gap.low, gap.high)) if gap.mean >= 0 else sorted((-gap.low, -gap.high))
    pairs = _counted(gap.runs, "paired run")
    return f"{place} by {abs(gap.mean):.1f} [{low:.1f}, {high:.1f}] points ({pairs}){_caution(gap)}."


def _caution(gap: Interval) -> str:
    """Why a difference is not significant; empty if it is."""
    if gap.contains_zero:
        return ", not significant: the interval contains 0"
    return "" if gap.is_significant else ", over test examples alone: another seed may differ"


def _cost(runs: Sequence[Run]) -> str:
    seconds, trained, stored = _costs(runs)
    share = f" ({100 * runs[0].trained_values / runs[0].values:.2g} % of the model)" if runs[0].values else ""
    return f"{seconds} of training per order, {trained} trainable parameters{share}, {stored} saved between tasks"


def _costs(runs: Sequence[Run]) -> tuple[str, str, str]:
    """Mean training time, trainable parameters and stored bytes, as text."""
    columns = [[getattr(run, name) for run in finished(runs)] for name in ("seconds", "trained_values", "stored_bytes")]
    seconds, trained, stored = (None if None in column else statistics.mean(column) for column in columns)
    return (
        "-" if seconds is None else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min",
        "-" if trained is None else f"{trained:,.0f}",
        "-" if stored is None else f"{stored / 1e6:.2f} MB",
    )


def _model_blocks(runs: Sequence[Run], figures: dict[str, str]) -> list[Block]:
    """The blocks of one model; their pictures are added to `figures`."""
    model, methods = runs[0].model, ranked_methods(runs)
    blocks: list[Block] = [("heading", model), ("answer", answer(runs)), ("table", _method_table(runs, methods))]
    blocks.append(("text", NOTE))
    if variants := {run.method: run.varying for run in runs if run.varying}:
        blocks.append(("text", "Options in which runs of one method differ. " + "; ".join(
            f"{name}: {', '.join(f'{key}={value}' for key, value in varying.items())}"
            for name, varying in variants.items()) + "."))
    scored = [(method, summarise(select(runs, method=method), "average_performance")) for method in methods]
    if rows := [(method, result.mean, result.spread) for method, result in scored if result]:
        blocks.append(_figure(figures, f"{model}-methods", svg.bars(rows, f"{model}: average performance, per cent")))
    blocks += [("heading", f"{model}: method by order"), ("table", _order_table(runs, methods))]
    for order in sorted(distinct(runs, "order"), key=natural):
        blocks += _order_blocks(select(runs, order=order), [m for m in methods if select(runs, order=order, method=m)],
                                figures)
    unfinished = [run for run in runs if run.unfinished]
    if unfinished:
        blocks.append(("text", "Unfinished, and so not compared: " + "; ".join(
            f"{run.method}, {run.order}, seed {run.seed} (without {', '.join(run.unfinished)})" for run in unfinished)))
    return blocks


NOTE = (
    "AP: average performance, the mean exact match over tasks after the last one, in per cent; BWT: backward transfer; "
    "F: forgetting. ± is the standard deviation over runs (orders and seeds). 'Against the best' pairs runs of the "
    "same order and seed with those of the best method, the ceiling aside; in brackets the 95 % interval, resampled "
    "over test examples and seeds (over examples alone with one seed). A difference whose interval contains 0 is not "
    "significant. Trained: most trainable parameters of a task; stored: what the last task saves. Definitions: "
    "docs/METRICS.md."
)


def _method_table(runs: Sequence[Run], methods: Sequence[str]) -> list[list[str]]:
    best = next((method for method in methods if not is_ceiling(method)), methods[0])
    optional = [name for name in ("average_over_rows", "forward_transfer", "unseen_accuracy")
                if any(run.measures.get(name) is not None for run in runs)]
    names = {"average_over_rows": "over examples", "forward_transfer": "FWT", "unseen_accuracy": "unseen"}
    rows = [["method", "AP", "against the best", "BWT", "F", *(names[name] for name in optional), "training", "trained",
             "stored", "runs"]]
    for method in methods:
        own = select(runs, method=method)
        gap = None if method == best else paired_difference(own, select(runs, method=best))
        average, *shown = [str(summarise(own, name) or "-") for name in (
            "average_performance", "backward_transfer", "forgetting", *optional)]
        name = f"{method} (ceiling)" if is_ceiling(method) else method
        rows.append([name, average, str(gap or "-"), *shown, *_costs(own), str(sum(not run.unfinished for run in own))])
    return rows


def _order_table(runs: Sequence[Run], methods: Sequence[str]) -> list[list[str]]:
    orders = sorted(distinct(runs, "order"), key=natural)
    rows = [["AP", *orders]]
    for method in methods:
        results = [summarise(select(runs, method=method, order=order), "average_performance") for order in orders]
        rows.append([method, *(str(result or "-") for result in results)])
    return rows


def _order_blocks(runs: Sequence[Run], methods: Sequence[str], figures: dict[str, str]) -> list[Block]:
    """Curves and heat maps of one order's finished runs; runs over fewer or other tasks are left out."""
    runs = finished(runs)
    model, order, tasks = runs[0].model, runs[0].order, max((run.tasks for run in runs), key=len)
    alike = [run for run in runs if run.tasks == tasks]
    matrices = {method: mean_matrix(select(alike, method=method)) for method in methods if select(alike, method=method)}
    title = f"{model}, {order}: accuracy of each task over time"
    blocks: list[Block] = [("heading", f"{model}: {order}"), ("text", " > ".join(tasks))]
    blocks.append(_figure(figures, f"{model}-{order}-curves", svg.curves(tasks, matrices, title)))
    for method, matrix in matrices.items():
        seeds = len(select(alike, method=method))
        picture = svg.heat_map(tasks, matrix, f"{method}, {order}" + (f", mean of {seeds} seeds" if seeds > 1 else ""))
        blocks.append(_figure(figures, f"{model}-{order}-{method}-matrix", picture))
    return blocks


def _published_blocks() -> list[Block]:
    rows = [["published: model", "orders", "method", "AP", "BWT"]]
    rows += [[*where, f"{performance:.1f}", "-" if transfer is None else f"{transfer:+.1f}"]
             for *where, performance, transfer in RESULTS]
    note = ("Published numbers, not measured here: full-size models and data. They were read in secondary summaries, "
            "not in the papers' own tables.")
    return [("heading", "Published results"), ("text", note), ("table", rows)]


def _figure(figures: dict[str, str], name: str, picture: str) -> Block:
    """Add a picture under a unique file name."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:100]
    while slug in figures:
        slug += "-"
    figures[slug] = picture
    return ("figure", slug)


# Form


def markdown(blocks: Sequence[Block]) -> str:
    """The page as Markdown; pictures are files in `figures/`."""
    lines = ["# Continual learning: methods side by side", ""]
    for kind, content in blocks:
        if kind == "heading":
            lines += [f"## {_plain(content)}", ""]
        elif kind == "table":
            head, *rows = [[_plain(value) for value in row] for row in content]
            lines += [f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows)] + [""]
        elif kind == "figure":
            lines += [f"![{content}](figures/{content}.svg)", ""]
        else:
            lines += [_plain(content), ""]
    return "\n".join(lines)


def html(blocks: Sequence[Block], figures: Mapping[str, str]) -> str:
    """The page as one HTML file with its pictures; all text is escaped."""
    parts = []
    for kind, content in blocks:
        if kind == "heading":
            parts.append(f"<h2>{escape(content)}</h2>")
        elif kind == "table":
            head, *rows = content
            cells = "".join(f"<th>{escape(value)}</th>" for value in head)
            body = "".join(f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in row)}</tr>" for row in rows)
            parts.append(f'<div class="wide"><table><tr>{cells}</tr>{body}</table></div>')
        elif kind == "figure":
            parts.append(f"<figure>{figures[content]}</figure>")
        else:
            parts.append(f'<p class="{kind}">{escape(content)}</p>')
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Continual learning: methods side by side'
        f"</title><style>{STYLE}</style></head>\n<body><h1>Continual learning: methods side by side</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def measures_csv(runs: Sequence[Run]) -> str:
    """A row for each run: its measures and costs in full precision, empty where there is none."""
    costs = ("seconds", "trained_values", "values", "stored_bytes")
    rows = [["model", "method", "order", "seed", *MEASURES, *costs, "unfinished"]]
    for run in runs:
        numbers = [*(run.measures.get(name) for name in MEASURES), *(getattr(run, name) for name in costs)]
        rows.append([run.model, run.method, run.order, run.seed, *numbers, " ".join(run.unfinished)])
    return _csv(rows)


def accuracy_csv(runs: Sequence[Run]) -> str:
    """A row for each measured cell of each run's accuracy matrix."""
    rows = [["model", "method", "order", "seed", "step", "after", "task", "accuracy"]]
    for run in runs:
        about = [run.model, run.method, run.order, run.seed]
        for i, row in enumerate(run.matrix):
            cells = zip(run.tasks, row)
            rows += [[*about, i + 1, run.tasks[i], task, value] for task, value in cells if value is not None]
    return _csv(rows)


def _csv(rows: Sequence[Sequence]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _plain(text: str) -> str:
    """Escape Markdown's marks, also within a table's cell."""
    return re.sub(r"([\\|<>*_`\[\]])", r"\\\1", " ".join(text.split()))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
