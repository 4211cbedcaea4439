"""Tables and charts as HTML, drawn here so that nothing is fetched, screen readers can read them, and they follow light
and dark mode."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

Points = tuple[Sequence[float], Sequence[float]]
"""x and y values of a curve."""

_WIDTH, _HEIGHT = 480, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 30
_MOST_POINTS = 300
KINDS = 8
"""Number of curve styles (color and dashes); further curves repeat them."""


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    raw: frozenset[int] = frozenset(),
    numbers: Sequence[str] = (),
) -> str:
    """Returns a table that scrolls if it is wider than the page. Cells are text, or HTML in the columns `raw`; the
    columns named in `numbers` are right-aligned."""

    def cell(n: int, value: object, tag: str = "td", scope: str = "") -> str:
        right = ' class="number"' if head[n] in numbers else ""
        return f"<{tag}{scope}{right}>{value if tag == 'td' and n in raw else escape(str(value))}</{tag}>"

    top = "".join(cell(n, name, "th", ' scope="col"') for n, name in enumerate(head))
    body = "".join("<tr>" + "".join(cell(n, value) for n, value in enumerate(row)) + "</tr>" for row in rows)
    return (
        f'<div class="scrolls" role="region" aria-label="{escape(caption)}" tabindex="0"><table '
        f'class="figures"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def pairs(values: Mapping[str, str]) -> str:
    """Returns a list of names with values."""
    return (
        '<dl class="pairs">'
        + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in values.items())
        + "</dl>"
    )


def lines(title: str, items: Iterable[str]) -> str:
    """Returns a list with a heading; empty if there are no items."""
    rendered = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<h2>{escape(title)}</h2><ul class='lines'>{rendered}</ul>" if rendered else ""


def message(text: str, kind: str = "note") -> str:
    """Returns a message; screen readers announce the kind `problem` at once, `note` politely."""
    role = ' role="alert"' if kind == "problem" else ' role="status"'
    return f'<p class="message {kind}"{role}>{escape(text)}</p>' if text else ""


def note(text: str, kind: str = "") -> str:
    """Returns a paragraph without a frame; `kind` "bad" marks errors. Line breaks are kept."""
    return f'<p class="frame-note {kind}">{escape(text)}</p>' if text else ""


def bars(title: str, unit: str, columns: Sequence[tuple[str, int]]) -> str:
    """Returns a histogram of (name, count) columns."""
    if not columns:
        return ""
    most = max(count for _, count in columns)
    step = (_WIDTH - _LEFT - _RIGHT) / len(columns)
    drawn = []
    for n, (name, count) in enumerate(columns):
        height = (_HEIGHT - _TOP - _BOTTOM) * count / most
        drawn.append(
            f'<rect class="bar" x="{_LEFT + n * step:.1f}" y="{_HEIGHT - _BOTTOM - height:.1f}" '
            f'width="{max(1, step - 1):.1f}" height="{height:.1f}"><title>{escape(name)} {escape(unit)}: '
            f"{count}</title></rect>"
        )
    ends = _text(_LEFT, _HEIGHT - 8, columns[0][0], "start") + _text(
        _WIDTH - _RIGHT, _HEIGHT - 8, f"{columns[-1][0]} {unit}", "end"
    )
    description = "; ".join(f"{name}: {count}" for name, count in columns)
    return _figure(title, description, _axes(0, most) + "".join(drawn) + ends)


def curves(title: str, series: Mapping[str, Points]) -> str:
    """Returns a chart of several curves. Skips non-finite values and thins out many points, but keeps the last."""
    drawn = {name: points for name, given in series.items() if (points := _thinned(given))}
    if not drawn:
        return ""
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    if high == low:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left) if right > left else 0.5
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    body, legend, descriptions = [], [], []
    for n, (name, points) in enumerate(drawn.items()):
        kind = f"curve-{n % KINDS}"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        body.append(f'<polyline class="curve {kind}" points="{path}"/>')
        marks = points if len(points) <= 60 else points[-1:]
        for x, y in marks:
            px, py = at(x, y)
            body.append(
                f'<circle class="mark {kind}" cx="{px:.1f}" cy="{py:.1f}" r="2.5"><title>{escape(name)}, step {x:g}: '
                f"{y:.6g}</title></circle>"
            )
        swatch = f'<svg width="28" height="10" aria-hidden="true"><line class="curve {kind}" x1="0" y1="5" x2="28" y2="5"/></svg>'
        legend.append(f"<li>{swatch} {escape(name)}</li>")
        descriptions.append(
            f"{name}: {points[0][1]:.6g} at step {points[0][0]:g}, {points[-1][1]:.6g} at step {points[-1][0]:g}"
        )
    ends = _text(_LEFT, _HEIGHT - 8, f"{left:g}", "start") + _text(
        _WIDTH - _RIGHT, _HEIGHT - 8, f"step {right:g}", "end"
    )
    return _figure(
        title,
        "; ".join(descriptions),
        _axes(low, high) + "".join(body) + ends,
        f'<ul class="legend">{"".join(legend)}</ul>',
    )


def number(value: float | None, digits: int = 4) -> str:
    """Formats a number for people; empty for None."""
    return (
        ""
        if value is None
        else f"{value:,}"
        if isinstance(value, int)
        else f"{value:,.{digits}g}"
        if abs(value) < 1000
        else f"{value:,.0f}"
    )


def _thinned(points: Points) -> list[tuple[float, float]]:
    known = [(x, y) for x, y in zip(*points, strict=True) if y is not None and math.isfinite(y)]
    step = -(-len(known) // _MOST_POINTS) or 1
    return known[:-1:step] + known[-1:]


def _axes(low: float, high: float) -> str:
    parts = []
    for share in (0, 0.5, 1):
        y = _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{low + share * (high - low):.3g}", "end"))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(title: str, description: str, inner: str, below: str = "") -> str:
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'role="img" aria-label="{escape(title)}: {escape(description)}">{inner}</svg>{below}</figure>'
    )
