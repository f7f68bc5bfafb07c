"""What a tab says of a run, as HTML: every text that comes from elsewhere is escaped here."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from ovforge import Result
from ovforge.errors import Cancelled, OvforgeError
from ovforge_ui.hosts import Host, Moment

__all__ = ["READY", "WAITING", "about", "details", "ended", "failed", "running"]

_PREVIEW = 512
"""Longest side of a preview, in pixels."""


def _status(state: str, text: str, more: str = "") -> str:
    return f'<div class="ovforge-status" role="status" data-state="{state}"><p>{text}</p>{more}</div>'


READY = _status("ready", "Ready.")
WAITING = _status("running", "Waiting for its turn...", "<progress></progress>")


def running(moment: Moment) -> str:
    """Return how far a run is, with a picture of the work as it stands."""
    progress = moment.progress
    if progress is None:
        return WAITING
    words = f"{progress.stage}: {progress.done} of {progress.total}" if progress.total else progress.stage
    note = f" &middot; {html.escape(progress.note)}" if progress.note else ""
    numbers = f' max="{progress.total}" value="{progress.done}"' if progress.total else ""
    bar = f"<progress{numbers}></progress>"
    picture = _picture(moment.preview) if moment.preview is not None else ""
    return _status("running", f"{html.escape(words)}{note} &middot; {moment.seconds:.1f} s", bar + picture)


def ended(text: str) -> str:
    """Return that a run is done."""
    return _status("done", html.escape(text))


def failed(error: OvforgeError) -> str:
    """Return an error with where it is and what to do about it; a run that was cancelled is none."""
    if isinstance(error, Cancelled):
        return _status("cancelled", "Cancelled.")
    where = f"<strong>{html.escape(error.where)}</strong>: " if error.where else ""
    hint = f"<p>{_lines(error.hint)}</p>" if error.hint else ""
    return _status("error", f"{where}{_lines(error.what)}", hint)


def details(results: Mapping[str, Result], rows: Sequence[Mapping[str, str]]) -> str:
    """Return what results say of themselves, their warnings and timings; `rows` compare several."""
    parts = [_table(rows)] if rows else []
    for name, result in results.items():
        if len(results) > 1 and (result.lines() or result.warnings):
            parts.append(f"<h4>{html.escape(name)}</h4>")
        if lines := result.lines():
            parts.append(f"<pre>{html.escape(chr(10).join(lines))}</pre>")
        parts += [f'<p class="ovforge-warning">{html.escape(warning)}</p>' for warning in result.warnings]
        title = f"Timings of {html.escape(name)}" if len(results) > 1 else "Timings"
        parts.append(f"<details><summary>{title}</summary><pre>{html.escape(str(result.timings))}</pre></details>")
    return f'<div class="ovforge-details">{"".join(parts)}</div>'


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row.values())}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _lines(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


def _picture(picture: Any) -> str:
    small = picture.convert("RGB")
    small.thumbnail((_PREVIEW, _PREVIEW))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="ovforge-preview" alt="The picture so far" src="data:image/jpeg;base64,{data}">'


def about(hosts: Sequence[Host]) -> str:
    """Return what runs in a tab: the task, the model, its steps, the device, and the precision that it computes in."""
    parts = []
    for host in hosts:
        pipeline = host.pipeline
        kinds = dict.fromkeys(pipeline.provenance()["precision"].values())
        steps = [use.use for use in (*pipeline.config.transform, *pipeline.config.quantize)]
        words = [pipeline.config.load.source, *steps, pipeline.device_plan.full_name, ", ".join(kinds)]
        text = " &middot; ".join(html.escape(word) for word in words if word)
        name = f"<strong>{html.escape(host.name)}</strong>: " if len(hosts) > 1 else ""
        parts.append(f"<div>{name}{text}</div>")
    return f'<div class="ovforge-about"><p>{html.escape(hosts[0].task.summary)}.</p>{"".join(parts)}</div>'
