# SPDX-License-Identifier: Apache-2.0
"""The dashboard without Grafana: a real Prometheus answers its queries, and we draw them."""

from __future__ import annotations

import http.client
import json
import math
import re
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bed.netns import NetNamespace
from tests.manifests import Json, render

PORT = 19090
PATIENCE_S = 60
WINDOW = "15s"  # of the picture's rates, in place of the dashboard's 5 minutes
STEP_S = 2
COLUMNS, ROW_INCH, COLUMN_INCH = 24, 0.26, 0.5  # of Grafana's grid
ABOVE = 0.5  # rows, for the first titles
DPI = 110
COLOUR_COUNT = 32
CONFIG = """\
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: tcpip-bypass-node
    static_configs: [{{targets: ["{target}"]}}]
"""

Entering = Callable[[Sequence["str | Path"]], "list[str | Path]"]


@dataclass(frozen=True)
class Series:
    """One line of a graph; times in seconds since the epoch."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Prometheus:
    """Its HTTP interface, on loopback in a network namespace."""

    host: NetNamespace

    def over(self, expression: str, start: float, end: float) -> list[Series]:
        """The expression's values from start to end. Raises RuntimeError."""
        asked = {"query": expression, "start": start, "end": end, "step": STEP_S}
        answer = self._get("query_range", asked)
        return [
            Series(each["metric"], [(at, float(value)) for at, value in each["values"]])
            for each in answer["result"]
        ]

    def at(self, expression: str, when: float) -> list[Series]:
        """Its value at one time. Raises RuntimeError."""
        answer = self._get("query", {"query": expression, "time": when})
        return [
            Series(each["metric"], [(each["value"][0], float(each["value"][1]))])
            for each in answer["result"]
        ]

    def _get(self, path: str, asked: Json) -> Json:
        with self.host.entered():
            connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=30)
            connection.connect()
        with closing(connection):
            connection.request("GET", f"/api/v1/{path}?{urllib.parse.urlencode(asked)}")
            answer: Json = json.loads(connection.getresponse().read())
        if answer["status"] != "success":
            raise RuntimeError(f"Prometheus: {asked['query']}: {answer['error']}")
        data: Json = answer["data"]
        return data


@contextmanager
def prometheus(
    entering: Entering, host: NetNamespace, folder: Path, target: str
) -> Iterator[Prometheus]:
    """One that scrapes `target` every second; its data is in `folder`, which it makes."""
    folder.mkdir()
    config = folder / "prometheus.yml"
    config.write_text(CONFIG.format(target=target))
    options = [f"--config.file={config}", f"--storage.tsdb.path={folder}/data"]
    listen = f"--web.listen-address=127.0.0.1:{PORT}"
    log = folder / "log"
    with (
        log.open("wb") as said,
        subprocess.Popen(
            entering(["prometheus", *options, listen]),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        ) as process,
    ):
        try:
            found = Prometheus(host)
            deadline = time.monotonic() + PATIENCE_S
            while not _is_scraping(found):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"Prometheus scrapes nothing:\n{log.read_text()}")
                time.sleep(0.5)
            yield found
        finally:
            process.terminate()


def _is_scraping(found: Prometheus) -> bool:
    try:
        return any(point[1] == 1 for each in found.at("up", time.time()) for point in each.points)
    except (OSError, ValueError):
        return False


def draw(source: Prometheus, start: float, end: float, path: Path) -> None:
    """Every panel at its place, from start to end (seconds since the epoch), into one PNG."""
    import matplotlib as mpl  # noqa: PLC0415 - pyplot takes a second to import

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    panels = json.loads(render.DASHBOARD.read_text())["panels"]
    rows = ABOVE + max(each["gridPos"]["y"] + each["gridPos"]["h"] for each in panels)
    figure = plt.figure(figsize=(COLUMNS * COLUMN_INCH, rows * ROW_INCH))
    for panel in panels:
        place = panel["gridPos"]
        is_graph = panel["type"] == "timeseries"
        margins = (1.3, 1.4, 1.7, 2.5) if is_graph else (0.2, 0.2, 0.4, 0.6)
        left, below, across, down = margins
        axes = figure.add_axes(
            (
                (place["x"] + left) / COLUMNS,
                1 - (ABOVE + place["y"] + place["h"] - below) / rows,
                (place["w"] - across) / COLUMNS,
                (place["h"] - down) / rows,
            )
        )
        axes.set_title(panel["title"], fontsize=8, loc="left")
        PANELS[panel["type"]](axes, panel, source, start, end)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    with Image.open(path) as picture:
        picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=COLOUR_COUNT).save(
            path, optimize=True
        )


def _expression(target: Json) -> str:
    text: str = target["expr"]
    return text.replace("$instance", ".*").replace("[5m]", f"[{WINDOW}]")


def _legend(target: Json, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), target["legendFormat"])


def _graph(axes: Any, panel: Json, source: Prometheus, start: float, end: float) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    for target in panel["targets"]:
        for each in source.over(_expression(target), start, end):
            minutes, values = _with_gaps(each.points, start)
            axes.plot(minutes, values, linewidth=1.2, label=_legend(target, each.labels))
    axes.set_xlim(0, (end - start) / 60)
    has_top = "max" in defaults
    axes.set_ylim(defaults.get("min", 0), defaults["max"] if has_top else 1.35 * axes.get_ylim()[1])
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.yaxis.set_major_formatter(lambda value, _: in_unit(value, defaults["unit"]))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=6, ncols=4, loc="lower left" if has_top else "upper left")
    else:
        axes.text(0.5, 0.5, "No data", ha="center", transform=axes.transAxes, fontsize=9)


def _with_gaps(
    points: Sequence[tuple[float, float]], start: float
) -> tuple[list[float], list[float]]:
    """Minutes since the start, and values: NaN where there is none for more than a step."""
    minutes, values = [], []
    before = points[0][0]
    for at, value in points:
        if at > before + STEP_S:
            minutes.append(math.nan)
            values.append(math.nan)
        minutes.append((at - start) / 60)
        values.append(value)
        before = at
    return minutes, values


def _stat(axes: Any, panel: Json, source: Prometheus, _: float, end: float) -> None:
    (target,) = panel["targets"]
    found = source.at(_expression(target), end)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    text = in_unit(found[0].points[0][1], unit) if found else "No data"
    axes.text(0.5, 0.42, text, ha="center", va="center", fontsize=17)
    axes.set(xticks=[], yticks=[])


def _table(axes: Any, panel: Json, source: Prometheus, _: float, end: float) -> None:
    (target,) = panel["targets"]
    found = source.at(_expression(target), end)
    lines = []
    for each in found:
        lines += [f"{key}: {value}" for key, value in sorted(each.labels.items())]
        lines.append(f"nodes: {each.points[0][1]:.0f}")
    axes.text(0.04, 0.92, "\n".join(lines), va="top", fontsize=8, linespacing=1.6)
    axes.set(xticks=[], yticks=[])


PANELS: dict[str, Callable[[Any, Json, Prometheus, float, float], None]] = {
    "timeseries": _graph,
    "stat": _stat,
    "table": _table,
}


def in_unit(value: float, unit: str) -> str:
    """As Grafana shows a value in one of the dashboard's units."""
    if unit == "percentunit":
        return f"{value * 100:.3g}%"
    suffix = {"Bps": "B/s", "bytes": "B", "ops": "/s", "s": "s"}.get(unit, "")
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{suffix}"
    return f"{value:.3g}{' ' if suffix.startswith('B') else ''}{suffix}"
