"""Two pictures of an evaluation as SVG, drawn by hand: a reliability diagram, and a metric by slice with its interval."""

from collections.abc import Sequence
from html import escape

import numpy as np

_SIDE, _LEFT, _TOP = 420, 60, 50
_BLUE, _GREY = "#1f5fa8", "#999"


def reliability_svg(title: str, bins_N3: np.ndarray, observed_N2: np.ndarray | None = None) -> str:
    """bins_N3: `metrics.reliability`. A dot a bin, its area by its rows, on axes that end just above the largest rate.
    observed_N2: the interval of each bin's observed rate, as a line through its dot."""
    largest_rate = max(
        float(part.max(initial=0.0)) for part in (bins_N3[:, :2], *([] if observed_N2 is None else [observed_N2]))
    )
    top = min(1.0, 1.1 * largest_rate or 1.0)
    inner = _SIDE - _LEFT - _TOP

    def across(value: float) -> float:
        return _LEFT + value / top * inner

    def up(value: float) -> float:
        return _TOP + inner - value / top * inner

    parts = _opened(_SIDE, _SIDE, title)
    for step in range(6):
        value = top * step / 5
        parts.append(_line(across(value), up(0), across(value), up(top), "#ddd"))
        parts.append(_line(across(0), up(value), across(top), up(value), "#ddd"))
        parts.append(_text(across(value), up(0) + 18, f"{value:.3g}", "middle"))
        parts.append(_text(_LEFT - 6, up(value) + 4, f"{value:.3g}", "end"))
    parts.append(_line(across(0), up(0), across(top), up(top), _GREY, dashed=True))
    if observed_N2 is not None:
        parts += [
            _line(across(predicted), up(low), across(predicted), up(high), _BLUE)
            for predicted, (low, high) in zip(bins_N3[:, 0], observed_N2, strict=True)
        ]
    largest = float(bins_N3[:, 2].max(initial=1.0))
    for predicted, observed, num_rows in bins_N3:
        radius = 2 + 4 * (num_rows / largest) ** 0.5
        parts.append(f'<circle cx="{across(predicted):.1f}" cy="{up(observed):.1f}" r="{radius:.1f}" fill="{_BLUE}"/>')
    parts.append(_text(_LEFT + inner / 2, _SIDE - 14, "predicted", "middle"))
    parts.append(_text(8, _TOP - 10, "observed"))
    return "\n".join([*parts, "</svg>", ""])


def slices_svg(title: str, rows: Sequence[tuple[str, float, float, float]], whole: float) -> str:
    """rows: (label, value, low, high), in order; whole: the value over everything, as a dashed line."""
    known = [number for _, *numbers in rows for number in numbers if np.isfinite(number)] + [whole]
    low, high = min(known), max(known)
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)
    width, left, height = 640, 190, _TOP + 26 * len(rows) + 40

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - 70)

    parts = _opened(width, height, title)
    parts.append(_line(across(whole), _TOP, across(whole), height - 40, _GREY, dashed=True))
    parts.append(_text(across(whole), height - 22, f"all {whole:.4f}", "middle"))
    for place, (label, value, value_low, value_high) in enumerate(rows):
        y = _TOP + 26 * place + 14
        parts.append(_text(left - 8, y + 4, label, "end"))
        if not np.isfinite(value):
            parts.append(_text(left, y + 4, "one class only"))
            continue
        if np.isfinite(value_low):
            parts.append(_line(across(value_low), y, across(value_high), y, _BLUE))
        parts.append(f'<circle cx="{across(value):.1f}" cy="{y:.1f}" r="4" fill="{_BLUE}"/>')
        parts.append(_text(width - 62, y + 4, f"{value:.4f}"))
    return "\n".join([*parts, "</svg>", ""])


def _opened(width: int, height: int, title: str) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="12" y="24" font-size="15">{escape(title)}</text>',
    ]


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="4 4"' if dashed else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="1.5"{dashes}/>'


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
