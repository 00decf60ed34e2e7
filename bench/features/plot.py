"""Line plots as SVG, drawn by hand: logarithmic axes, one line per series, the legend beside its end."""

import math
from dataclasses import dataclass
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 70, 150, 50, 50
LINE = 15
"""Names beside the ends of lines are no nearer."""
COLOURS = ("#1f5fa8", "#c2571a", "#2f7d4f", "#7a4a9e")


@dataclass(frozen=True)
class Line:
    name: str
    points: list[tuple[float, float]]
    """(x, y), both positive; a line without points is not drawn."""


def draw(path: Path, title: str, x_name: str, y_name: str, lines: list[Line]) -> None:
    """Writes the plot; axes run over whole decades."""
    x_low, x_high = _decades([x for line in lines for x, _ in line.points])
    y_low, y_high = _decades([y for line in lines for _, y in line.points])

    def across(x: float) -> float:
        return LEFT + (math.log10(x) - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (math.log10(y) - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{title}</text>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{x_name}</text>',
        f'<text x="20" y="{TOP - 10}">{y_name}</text>',
    ]
    for power in range(x_low, x_high + 1):
        x = across(10**power)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_count(10**power)}</text>')
    for power in range(y_low, y_high + 1):
        y = up(10**power)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    names = []
    for line, colour in zip(lines, COLOURS, strict=False):
        if not line.points:
            continue
        places = [(across(x), up(y)) for x, y in line.points]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places]
        names.append((places[-1][1], places[-1][0], f'fill="{colour}">{line.name}</text>'))
    lowest = -math.inf
    for y, x, name in sorted(names):
        lowest = max(y, lowest + LINE)
        parts.append(f'<text x="{x + 8:.1f}" y="{lowest + 4:.1f}" {name}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>", ""]))


def _decades(values: list[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _count(number: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g} {letter}"
    return f"{number:g}"
