"""The runner's own arithmetic: ratios are taken within rounds, targets judged, regressions seen."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from modes import figures
from picture import PANELS, SYSTEMS, draw
from report import BASIS, TARGETS, Target, history, ratios, regressions, table

LATENCY = Target("latency_one_core", "p50", "mprpc", "epoll_pb", at_most=0.9)
BULK = Target("bulk", "rate", "mprpc", "epoll_pb", at_least=1.2)


def measured(mprpc: list[float], epoll_pb: list[float]) -> dict[str, dict[str, dict[str, list[float]]]]:
    return {"latency_one_core": {"mprpc": {"p50": mprpc}, "epoll_pb": {"p50": epoll_pb}}}


def figures_of(target: Target, ratios: list[float]) -> dict[str, dict[str, dict[str, list[float]]]]:
    return {target.mode: {target.system: {target.metric: ratios}, target.other: {target.metric: [1.0] * len(ratios)}}}


def test_a_ratio_is_taken_within_its_round() -> None:
    # Rounds on a machine that was three times as slow in the second: the medians' ratio would be 0.5 by accident.
    assert LATENCY.of(measured([10, 30, 11], [20, 60, 22])) == [0.5, 0.5, 0.5]
    assert ratios(measured([10, 90, 11], [20, 60, 22]))[LATENCY.name] == 0.5


def test_what_was_not_measured_has_no_ratio() -> None:
    assert LATENCY.of({"latency_one_core": {"mprpc": {"p50": [1.0]}}}) == []
    assert ratios({}) == {}


@pytest.mark.parametrize(("target", "good", "bad"), [(LATENCY, 0.9, 0.91), (BULK, 1.2, 1.19)])
def test_a_target_is_reached_at_its_bound(target: Target, good: float, bad: float) -> None:
    assert target.reached(good)
    assert not target.reached(bad)


@pytest.mark.parametrize(
    ("target", "value", "worse"),
    [
        (LATENCY, 1.09, False),
        (LATENCY, 1.11, True),
        (LATENCY, 0.5, False),
        (BULK, 0.91, False),
        (BULK, 0.89, True),
        (BULK, 2.0, False),
    ],
)
def test_over_ten_percent_worse_is_flagged(target: Target, value: float, worse: bool) -> None:
    before = [{"ratios": {target.name: each}} for each in (0.97, 1.0, 1.03)]
    found = regressions(figures_of(target, [value] * 4), before)
    assert bool(found) is worse
    assert all(target.name in line for line in found)


def test_only_the_latest_runs_count() -> None:
    before = [{"ratios": {LATENCY.name: 5.0}}] * 10 + [{"ratios": {LATENCY.name: 1.0}}] * BASIS
    now = figures_of(LATENCY, [1.2])
    assert regressions(now, before)
    assert not regressions(now, before[:10])
    assert not regressions(now, [])


@pytest.mark.parametrize(("values", "worse"), [([1.0, 1.09, 2.0, 2.0], False), ([1.0, 1.2, 1.2, 1.2], True)])
def test_three_quarters_of_the_rounds_must_be_worse(values: list[float], worse: bool) -> None:
    assert bool(regressions(figures_of(LATENCY, values), [{"ratios": {LATENCY.name: 1.0}}])) is worse


def test_history_is_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    assert history(file) == []
    file.write_text('{"ratios": {}}\n{"ratios": {"a": 1}}\n')
    assert [run["ratios"] for run in history(file)] == [{}, {"a": 1}]


def test_names_of_targets_differ() -> None:
    assert len({target.name for target in TARGETS}) == len(TARGETS)


def test_the_table_says_which_targets_are_missed() -> None:
    shown = figures()
    shown["latency_one_core"]["mprpc"]["p50"] += [9.0, 10.0, 11.0]
    shown["latency_one_core"]["epoll_pb"]["p50"] += [10.0, 10.0, 10.0]
    text = table(shown)
    assert "10.00 (9.00-11.00)" in text
    assert "at most 0.9" in text
    assert "NOT REACHED" in text
    assert json.loads(json.dumps(shown)) == shown


def test_the_picture_is_xml_with_a_bar_for_each_system() -> None:
    about = {"cpu": "A & B <fast>", "cores": 2, "python": "3.11", "protobuf": "7.36", "date": "2026-01-05"}
    values = dict.fromkeys(SYSTEMS, 1.0) | {"grpcio": 400.0}
    shown = {mode: {name: {metric: [value]} for name, value in values.items()} for mode, metric, _ in PANELS}
    root = ElementTree.fromstring(draw({**about, "figures": shown}))
    bars = list(root.iter("{http://www.w3.org/2000/svg}rect"))
    assert len(bars) == len(PANELS) * len(SYSTEMS)
    assert max(float(each.get("width", "0")) + float(each.get("x", "0")) for each in bars) < 860
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) == len(PANELS)  # grpcio's bars are cut
