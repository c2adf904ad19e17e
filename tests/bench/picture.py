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
SHADES = """
  .k0 { fill: #57606a } .k1 { fill: #7d8590 } .k2 { fill: #9aa4af } .k3 { fill: #b7bfc7 } .k4 { fill: #d0d7de }
  .u5 { fill: #9a6700 } .u6 { fill: #1f7a4d } .u7 { fill: #2f6fbb } .u8 { fill: #8250df }
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


KERNEL = ("send", "receive", "epoll_wait", "switching", "the kernel")


def divided(spent: Mapping[str, Mapping[str, float]]) -> str:
    """What a call's time is made of, as another file: system -> part -> µs; the kernel's parts are grey."""
    longest = max(sum(parts.values()) for parts in spent.values())
    scale = (WIDTH - LABEL - 70) / longest
    marks, y = [], TOP - 20
    for name, parts in spent.items():
        x = float(LABEL)
        marks.append(f'<text class="head" x="0" y="{y + 15}">{escape(TITLES[name])}</text>')
        for number_of, (title, value) in enumerate(parts.items()):
            width = value * scale
            kind = "k" if title.startswith(KERNEL) else "u"
            about = f"{title}: {number(value)} µs"
            marks.append(
                f'<rect class="{kind}{number_of}" x="{x:.1f}" y="{y}" width="{max(width - 1, 0.5):.1f}" height="{BAR}">'
                f"<title>{escape(about)}</title></rect>"
            )
            x += width
        marks.append(f'<text x="{x + 8:.1f}" y="{y + 15}">{number(sum(parts.values()))}</text>')
        y += BAR + GAP
    y += 12
    for number_of, title in enumerate(next(iter(spent.values()))):
        kind = "k" if title.startswith(KERNEL) else "u"
        values = ", ".join(f"{number(parts[title])}" for parts in spent.values())
        marks.append(f'<rect class="{kind}{number_of}" x="{LABEL}" y="{y}" width="12" height="12" rx="2"/>')
        marks.append(f'<text x="{LABEL + 20}" y="{y + 11}">{escape(title)}: {values} µs</text>')
        y += 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 6}" role="img"'
        f' aria-label="where the time of a call goes">\n<style>{STYLE}{SHADES}</style>\n'
        '<text class="note" x="0" y="16">one blocking Login call, client and server on one core: µs of its median;'
        " grey is the kernel</text>\n" + "\n".join(marks) + "\n</svg>\n"
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
