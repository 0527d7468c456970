"""The report of a run: a single HTML page without scripts or links to other files. Every value is escaped."""

from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from ..core.about import project
from ..core.data import Row
from ..core.events import Sample, Step, Validation, entries

COLUMNS = 6  # most samples in a row; the first and the last are always shown
POINTS = 1000  # most points of a curve
SMOOTHING = 25  # the thick line is a mean over 1 / SMOOTHING of the curve
WIDTH, HEIGHT, LEFT, RIGHT, BELOW = 780, 240, 64, 28, 24  # a chart's size and its margins for the axes, in pixels
COLORS = ("#2a7de1", "#e1702a", "#2aa15f", "#a04fd0", "#b8860b", "#c2304b")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"
STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 860px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 0 0 1em } th, td { text-align: left; vertical-align: top }
th, td { padding: 2px 12px 2px 0 } th { font-weight: 500; opacity: .7 } td { overflow-wrap: anywhere }
svg { width: 100%; height: auto } svg text { font-size: 11px; fill: currentColor } small { opacity: .7 }
.error { border-left: 4px solid #c2304b; padding-left: 12px; white-space: pre-wrap }
.advice { border-left: 4px solid #e1a12a; padding-left: 12px }
.samples { overflow-x: auto } .samples img { width: 128px; display: block }
"""
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Report:
    """summary, config, history: as the job's routes return them. files: bytes by name. samples: their folder."""

    summary: dict[str, Any]
    config: dict[str, Any]
    history: Sequence[dict[str, Any]]
    rows: Sequence[Row]
    base_model: str
    files: dict[str, int]
    environment: dict[str, str]
    samples: Path

    def html(self) -> str:
        s = self.summary
        error = f'<p class="error">{escape(s["error"])}</p>' if s["error"] else ""
        advice = "".join(
            f'<p class="advice">{escape(a.get("text", ""))}{more(a.get("link", ""))}</p>' for a in s["advice"]
        )
        files = {name: f"{size / 2**20:.1f} MiB" for name, size in self.files.items()}
        data = [(row.name, f"{row.unit}, {row.role}", " x ".join(map(str, row.shape[1:]))) for row in self.rows]
        parts = [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>{escape(s['run_name'])}</title><style>{STYLE}</style></head><body>",
            f"<h1>{escape(s['run_name'])}</h1>{error}{advice}",
            table(self._facts().items()),
            *self._charts(),
            self._samples(),
            section("Files", table(files.items())),
            section("Data", table(data, ("name", "use", "latent frames x height x width"))),
            section("Options", table(self.config.items())),
            section("Environment", table(self.environment.items())),
            f'<p><small>Made by <a href="{escape(project("Repository"))}">Kinoloom</a>.</small></p></body></html>',
        ]
        return "\n".join(filter(None, parts)).encode("utf-8", "replace").decode()

    def _facts(self) -> dict[str, Any]:
        s = self.summary
        pace = s["seconds_per_step"]
        facts = {
            "Method": s["title"],
            "Model": self.base_model,
            "State": s["status"],
            "Steps": f"{s['done']} of {s['total']}",
            "Seconds per step": pace and f"{pace:.3g}",
            "Plan": s["plan"] and s["plan"]["text"],
            "Began": moment(s["created"]),
            "Ended": s["ended"] and moment(s["ended"]),
        }
        return {name: value for name, value in facts.items() if value}

    def _charts(self) -> Iterable[str]:
        steps = entries(self.history, Step)
        validations = [e for e in entries(self.history, Validation) if e["loss"] is not None]
        for phase in dict.fromkeys(e["phase"] for e in steps):
            own = [e for e in steps if e["phase"] == phase]
            losses: dict[str, Points] = defaultdict(list)
            for entry in own:
                for name, value in entry["losses"].items():
                    if value is not None:
                        losses[name].append((entry["step"], value))
            measured = [e for e in validations if e["phase"] == phase]
            yield section(f"Loss, phase {phase}", chart(losses, measured))
            for title, key in (("Learning rate", "learning_rate"), ("Gradient norm before clipping", "grad_norm")):
                points = [(e["step"], e[key]) for e in own if e[key] is not None]
                yield section(f"{title}, phase {phase}", chart({key: points}), level=3)

    def _samples(self) -> str:
        taken = evenly(entries(self.history, Sample), COLUMNS)
        if not taken:
            return ""
        prompts = taken[-1]["prompts"]
        head = "".join(f"<th>step {escape(str(e['done']))}</th>" for e in taken)
        lines = []
        for place, prompt in enumerate(prompts):
            cells = "".join(f"<td>{self._image(e['files'][place : place + 1])}</td>" for e in taken)
            lines.append(f'<tr><td colspan="{len(taken)}">{escape(prompt)}</td></tr><tr>{cells}</tr>')
        return section("Samples", f'<div class="samples"><table><tr>{head}</tr>{"".join(lines)}</table></div>')

    def _image(self, names: list[str]) -> str:
        for name in names:
            path = self.samples / Path(name).name
            if path.is_file():
                return f'<img alt="" src="data:image/webp;base64,{b64encode(path.read_bytes()).decode()}">'
        return ""


def more(link: str) -> str:
    """An HTML link, or "" if `link` is not a web address."""
    return f' <a href="{escape(link)}">More</a>' if link.startswith("https://") else ""


def section(title: str, content: str, level: int = 2) -> str:
    return f"<h{level}>{escape(title)}</h{level}>{content}" if content else ""


def table(rows: Iterable[tuple], head: tuple[str, ...] = ()) -> str:
    """An HTML table of plain values. Without column names in `head` the first value of a row is its name."""
    tag = "td" if head else "th"
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = [
        f"<tr><{tag}>{escape(str(first))}</{tag}>{''.join(f'<td>{escape(str(value))}</td>' for value in others)}</tr>"
        for first, *others in rows
    ]
    return f"<table>{f'<tr>{top}</tr>' if top else ''}{''.join(lines)}</table>" if lines else ""


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` evenly spread items, the first and the last included."""
    if len(items) <= count:
        return list(items)
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def thinned(points: Points) -> Points:
    """At most POINTS points, each a mean of neighbours."""
    size = -(-len(points) // POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def smoothed(points: Points) -> Points:
    """A moving average of the points."""
    reach = len(points) // SMOOTHING // 2
    values = [y for _, y in points]
    return [(x, fmean(values[max(i - reach, 0) : i + reach + 1])) for i, (x, _) in enumerate(points)]


def chart(series: dict[str, Points], validations: Sequence[dict] = ()) -> str:
    """An SVG chart: measured series as thin lines, smoothed ones as thick lines, validations as dots (best filled)."""
    thin = {name: thinned(points) for name, points in series.items() if points}
    if not thin:
        return ""
    thick = {name: smoothed(points) for name, points in thin.items()}
    dots = [(e["step"], e["loss"]) for e in validations]
    xs, ys = zip(*(point for points in [*thick.values(), dots] for point in points), strict=True)
    (low, high), (first, last) = (min(0.0, *ys), max(ys) * 1.1 or 1.0), (min(xs), max(*xs, min(xs) + 1))

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - first) / (last - first), (min(max(y, low), high) - low) / (high - low)
        return round(LEFT + across * (WIDTH - LEFT - RIGHT), 1), round(8 + (1 - up) * (HEIGHT - BELOW - 8), 1)

    def line(points: Points, color: str, width: float, opacity: float) -> str:
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
        return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}" opacity="{opacity}"/>'

    parts, names = [], []
    for tick in range(5):
        value = low + (high - low) * tick / 4
        y = place(first, value)[1]
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="currentColor" opacity=".15"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.3g}</text>')
        x = first + (last - first) * tick / 4
        parts.append(f'<text x="{place(x, low)[0]}" y="{HEIGHT - 6}" text-anchor="middle">{x:.0f}</text>')
    for number, name in enumerate(thin):
        color = COLORS[number % len(COLORS)]
        parts += [line(thin[name], color, 1, 0.3), line(thick[name], color, 2, 1)]
        names.append(f'<span style="color:{color}">&#9632;</span> {escape(name)}')
    for entry in validations:
        x, y = place(entry["step"], entry["loss"])
        fill = "currentColor" if entry["best"] else "none"
        parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{fill}" stroke="currentColor"/>')
    if validations:
        where = "held-out clips" if validations[-1]["held_out"] else "fixed noise"
        names.append(f"&#9675; loss on {where}, filled when it was the best so far")
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
    return f"{svg}<p><small>{' &nbsp; '.join(names)}</small></p>"
