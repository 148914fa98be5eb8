"""Draw results.svg, each method's average performance (AP) with its 95 % interval, and costs.svg, AP against costs.

    python benchmarks/figures.py                                        the methods in SHOWN, into docs/images
    python benchmarks/figures.py --methods gorp "gorp --preset released" sgorp olora --out FOLDER

The pictures are drawn from the finished trials in `benchmarks/results/<model>/outcomes.jsonl`, without model or data,
and are the same bytes each time. A method is complete in a panel if it has at least the panel's number of seeds in all
of the panel's orders. Other methods are left out, and so are seeds that a method does not have in all of these orders.
If a method, order and seed has two lines, the later one counts.

An interval is that of `src/report/bootstrap.py`, of a method's own AP over test examples and seeds. A
hollow dot is a single seed, with an interval over test examples alone. Two methods are compared by the interval of
their difference (REPRODUCE.md), not by whether their bars overlap.

Bytes are what the last task saves for a next one. Times are those of training, including the method's own passes over a
task's examples.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.outcomes import Outcome, read_outcomes  # noqa: E402
from errors import InputError  # noqa: E402
from report.bootstrap import Interval, paired_interval  # noqa: E402

OUT = ROOT / "docs" / "images"

FIRST = ("gorp", "gorp --preset released", "sgorp")
SHOWN = (*FIRST, "olora", "nlora", "inflora", "inflora --inflora_energy 0.995", "ella", "slao", "magmax", "ewc",
         "replay", "galore", "osf", "inclora", "seqlora", "multitask", "multitask --learning_rate 1e-3")  # fmt: skip
COLOURS = {
    "gorp": ("#bc4c00", "#f0883e"), "gorp --preset released": ("#9a6700", "#e3b341"), "sgorp": ("#8250df", "#bc8cff"),
    "olora": ("#0969da", "#58a6ff"), "nlora": ("#0a7ea4", "#56c8e8"), "replay": ("#1a7f37", "#3fb950"),
    "galore": ("#bf3989", "#ff80c8"), "osf": ("#7d4e2d", "#d0a070"), "inclora": ("#4c5fd5", "#a5b4fc"),
    "seqlora": ("#a40e26", "#ff8a8a"), "multitask": ("#4d6b00", "#b5d334"),
    "inflora": ("#1b6e6e", "#4fd1c5"), "ella": ("#8a2be2", "#d2a8ff"), "slao": ("#8c564b", "#c9a08f"),
    "magmax": ("#b35900", "#ffb366"), "ewc": ("#5a5a00", "#cccc66"),
}  # fmt: skip
"""Each method's colour on light and on dark backgrounds, also with flags that have no entry of their own."""
OTHER = ("#59636e", "#b1bac4")
NOTES = {"multitask": "all tasks at once"}
WIDTH, ROW, TOP, NAMES, GAP = 830, 33, 72, 220, 36
HEIGHT, LABEL, LETTER = 380, 15, 8.2  # heights of a costs panel and of a name in it, width of a letter


@dataclass(frozen=True)
class Panel:
    """A panel of results.svg: the folder and orders of its trials, and the fewest seeds of a complete method."""

    folder: str
    title: str
    orders: tuple[str, ...]
    seeds: int

    def subtitle(self, seeds: set[int]) -> str:
        orders = f"order{'' if len(self.orders) == 1 else 's'} {' and '.join(self.orders)}"
        *others, last = map(str, sorted(seeds))
        numbers = f"{', '.join(others)} or {last}" if others else last
        return f"{orders}, {numbers} seed{'' if seeds == {1} else 's'}"


PANELS = (
    Panel("small-t5-b", "Small T5, 1.5 million weights", ("A", "B"), 3),
    Panel("smollm2-135m", "SmolLM2-135M", ("A", "B"), 1),
)


@dataclass(frozen=True)
class Costs:
    """A panel of costs.svg: each method's AP against one of its costs."""

    results: Panel
    axis: str
    in_time: bool = False  # else in bytes

    def of(self, runs: Mapping[str, Sequence[Outcome]]) -> dict[str, float]:
        """Method -> megabytes saved, or training time as a multiple of seqlora's; means over the method's runs."""
        means = {method: statistics.mean(run.seconds if self.in_time else run.stored_bytes / 1e6 for run in own)
                 for method, own in runs.items()}
        unit = means.get("seqlora") if self.in_time else 1
        return {method: mean / unit for method, mean in means.items()} if unit else {}

    def ticks(self, low: float, high: float) -> list[float]:
        """Round values between the lowest cost and the highest."""
        if self.in_time:
            return [tick / 10 for tick in range(math.ceil(10 * low), math.floor(10 * high) + 1)]
        return [unit * 10.0**power for power in range(-3, 4) for unit in (1, 2, 5) if low <= unit * 10.0**power <= high]

    def position(self, cost: float) -> float:
        """Along the axis, which is logarithmic for bytes."""
        return cost if self.in_time else math.log(cost)


