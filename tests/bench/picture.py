"""The comparison as a picture for the README: plain SVG, two panels of bars, colours that read on light and dark.

Bars are linear from zero. A bar that would leave the panel is cut, and says so by its end and its number.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from statistics import median
from typing import Any

from report import TITLES, number

WIDTH, LABEL, BAR, GAP, TOP = 860, 190, 20, 9, 74
ROOM = WIDTH - LABEL - 150  # what the longest bar has; its number stands behind it
CUT_AT = 4.0  # times mprpc's bar: beyond, differences between the others would hide those that matter

PANELS = [
    ("latency_one_core", "p50", "One blocking Login call, client and server on one core: median, µs"),
    ("capacity", "cpu", "Server CPU for a call, 16 connections, replayed by a client in C: µs"),
]
SYSTEMS = ["raw_c", "raw_python", "epoll_pb", "mprpc", "thriftpy2", "grpcio", "grpcio_aio"]
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f }
  .head { font-weight: 600 }
  .note { font-size: 11px; fill: #6e7781 }
  .bar { fill: #9aa4af }
  .floor { fill: #c9d1d9 }
  .ours { fill: #1f7a4d }
  .cut { fill: none; stroke: #ffffff; stroke-width: 3 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .note { fill: #8d96a0 }
    .bar { fill: #6e7681 }
    .floor { fill: #484f58 }
    .ours { fill: #3fb950 }
    .cut { stroke: #0d1117 }
  }
"""


def draw(told: Mapping[str, Any]) -> str:
    """The whole file. `told`: what the runner writes as JSON. Raises KeyError when a panel was not measured."""
    parts, y = [], TOP
    for mode, metric, title in PANELS:
        parts.append(f'<text class="head" x="0" y="{y - 12}">{escape(title)}</text>')
        values = {
            name: median(told["figures"][mode][name][metric]) for name in SYSTEMS if name in told["figures"][mode]
        }
        scale = ROOM / min(max(values.values()), CUT_AT * values["mprpc"])
        for name, value in values.items():
            parts += bar(name, value, y, scale)
            y += BAR + GAP
        y += 44
    about = (
        f"{told['cpu']}, {told['cores']} cores, Python {told['python']}, protobuf {told['protobuf']}, {told['date']}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img"'
        f' aria-label="mprpc compared with other systems">\n<style>{STYLE}</style>\n'
        f'<text class="note" x="0" y="16">shorter is better; medians of one run, pinned and interleaved</text>\n'
        f'<text class="note" x="0" y="34">{escape(about)}</text>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def bar(name: str, value: float, y: float, scale: float) -> list[str]:
    length = min(value * scale, ROOM)
    kind = "ours" if name == "mprpc" else "floor" if name.startswith("raw") else "bar"
    parts = [
        f'<text x="0" y="{y + 15}">{escape(TITLES[name])}</text>',
        f'<rect class="{kind}" x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2"/>',
        f'<text x="{LABEL + length + 8:.1f}" y="{y + 15}">{number(value)}</text>',
    ]
    if value * scale > ROOM:
        at = LABEL + length - 26
        parts.append(f'<path class="cut" d="M{at:.1f} {y + BAR + 2} l10 {-BAR - 4}"/>')
    return parts
