"""The page of the report: its style and its sections, as plain HTML and CSS without scripts or network."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import yaml

from avs_dist.evaluate import COLUMNS, definitions

STYLE = """
:root { --ink: #1c2430; --muted: #6b7686; --line: #e6e9ee; --truth: #0f9d8a; --model: #e8622c; --wash: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 12px; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 56px 0 6px; }
h3 { font-size: .95rem; margin: 28px 0 8px; overflow-wrap: anywhere; }
p { margin: 0 0 10px; max-width: 70ch; }
.lead, .hint { color: var(--muted); }
.hint { font-size: .9rem; max-width: 100ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(175px, 1fr)); gap: 14px; margin-top: 28px; }
.card { background: var(--wash); border-radius: 12px; padding: 18px 18px 16px; }
.card:first-child { background: var(--truth); color: #fff; }
.card b { display: block; font-size: 2.1rem; line-height: 1.1; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.card strong { display: block; margin: 4px 0 8px; font-size: .92rem; }
.card span { display: block; font-size: .82rem; line-height: 1.45; color: var(--muted); }
.card:first-child span { color: #e2f6f2; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .94rem; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--muted); font-weight: 500; font-size: .85rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 11em; }
tr:nth-child(1) td { font-weight: 600; }
td.bar { width: 24%; min-width: 110px; }
td.bar i { display: block; height: 10px; border-radius: 5px; background: #cdd4dd; }
tr:nth-child(1) td.bar i { background: var(--truth); }
dl { font-size: .85rem; color: var(--muted); margin: 14px 0 0; display: grid; grid-template-columns: max-content 1fr;
  gap: 3px 14px; }
dt { color: var(--ink); } dd { margin: 0; }
.panel { display: grid; gap: 4px; align-items: center; }
.panel img { display: block; width: 100%; border-radius: 5px; }
.panel img.sound { border-radius: 0; height: clamp(36px, 7vw, 64px); }
.panel .side { font-size: .8rem; color: var(--muted); padding-right: 6px; }
.panel .foot { font-size: .74rem; color: var(--muted); text-align: center; padding: 1px 0 4px;
  font-variant-numeric: tabular-nums; line-height: 1.25; }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin: 0 5px 0 12px; }
.key i:first-child { margin-left: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 20px; margin-top: 12px; }
.pair img { width: 100%; display: block; }
video { display: block; width: 100%; max-width: 640px; max-height: 70vh; border-radius: 10px; background: #000;
  margin: 14px 0 8px; }
pre { background: var(--wash); border-radius: 10px; padding: 14px 16px; overflow-x: auto; font-size: .82rem;
  line-height: 1.5; }
summary { cursor: pointer; font-size: .95rem; }
a { color: var(--truth); }
@media (max-width: 600px) { main { padding: 28px 16px 48px; } h1 { font-size: 1.55rem; }
  .panel { gap: 2px; } .panel .side { font-size: .66rem; padding-right: 2px; } .panel .foot { font-size: .6rem; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; } }
"""


@dataclass(frozen=True)
class Card:
    """A headline number, its name, and one sentence on what it means."""

    value: str
    label: str
    meaning: str


@dataclass(frozen=True)
class PanelView:
    """One clip: PNG pictures by row and second, and a note under each second (or none).

    legend: name and colour (#rrggbb) of the classes in the pictures; None where they show sounding or silent.
    """

    name: str
    rows: Mapping[str, Sequence[bytes]]
    scores: Sequence[str]
    legend: Sequence[tuple[str, str]] | None = None


def page(title: str, body: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def header(title: str, notes: Sequence[str]) -> str:
    return f"<h1>{escape(title)}</h1>" + "".join(f'<p class="lead">{escape(note)}</p>' for note in notes)


def cards(items: Sequence[Card]) -> str:
    if not items:
        return ""
    inner = "".join(
        f'<div class="card"><b>{escape(c.value)}</b><strong>{escape(c.label)}</strong>'
        f"<span>{escape(c.meaning)}</span></div>"
        for c in items
    )
    return f'<div class="cards">{inner}</div>'


def results_section(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Table of all rows, with the definition of every column below it."""
    shown = [key for key in COLUMNS if any(key in row for row in rows.values())]
    head = "".join(f"<th>{escape(COLUMNS[key])}</th>" for key in shown)
    body = ""
    for name, row in rows.items():
        cells = "".join(f"<td>{_number(row.get(key))}</td>" for key in shown)
        width = 100 * min(max(row["miou"], 0.0), 1.0) if math.isfinite(row["miou"]) else 0.0
        body += f'<tr><td>{escape(name)}</td><td class="bar"><i style="width:{width:.1f}%"></i></td>{cells}</tr>'
    texts = definitions(rows)
    meaning = "".join(f"<dt>{escape(COLUMNS[key])}</dt><dd>{escape(texts[key])}</dd>" for key in shown)
    return (
        f"<h2>Results</h2>{_counts(rows)}"
        f'<div class="scroll"><table><thead><tr><th>what the model hears</th><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div><dl>{meaning}</dl>"
    )


def panels_section(panels: Sequence[PanelView]) -> str:
    key = '<i style="background:#fff;border:1px solid #888"></i>outline of the truth'
    if any(panel.legend is not None for panel in panels):
        key = "each class in its colour " + key
    if any(panel.legend is None for panel in panels):
        key = (
            '<i style="background:var(--truth)"></i>what really sounds'
            '<i style="background:var(--model)"></i>what the model paints, stronger where it is surer' + key
        )
    return (
        f'<h2>Second by second</h2><p class="hint key">{key}</p>'
        '<p class="hint">The strip below is the sound of each second (log-mel, low tones at the bottom, black is '
        "silence).</p>" + "".join(_panel(panel) for panel in panels)
    )


def video_section(source: str, name: str, poster_png: bytes) -> str:
    return (
        "<h2>On video</h2>"
        '<p class="hint">What the model hears is painted; the sound of the film is unchanged.</p>'
        f'<video controls preload="metadata" playsinline poster="{_data_uri(poster_png)}" '
        f'src="{escape(source)}"></video>'
        f'<p class="hint"><a href="{escape(source)}">{escape(name)}</a></p>'
    )


def curves_section(loss_png: bytes | None, miou_png: bytes | None) -> str:
    pictures = [_image(png, alt) for png, alt in ((loss_png, "loss curve"), (miou_png, "mIoU curve")) if png]
    return f'<h2>Training</h2><div class="pair">{"".join(pictures)}</div>' if pictures else ""


def repeat_section(command: str | None, config: Mapping[str, Any]) -> str:
    text = escape(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    shell = f"<pre>{escape(command)}</pre>" if command else ""
    return f"<h2>How to repeat it</h2>{shell}<details><summary>Config</summary><pre>{text}</pre></details>"


def signed(value: float) -> str:
    """+0.34 or, with a real minus sign, −0.34."""
    return f"{value:+.2f}".replace("-", "−")


def _panel(panel: PanelView) -> str:
    seconds = len(next(iter(panel.rows.values())))
    cells = ""
    for row, pictures in panel.rows.items():
        cells += f'<div class="side">{escape(row)}</div>'
        cells += "".join(_image(png, f"{row}, second {second}", row) for second, png in enumerate(pictures, start=1))
        if row == "model" and panel.scores:
            cells += "<div></div>" + "".join(f'<div class="foot">{escape(score)}</div>' for score in panel.scores)
    cells += "<div></div>" + "".join(f'<div class="foot">{second} s</div>' for second in range(1, seconds + 1))
    columns = f"grid-template-columns:max-content repeat({seconds},minmax(0,1fr))"
    classes = "".join(f'<i style="background:{colour}"></i>{escape(name)}' for name, colour in panel.legend or ())
    legend = f'<p class="hint key">{classes}</p>' if classes else ""
    return f'<h3>{escape(panel.name)}</h3>{legend}<div class="panel" style="{columns}">{cells}</div>'


def _image(png: bytes, alt: str, kind: str = "") -> str:
    style = f' class="{escape(kind)}"' if kind else ""
    return f'<img{style} alt="{escape(alt)}" src="{_data_uri(png)}">'


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _number(value: float | None) -> str:
    return f"{value:.3f}" if value is not None and math.isfinite(value) else "–"


def _counts(rows: Mapping[str, Mapping[str, float]]) -> str:
    first = next(iter(rows.values()))
    if "frames" not in first:
        return ""
    return f'<p class="hint">{first["frames"]:.0f} frames, something sounds in {first["frames_with_sound"]:.0f}.</p>'