COSTS = (
    Costs(Panel("smollm2-135m", "SmolLM2-135M", ("A", "B"), 1), "MB kept for the next task"),
    Costs(Panel("small-t5-times", "Small T5", ("A",), 1), "training time, as a multiple of seqlora's", in_time=True),
)
"""The trials of `small-t5-times` ran two at a time, with almost nothing else on the machine."""


def complete_runs(outcomes: Sequence[Outcome], panel: Panel) -> dict[str, list[Outcome]]:
    """Method -> its runs on test examples, for each method that has the panel's orders and seeds: those of the seeds
    that it has in all of these orders.

    Raises:
        InputError: a method has trials with several settings, which one bar would mix.
    """
    runs: dict[str, dict[tuple[str, int], Outcome]] = {}
    for outcome in outcomes:
        trial = outcome.trial
        if trial.split == "test" and trial.order in panel.orders:
            runs.setdefault(trial.method, {})[trial.order, trial.seed] = outcome
    complete = {}
    for method, own in runs.items():
        if len(settings := {outcome.trial.settings for outcome in own.values()}) > 1:
            raise InputError(f"{panel.folder}: {method} has trials with {len(settings)} settings; a picture has one")
        seeds = set.intersection(*({seed for of, seed in own if of == order} for order in panel.orders))
        if len(seeds) >= panel.seeds:
            complete[method] = [outcome for (_, seed), outcome in own.items() if seed in seeds]
    return complete


def performance(runs: Mapping[str, Sequence[Outcome]]) -> dict[str, Interval]:
    """Method -> AP with its interval."""
    return {method: paired_interval({(run.trial.order, str(run.trial.seed)): run.rows() for run in own})
            for method, own in runs.items()}


def draw(panels: Sequence[tuple[Panel, Mapping[str, Interval]]]) -> str:
    """The picture, as SVG text: a row for each method, in the order of the first panel, best first."""
    methods = sorted({method for _, intervals in panels for method in intervals},
                     key=lambda method: [-intervals[method].mean if method in intervals else math.inf
                                         for _, intervals in panels])  # fmt: skip
    if not methods:
        raise InputError("no method is complete")
    bottom = TOP + ROW * len(methods)
    width = (WIDTH - NAMES - GAP * (len(panels) - 1) - 16) / len(panels)
    parts = [f'<text class="muted small" x="8" y="{bottom + 44}">Average performance (AP), per cent, and its 95 % '
             "interval over test examples and seeds. Hollow: one seed.</text>"]  # fmt: skip
    for row, method in enumerate(methods):
        parts += _name(method, TOP + ROW * (row + 0.5), first=method in FIRST)
    for index, (panel, intervals) in enumerate(panels):
        left = NAMES + index * (width + GAP)
        parts += _panel(panel, intervals, methods, left, width, bottom)
    best = "; ".join(f"{panel.title}: " + ", ".join(f"{method} {intervals[method].mean:.1f}" for method in methods
                                                   if method in intervals) for panel, intervals in panels)  # fmt: skip
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 56}" role="img" '
        'aria-labelledby="title desc">',
        '<title id="title">Average performance of each method, with 95 % intervals</title>',
        f'<desc id="desc">{escape(best)}.</desc>',
        f"<style>{_style()}</style>", *parts, "</svg>", "",
    ])  # fmt: skip


