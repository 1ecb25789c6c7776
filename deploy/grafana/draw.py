"""Draws panels of the dashboard without Grafana, from their queries in Prometheus, with their titles, legends and colours.

    python3 -m pip install matplotlib==3.11.2
    python3 deploy/grafana/draw.py http://127.0.0.1:9090 --minutes 8 --rows Runs Graph --out deploy/grafana/picture.svg
"""
import argparse
import json
import time
import urllib.parse
import urllib.request
from datetime import datetime, timezone
from pathlib import Path

import matplotlib
matplotlib.use("svg")
import matplotlib.dates
import matplotlib.pyplot as plt

STEP_S = 10
ACROSS = 3
COLOURS = {"green": "#2e9e5b", "yellow": "#e0b400", "orange": "#e8791d", "red": "#d43b3b", "blue": "#3274d9"}
UNITS = {"s": "s", "percentunit": "share", "ops": "1/s", "reqps": "1/s"}


def ask(prometheus, path, **parameters):
    with urllib.request.urlopen(f"{prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as answer:
        return json.load(answer)["data"]["result"]


def query(target):
    text = target["expr"].replace("$__rate_interval", "30s")
    return text.replace("$job", ".*").replace("$instance", ".*")


def legend(target, labels):
    text = target.get("legendFormat") or ""
    for name, value in labels.items():
        text = text.replace("{{%s}}" % name, value)
    return text


def colour(panel, name):
    for override in panel["fieldConfig"].get("overrides", []):
        if override["matcher"]["options"] == name:
            fixed = next((p["value"]["fixedColor"] for p in override["properties"] if p["id"] == "color"), None)
            return COLOURS.get(fixed, fixed)


def draw_lines(axes, panel, prometheus, start, end):
    series = []
    for target in panel["targets"]:
        for found in ask(prometheus, "query_range", query=query(target), start=start, end=end, step=STEP_S):
            series.append((legend(target, found["metric"]), found["values"]))
    stacked = panel["fieldConfig"]["defaults"].get("custom", {}).get("stacking", {}).get("mode") == "normal"
    base = {}
    for index, (name, values) in enumerate(series):
        values = [(at, float(value)) for at, value in values if value != "NaN"]
        moments = matplotlib.dates.date2num([time_of(at) for at, _ in values])
        heights, chosen = [value for _, value in values], colour(panel, name) or f"C{index}"
        if stacked:
            below = [base.get(at, 0) for at, _ in values]
            tops = [b + h for b, h in zip(below, heights)]
            axes.fill_between(moments, below, tops, step="post", label=name, color=chosen, linewidth=0)
            base.update({at: top for (at, _), top in zip(values, tops)})
        else:
            axes.plot(moments, heights, label=name, color=chosen, linewidth=1.2)
    if series:
        axes.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False, ncols=3)
    axes.set_xlim(*matplotlib.dates.date2num([time_of(start), time_of(end)]))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(matplotlib.dates.DateFormatter("%H:%M"))
    axes.set_ylabel(UNITS.get(panel["fieldConfig"]["defaults"].get("unit"), ""), fontsize=6)


def time_of(seconds):
    return datetime.fromtimestamp(float(seconds), timezone.utc)


def rows_of(dashboard):
    rows, name = {}, None
    for panel in sorted(dashboard["panels"], key=lambda p: (p["gridPos"]["y"], p["gridPos"]["x"])):
        if panel["type"] == "row":
            name = panel["title"]
        elif panel["type"] == "timeseries":
            rows.setdefault(name, []).append(panel)
    return rows


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("prometheus")
    arguments.add_argument("--minutes", type=float, default=8)
    arguments.add_argument("--rows", nargs="+", required=True)
    arguments.add_argument("--out", required=True)
    given = arguments.parse_args()
    rows = rows_of(json.loads(Path(__file__).with_name("inventoryd.json").read_text()))
    panels = [panel for row in given.rows for panel in rows[row][:ACROSS]]
    end = time.time()
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 7, "axes.spines.top": False, "axes.spines.right": False})
    down = len(given.rows)
    figure, grid = plt.subplots(down, ACROSS, figsize=(12, 2.6 * down), layout="constrained", squeeze=False)
    for axes, panel in zip(grid.flat, panels):
        axes.set_title(panel["title"], fontsize=8, loc="left")
        draw_lines(axes, panel, given.prometheus, end - given.minutes * 60, end)
    figure.savefig(given.out, metadata={"Date": None})


main()
