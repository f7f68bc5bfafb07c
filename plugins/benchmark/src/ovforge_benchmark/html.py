"""A benchmark as one HTML file that needs nothing else: tables, latencies, and where the time goes, as SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from ovforge_benchmark.schema import Benchmark, Histogram, Moment, Operator
from ovforge_benchmark.tables import duration

__all__ = ["Part", "benchmark_html", "flame_svg", "parts_of"]

_WIDTH, _ROW = 1000, 22
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#eeca3b")
_LEAST = 0.0008
"""Part of the width below which a box is not drawn."""


@dataclass
class Part:
    """A piece of time, in seconds, and what it is made of."""

    name: str
    seconds: float
    parts: list[Part] = field(default_factory=list)


def parts_of(report: Benchmark) -> Part:
    """Return the time of one call as a tree: stages, parts of stages, types of layers, layers."""
    latency = report.latency.mean if report.latency else 0.0
    root = Part("call" if report.subject == "pipeline" else "inference", latency)
    made: dict[str, Part] = {}
    for name in sorted(report.shares):
        part = Part(name.rpartition(".")[2], report.shares[name] * latency)
        above = made.get(name.rpartition(".")[0])
        (above or root).parts.append(part)
        made[name] = part
    if report.subject == "model":
        root.parts += _layers(report.operators, root.seconds)
        return root
    for role in dict.fromkeys(one.role for one in report.operators):
        place = next((part for name, part in made.items() if name.rpartition(".")[2] == role), None)
        if place is not None:
            place.parts += _layers([one for one in report.operators if one.role == role], place.seconds)
    return root


def _layers(found: Sequence[Operator], room: float) -> list[Part]:
    """Return types with their layers, the longest first, made to fit: counting itself takes time."""
    total = sum(one.seconds for one in found)
    scale = min(room / total, 1.0) if total else 1.0
    types: dict[str, Part] = {}
    for one in sorted(found, key=lambda one: -one.seconds):
        part = types.setdefault(one.type, Part(one.type, 0.0))
        part.seconds += one.seconds * scale
        part.parts.append(Part(f"{one.name} ({one.kernel})", one.seconds * scale))
    return sorted(types.values(), key=lambda part: -part.seconds)


def flame_svg(root: Part) -> str:
    """Return boxes as wide as they take time, each below what it is a part of; a pointer over one tells its name."""
    boxes: list[str] = []
    depth = _draw(root, 0.0, 0, root.seconds or 1.0, boxes)
    height = (depth + 1) * _ROW
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="100%" '
        f'font-family="sans-serif" font-size="11">{"".join(boxes)}</svg>'
    )


def _draw(part: Part, left: float, depth: int, whole: float, boxes: list[str]) -> int:
    width = part.seconds / whole
    if width < _LEAST:
        return depth
    x, y, wide = left * _WIDTH, depth * _ROW, width * _WIDTH
    colour = _COLOURS[sum(map(ord, part.name.partition(" ")[0])) % len(_COLOURS)]
    title = f"{part.name}: {duration(part.seconds)}, {width:.1%}"
    letters = int(wide / 6.2)
    text = part.name if len(part.name) <= letters else f"{part.name[: letters - 2]}.." if letters > 4 else ""
    label = f'<text x="{x + 3:.1f}" y="{y + 15}" fill="white">{escape(text)}</text>' if text else ""
    boxes.append(
        f'<g><title>{escape(title)}</title><rect x="{x:.2f}" y="{y}" width="{max(wide - 0.5, 0.3):.2f}" '
        f'height="{_ROW - 1}" rx="2" fill="{colour}"/>{label}</g>'
    )
    deepest, at = depth, left
    for inner in part.parts:
        deepest = max(deepest, _draw(inner, at, depth + 1, whole, boxes))
        at += inner.seconds / whole
    return deepest


def benchmark_html(report: Benchmark) -> str:
    """Return the whole report as one page."""
    from ovforge_benchmark.reports import benchmark_markdown

    sections = [_tables(benchmark_markdown(report))]
    if report.latency and (report.shares or report.operators):
        sections.append(f"<h2>Where the time goes</h2>{flame_svg(parts_of(report))}")
    if report.histogram and report.iterations > 1:
        sections.append(f"<h2>Latencies</h2>{_histogram(report.histogram)}")
    if report.timeline and report.iterations > 1:
        sections.append(f"<h2>Over time</h2>{_timeline(report.timeline)}")
    style = (
        "body{font:15px/1.5 sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}"
        "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;"
        "text-align:right}td:first-child,th:first-child{text-align:left}svg{margin:.5em 0}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(report.what)}</title>'
        f"<style>{style}</style><body>{''.join(sections)}</body></html>\n"
    )


def _tables(text: str) -> str:
    """Return our own Markdown, which has headings, tables, lists and paragraphs, as HTML."""
    made: list[str] = []
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line]
        if not lines:
            continue
        if lines[0].startswith("# "):
            made.append(f"<h1>{escape(lines[0][2:])}</h1>")
            lines = lines[1:]
        if lines and lines[0].startswith("|"):
            rows = [line.strip("|").replace("\\|", "\0").split("|") for line in lines if not line.startswith("| ---")]
            made.append("<table>")
            for number, row in enumerate(rows):
                tag = "td" if number else "th"
                cells = (escape(cell.strip().replace("\0", "|")) for cell in row)
                made.append("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>")
            made.append("</table>")
        else:
            made += [f"<p>{escape(line)}</p>" for line in lines]
    return "".join(made)


def _histogram(found: Histogram) -> str:
    most = max(found.counts) or 1
    width = _WIDTH / len(found.counts)
    bars = "".join(
        f'<g><title>{duration(edge)}: {count}</title><rect x="{n * width:.1f}" y="{120 - 110 * count / most:.1f}" '
        f'width="{width - 1:.1f}" height="{110 * count / most:.1f}" fill="#4c78a8"/></g>'
        for n, (edge, count) in enumerate(zip(found.edges, found.counts, strict=True))
    )
    return _framed(bars, f"{duration(found.edges[0])}", f"{duration(found.edges[-1])} and longer")


def _timeline(moments: Sequence[Moment]) -> str:
    values = [moment.median for moment in moments if moment.median is not None]
    high, width = max(values) or 1.0, _WIDTH / len(moments)

    def points() -> Iterable[str]:
        for number, moment in enumerate(moments):
            if moment.median is not None:
                yield f"{(number + 0.5) * width:.1f},{120 - 110 * moment.median / high:.1f}"

    line = f'<polyline points="{" ".join(points())}" fill="none" stroke="#e45756" stroke-width="1.5"/>'
    dots = "".join(
        f'<circle cx="{point.partition(",")[0]}" cy="{point.partition(",")[2]}" r="2" fill="#e45756"/>'
        for point in points()
    )
    return _framed(line + dots, "0 s", f"{moments[-1].start:.1f} s; median latency, at most {duration(high)}")


def _framed(inside: str, left: str, right: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} 140" width="100%" font-family="sans-serif" '
        f'font-size="11">{inside}<line x1="0" y1="120.5" x2="{_WIDTH}" y2="120.5" stroke="#888"/>'
        f'<text x="0" y="135">{escape(left)}</text><text x="{_WIDTH}" y="135" text-anchor="end">{escape(right)}</text>'
        "</svg>"
    )