def _panel(panel: Panel, intervals: Mapping[str, Interval], methods: Sequence[str], left: float, width: float,
           bottom: float) -> list[str]:
    """A panel of results.svg: its title, its axis and a bar for each method."""
    low, high = _fives(*(interval.low for interval in intervals.values()),
                       *(interval.high for interval in intervals.values()))
    seeds = {interval.seeds for interval in intervals.values()}

    def at(value: float) -> float:
        return left + width * (value - low) / (high - low)

    parts = [f'<text class="bold" x="{left:.0f}" y="26">{escape(panel.title)}</text>',
             f'<text class="muted small" x="{left:.0f}" y="46">{escape(panel.subtitle(seeds))}</text>']  # fmt: skip
    for value in range(-10 * (-low // 10), high + 1, 10):
        parts += [f'<path class="grid" d="M{at(value):.1f} {TOP - 8}V{bottom}"/>',
                  f'<text class="muted small mid" x="{at(value):.1f}" y="{bottom + 18}">{value}</text>']  # fmt: skip
    for row, method in enumerate(methods):
        y = TOP + ROW * (row + 0.5)
        if method not in intervals:
            continue
        one, colour = intervals[method], _class(method)
        dot = "hollow" if one.seeds == 1 else "dot"
        parts += [f'<path class="bar {colour}" d="M{at(one.low):.1f} {y:g}H{at(one.high):.1f}"/>',
                  f'<circle class="{dot} {colour}" cx="{at(one.mean):.1f}" cy="{y:g}" r="5.5"/>',
                  f'<text class="small mid" x="{at(one.mean):.1f}" y="{y - 9:g}">{one.mean:.1f}</text>']  # fmt: skip
    return parts


def _fives(*values: float) -> tuple[int, int]:
    """The ends of an axis: the multiples of 5 around the values, which differ."""
    low = 5 * math.floor(min(values) / 5)
    return low, max(5 * math.ceil(max(values) / 5), low + 5)


def _name(method: str, y: float, first: bool) -> list[str]:
    """A method's name, its flags below in small print."""
    name, _, flags = method.partition(" ")
    below = flags or NOTES.get(name)
    kind = "bold" if first else "plain"
    parts = [f'<text class="{kind}" x="8" y="{y + (-1 if below else 5):g}">{escape(name)}</text>']
    if below:
        parts.append(f'<text class="muted flags" x="8" y="{y + 13:g}">{escape(below)}</text>')
    return parts


def _class(method: str) -> str:
    """The CSS class of a method's colour."""
    key = method if method in COLOURS else method.split()[0]
    return f"c{list(COLOURS).index(key)}" if key in COLOURS else "other"


def draw_costs(panels: Sequence[tuple[Costs, Mapping[str, tuple[float, Interval]]]]) -> str:
    """The picture of costs, as SVG text: in each panel a point for each method, with its name beside it."""
    left, width = 40, (WIDTH - 8 - GAP * (len(panels) - 1)) / max(len(panels), 1)
    parts = []
    for index, (costs, points) in enumerate(panels):
        parts += _cost_panel(costs, points, left + index * (width + GAP), width - left)
    told = "; ".join(f"{costs.results.title}, {costs.axis}: " + ", ".join(
        f"{method} {cost:.1f} with AP {interval.mean:.1f}" for method, (cost, interval) in points.items())
        for costs, points in panels)  # fmt: skip
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {TOP + HEIGHT + 56}" role="img" '
        'aria-labelledby="title desc">',
        '<title id="title">Average performance of each method against what it keeps and how long it trains</title>',
        f'<desc id="desc">{escape(told)}.</desc>', f"<style>{_style()}</style>", *parts, "</svg>", "",
    ])  # fmt: skip


def _cost_panel(costs: Costs, points: Mapping[str, tuple[float, Interval]], left: float, width: float) -> list[str]:
    seeds = {interval.seeds for _, interval in points.values()}
    means = [interval.mean for _, interval in points.values()]
    (low, high), bottom = _fives(*means), TOP + HEIGHT
    places = [costs.position(cost) for cost, _ in points.values()]
    first, reach = min(places), (max(places) - min(places)) or 1

    def x(cost: float) -> float:  # the names of the last points need room
        return left + 12 + (width - 80) * (costs.position(cost) - first) / reach

    def y(value: float) -> float:
        return TOP + HEIGHT * (high - value) / (high - low)

    parts = [f'<text class="bold" x="{left:.0f}" y="26">{escape(costs.results.title)}</text>',
             f'<text class="muted small" x="{left:.0f}" y="46">AP, {escape(costs.results.subtitle(seeds))}</text>',
             f'<text class="muted small" x="{left:.0f}" y="{bottom + 44}">{escape(costs.axis)}</text>']  # fmt: skip
    for value in range(low, high + 1, 5):
        parts += [f'<path class="grid" d="M{left:.1f} {y(value):.1f}H{left + width:.1f}"/>',
                  f'<text class="muted small" x="{left - 24:.1f}" y="{y(value) + 4:.1f}">{value}</text>']  # fmt: skip
    for tick in costs.ticks(min(cost for cost, _ in points.values()), max(cost for cost, _ in points.values())):
        parts.append(f'<text class="muted small mid" x="{x(tick):.1f}" y="{bottom + 20}">{tick:g}</text>')
    at = {method: (x(cost), y(interval.mean)) for method, (cost, interval) in points.items()}
    names = place_names({_short(method): place for method, place in at.items()}, left, left + width)
    for method, (_, interval) in points.items():
        name, (across, down) = _short(method), at[method]
        start, line = names[name]
        dot = "hollow" if interval.seeds == 1 else "dot"
        if abs(line - down) > LABEL:
            near = start if start > across else start + LETTER * len(name)
            parts.append(f'<path class="grid" d="M{across:.1f} {down:.1f}L{near:.1f} {line:.1f}"/>')
        parts += [f'<circle class="{dot} {_class(method)}" cx="{across:.1f}" cy="{down:.1f}" r="4.5"/>',
                  f'<text class="small" x="{start:.1f}" y="{line + 4:.1f}">{escape(name)}</text>']  # fmt: skip
    return parts


