"""The evidence of a tuning: a table of all trials, and a picture of time or memory against score."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ovforge.model import METRICS
from ovforge_benchmark.tables import duration, machine_line, markdown_table, size
from ovforge_benchmark.tuning.schema import Trial, TuningReport

__all__ = ["cost", "markdown", "pareto", "picture"]

_INK, _GREY, _FRONT, _FAIL = (20, 20, 20), (150, 150, 150), (30, 110, 200), (200, 70, 60)


def pareto(report: TuningReport) -> list[Trial]:
    """Return the trials that no other one beats in both cost and score, the cheapest first.

    Scores that are written in the same way are the same: other numbers of threads add in another order.
    """
    able = sorted((trial for trial in report.trials if not trial.error), key=lambda t: (t.cost(report.aim), -t.score))
    front: list[Trial] = []
    for trial in able:
        if not front or round(trial.score, 4) > round(front[-1].score, 4):
            front.append(trial)
    return front


def markdown(report: TuningReport, image: str | None = None) -> str:
    """Return the report; `image` is the name of the picture beside it."""
    original = next(trial for trial in report.trials if not trial.changes)
    front = {trial.label for trial in pareto(report)}
    rows = []
    for trial in sorted((t for t in report.trials if not t.error), key=lambda trial: trial.cost(report.aim)):
        verdict = "winner" if trial.label == report.winner else "front" if trial.label in front else ""
        verdict = verdict if trial.score >= report.min_score else "too far off"
        rows.append(
            [trial.label, duration(trial.seconds), f"{original.seconds / trial.seconds:.2f}x",
             score(report, trial.score), size(trial.memory) if trial.memory else "-", str(trial.calls), verdict]
        )  # fmt: skip
    lines = [f"# {report.what}, tuned for {report.aim}\n", f"{machine_line(report.machine)}\n"]
    lines.append(markdown_table(["pipeline", "a call", "faster", report.metric, "memory", "calls", ""], rows))
    limit = f"{report.metric} of at least {score(report, report.min_score)}"
    if report.winner is None and not report.complete:
        lines.append(f"Nothing better than the original with {limit} was found, but not all was tried.\n")
    elif report.winner is None:
        lines.append(f"Nothing that was tried is better than the original with {limit}.\n")
    else:
        lines.append(f"Winner, with {limit}: **{report.winner}**.\n")
    if len(report.duel) == 2:
        ours, theirs = report.duel[1], report.duel[0]
        lines.append(
            f"Measured anew, in turn: {cost(report, ours)} after {cost(report, theirs)} of the original "
            f"({theirs.cost(report.aim) / ours.cost(report.aim):.2f}x), {report.metric} {score(report, ours.score)}.\n"
        )
    if image is not None:
        lines.append(f"![cost and score of each]({image})\n")
    lines += [f"- not run: {trial.label}: {trial.error}" for trial in report.trials if trial.error]
    if report.left_out:
        lines.append(f"- left out, since the time was over or others promised more: {', '.join(report.left_out)}")
    measured = [trial for trial in report.trials if trial.label in (original.label, report.winner)]
    lines += [f"- warning: {trial.label}: {warning}" for trial in measured for warning in trial.warnings]
    return "\n".join([*lines, *(f"- warning: {warning}" for warning in report.warnings)]) + "\n"


def cost(report: TuningReport, trial: Trial) -> str:
    """Return what was to become small, as people write it."""
    value = trial.cost(report.aim)
    return size(value) if report.aim == "memory" else f"{duration(value)} a call"


def score(report: TuningReport, value: float) -> str:
    """Return a score as people write it."""
    unit = METRICS[report.metric].unit if report.metric in METRICS else ""
    return f"{value:.2f} {unit}" if unit else f"{value:.4f}"


def picture(report: TuningReport) -> Image.Image:
    """Return the Pareto picture, RGB: cost to the right, score upwards; what no other beats is joined by a line."""
    width, height, left, top, right, bottom = 960, 600, 90, 50, 40, 70
    trials = [trial for trial in report.trials if not trial.error]
    costs, scores = [t.cost(report.aim) for t in trials], [t.score for t in trials]
    low, high = min(costs) * 0.95, max(costs) * 1.05
    floor = max(min(*scores, report.min_score), report.min_score - 3 * (max(scores) - report.min_score + 1e-3))
    floor, ceiling = floor - 0.05 * (max(scores) - floor + 1e-3), max(scores) + 0.05 * (max(scores) - floor + 1e-3)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(18), ImageFont.load_default(13)

    def place(trial: Trial) -> tuple[float, float]:
        x = left + (trial.cost(report.aim) - low) / (high - low) * (width - left - right)
        part = (max(trial.score, floor) - floor) / (ceiling - floor)
        return x, height - bottom - part * (height - top - bottom)

    title = f"{'memory' if report.aim == 'memory' else 'a call'} and {report.metric}, tuned for {report.aim}"
    draw.text((width / 2, 14), title, _INK, large, anchor="ma")
    draw.rectangle((left, top, width - right, height - bottom), outline=_GREY)
    limit = height - bottom - (report.min_score - floor) / (ceiling - floor) * (height - top - bottom)
    draw.line((left, limit, width - right, limit), fill=_FAIL)
    words = f"at least {score(report, report.min_score)}"
    draw.text((width - right - 6, limit - 4), words, _FAIL, small, anchor="rs")
    told = size if report.aim == "memory" else duration
    for part in range(5):
        x, y = left + part / 4 * (width - left - right), height - bottom - part / 4 * (height - top - bottom)
        draw.text((x, height - bottom + 8), told(low + part / 4 * (high - low)), _INK, small, anchor="ma")
        draw.text((left - 8, y), f"{floor + part / 4 * (ceiling - floor):.3f}", _INK, small, anchor="rm")
    front = pareto(report)
    if len(front) > 1:
        draw.line([place(trial) for trial in front], fill=_FRONT, width=2)
    named = {report.winner, "original", *(trial.label for trial in front)}
    taken = [
        (left, limit - 16, width - right, limit + 2),
        *((x - 5, y - 5, x + 5, y + 5) for x, y in map(place, trials)),
    ]
    for trial in trials:
        x, y = place(trial)
        good = trial.score >= report.min_score
        radius = 8 if trial.label == report.winner else 5
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_FRONT if good else _FAIL)
        if trial.label in named:
            _name(draw, small, trial.label, (x, y), (left, width - right), taken)
    return sheet


def _name(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    text: str,
    point: tuple[float, float],
    sides: Sequence[float],
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Write a label beside its point, in the first place that no point and no other label has."""
    text = text if len(text) <= 60 else f"{text[:57]}..."
    width = font.getlength(text)
    middle, right, left = point[0] - width / 2, point[0] + 12, point[0] - width - 12
    for begin, offset in ((right, -8), (left, -8), *((middle, by) for by in (10, -26, 26, -42, 42, -58))):
        x = min(max(begin, sides[0] + 4), sides[1] - width - 4)
        box = (x, point[1] + offset, x + width, point[1] + offset + 15)
        if not any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in taken):
            break
    taken.append(box)
    draw.text((box[0], box[1]), text, _INK, font)
