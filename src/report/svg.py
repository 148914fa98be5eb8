"""The report's pictures as SVG text: the accuracy matrix as a heat map, curves of tasks, methods side by side.

Each function returns a whole `<svg>` element that stands alone as a file and can be put into an HTML page as it is.
"""

from collections.abc import Mapping, Sequence
from html import escape

from report.matrix import Matrix

# Okabe & Ito's colours, which stay apart for colour-blind readers; a dash marks the second round of them.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("", "5 3", "2 2")
FONT = 'font-family="system-ui, sans-serif" font-size="12"'
GREY = "#666"


def heat_map(tasks: Sequence[str], matrix: Matrix, title: str) -> str:
    """The accuracy matrix: a row for each finished task, a column for each task tested, deeper blue is better."""
    size, top = 46, 34
    left = 24 + 7 * max(map(len, tasks))
    height = top + size * len(matrix) + 8 + 7 * max(map(len, tasks))
    parts = [_text(4, 16, title, weight="bold")]
    for i, row in enumerate(matrix):
        y = top + i * size
        parts.append(_text(left - 6, y + size / 2 + 4, f"{i + 1} {tasks[i]}", anchor="end"))
        for j, value in enumerate(row):
            x = left + j * size
            colour = "#f4f4f4" if value is None else _blue(value)
            parts.append(f'<rect x="{x}" y="{y}" width="{size - 2}" height="{size - 2}" fill="{colour}"/>')
            if value is not None:
                ink = "#fff" if value > 55 else "#111"
                parts.append(_text(x + size / 2 - 1, y + size / 2 + 4, f"{value:.1f}", anchor="middle", fill=ink))
    for j, task in enumerate(tasks):
        x, y = left + j * size + size / 2 + 3, top + size * len(matrix) + 8
        parts.append(f'<text transform="translate({x:.1f} {y}) rotate(-60)" text-anchor="end">{escape(task)}</text>')
    return _svg(max(left + size * len(tasks) + 4, 8 + 7 * len(title)), height, parts)


def curves(tasks: Sequence[str], matrices: Mapping[str, Matrix], title: str) -> str:
    """A panel for each task: its accuracy from its own training on, a line for each method.

    Args:
        matrices: method -> its accuracy matrix over `tasks`; the order of the methods decides their colours.
    """
    width, height, columns = 200, 130, min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    entry = 48 + 7 * max(map(len, matrices), default=0)  # width of a method in the legend
    beside = max(1, columns * (width + 20) // entry)
    top = 34 + 18 * -(-len(matrices) // beside)
    parts = [_text(4, 16, title, weight="bold")]
    for index, method in enumerate(matrices):
        x, y = 4 + index % beside * entry, 38 + 18 * (index // beside)
        parts += [_line([(x, y - 4), (x + 24, y - 4)], index), _text(x + 30, y, method)]
    for j, task in enumerate(tasks):
        x0, y0 = 34 + (j % columns) * (width + 20), top + 20 + (j // columns) * (height + 44)
        parts += _panel(x0, y0, width - 24, height, task, len(tasks))
        for index, matrix in enumerate(matrices.values()):
            points = [
                (x0 + (width - 24) * i / max(1, len(tasks) - 1), y0 + height * (1 - matrix[i][j] / 100))
                for i in range(j, len(tasks))
                if matrix[i][j] is not None
            ]
            parts.append(_line(points, index))
    return _svg(max(34 + columns * (width + 20), entry, 8 + 7 * len(title)), top + 20 + rows * (height + 44), parts)


def bars(rows: Sequence[tuple[str, float, float | None]], title: str) -> str:
    """A bar for each (name, value in per cent, spread or None), the spread as a whisker."""
    left, scale, step = 24 + 7 * max(len(name) for name, _, _ in rows), 3.6, 26
    parts = [_text(4, 16, title, weight="bold")]
    for index, (name, value, spread) in enumerate(rows):
        y = 30 + index * step
        parts.append(_text(left - 6, y + 13, name, anchor="end"))
        parts.append(f'<rect x="{left}" y="{y}" width="{value * scale:.1f}" height="18" fill="{_colour(0)}"/>')
        end = value
        if spread is not None:
            low, high = max(0, value - spread), value + spread
            end = high
            path = f"M{left + low * scale:.1f} {y + 9}H{left + high * scale:.1f}"
            path += "".join(f"M{left + edge * scale:.1f} {y + 4}v10" for edge in (low, high))
            parts.append(f'<path d="{path}" stroke="#111" stroke-width="1.5" fill="none"/>')
        parts.append(_text(left + end * scale + 6, y + 13, f"{value:.1f}"))
    return _svg(max(left + 100 * scale + 60, 8 + 7 * len(title)), 34 + step * len(rows), parts)


def _panel(x: float, y: float, width: float, height: float, task: str, count: int) -> list[str]:
    """Title, frame and axes of one task's curves."""
    parts = [_text(x, y - 6, task)]
    for value in (0, 50, 100):
        level = y + height * (1 - value / 100)
        parts.append(f'<path d="M{x} {level:.1f}h{width}" stroke="#ddd"/>')
        parts.append(_text(x - 4, level + 4, str(value), anchor="end", fill=GREY))
    parts.append(_text(x, y + height + 14, "after 1", fill=GREY))
    parts.append(_text(x + width, y + height + 14, f"after {count}", anchor="end", fill=GREY))
    return parts


def _line(points: Sequence[tuple[float, float]], index: int) -> str:
    """A method's line with its points; nothing where it has none."""
    if not points:
        return ""
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    style = f'fill="none" stroke="{_colour(index)}" stroke-width="2" stroke-dasharray="{dash}"'
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{_colour(index)}"/>' for x, y in points]
    return f'<polyline points="{path}" {style}/>' + "".join(dots)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _blue(value: float) -> str:
    """From white at 0 to deep blue at 100."""
    share = min(max(value / 100, 0), 1)
    red, green, blue = (round(255 + share * (end - 255)) for end in (8, 81, 156))
    return f"#{red:02x}{green:02x}{blue:02x}"


def _text(x: float, y: float, text: str, *, anchor: str = "start", fill: str = "#111", weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" fill="{fill}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" {FONT}><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