def place_names(points: Mapping[str, tuple[float, float]], left: float, right: float) -> dict[str, tuple[float, float]]:
    """Where each point's name begins, and its height: beside the point, as near as the points and other names allow."""
    taken = [(across - 6, across + 6, down, 6.0) for across, down in points.values()]
    places = {}
    for name, (across, down) in sorted(points.items(), key=lambda item: item[1][1]):
        width = LETTER * len(name)
        ways = [(start, down + shift) for shift in sorted(range(-150, 151, 2), key=abs)
                for start in (across + 9, across - 9 - width) if left <= start <= right - width]  # fmt: skip
        start, line = next(way for way in ways if not any(
            way[0] < end and begin < way[0] + width and abs(way[1] - middle) < LABEL / 2 + half
            for begin, end, middle, half in taken))  # fmt: skip
        taken.append((start, start + width, line, LABEL / 2))
        places[name] = (start, line)
    return places


def _short(method: str) -> str:
    """A method's name with the values of its flags, without the flags themselves."""
    return " ".join(word for word in method.split() if not word.startswith("--"))


def _style() -> str:
    tones = {f"c{number}": tones for number, tones in enumerate(COLOURS.values())} | {"other": OTHER}
    light, dark = ("\n".join(f"{' ' * (2 + 2 * i)}.{name} {{ color: {pair[i]} }}" for name, pair in tones.items())
                   for i in (0, 1))  # fmt: skip
    return f"""
  text {{ font: 14px system-ui, -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: #1f2328 }}
  .bold {{ font-weight: 600 }}
  .small {{ font-size: 13px }}
  .flags {{ font-size: 11.5px }}
  .mid {{ text-anchor: middle }}
  .muted {{ fill: #59636e }}
  .grid {{ stroke: #d1d9e0 }}
  .bar {{ stroke: currentColor; stroke-width: 3; stroke-linecap: round }}
  .dot {{ fill: currentColor }}
  .hollow {{ fill: #ffffff; stroke: currentColor; stroke-width: 2.5 }}
{light}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: #e6edf3 }}
    .muted {{ fill: #b1bac4 }}
    .grid {{ stroke: #3d444d }}
    .hollow {{ fill: #0d1117 }}
{dark}
  }}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="names as in outcomes.jsonl; default: see SHOWN")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="<model>/outcomes.jsonl")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the pictures")
    args = parser.parse_args(arguments)
    try:
        stored = {folder.name: list(read_outcomes(folder).values()) for folder in sorted(args.results.glob("*/"))}
        panels = [(panel, performance(complete_runs(stored.get(panel.folder, []), panel))) for panel in PANELS]
        known = {method for _, intervals in panels for method in intervals}
        for method in args.methods or []:
            if method not in known:
                complete = ", ".join(sorted(known)) or "none"
                raise InputError(f"--methods: found {method!r}; allowed: the complete ones, {complete}")
        pictures = {
            "results.svg": draw(_wanted(panels, args.methods or SHOWN)),
            "costs.svg": draw_costs(_wanted([(one, points(one, stored)) for one in COSTS], args.methods or SHOWN)),
        }
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (args.out / name).write_text(picture, encoding="utf-8")
        print(args.out / name)
    return 0


def points(costs: Costs, stored: Mapping[str, Sequence[Outcome]]) -> dict[str, tuple[float, Interval]]:
    """Method -> cost and AP of the same runs, for each complete method whose cost is known."""
    runs = complete_runs(stored.get(costs.results.folder, []), costs.results)
    known, intervals = costs.of(runs), performance(runs)
    return {method: (cost, intervals[method]) for method, cost in known.items()}


def _wanted(panels: Sequence[tuple], methods: Sequence[str]) -> list[tuple]:
    """The panels that have any of these methods, reduced to these methods."""
    shown = [(panel, {method: one for method, one in found.items() if method in methods}) for panel, found in panels]
    return [(panel, found) for panel, found in shown if found]


if __name__ == "__main__":
    sys.exit(main())
