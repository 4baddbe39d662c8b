"""What scripts/bench-vs-qemu says about its figures: the facts of a run, a table in Markdown, and a chart in SVG.

Figures are the document that --json stores. Nothing is measured here.
"""

import html
import statistics
import textwrap

OURS, SHIPPED, DIRECT, RAW, SINK = "blockyard", "qemu-nbd", "qemu-nbd direct", "nbdkit raw", "nbdkit null"


def medians(result):
    """Seconds of each server whose images were right in every round."""
    right = {name: seconds for name, seconds in result["seconds"].items() if name not in result["wrong"]}
    return {name: statistics.median(seconds) for name, seconds in right.items()}


def best_of_qemu(seconds):
    return min((seconds[name] for name in (SHIPPED, DIRECT) if name in seconds), default=None)


def rounds(results):
    number = results["rounds"]
    return f"median of {number} rounds" if number > 1 else "a single round, which is a hint only"


def facts(results):
    lines = [f"{name}: {value}" for name, value in results["facts"].items()]
    return "\n".join([*lines, f"size: {results['size_mib']} MiB; {rounds(results)}"])


def table(results):
    servers = results["servers"]
    columns = ["workload", *servers, "best qemu-nbd / blockyard"] + ["sink / blockyard"] * (SINK in servers)
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    for result in results["workloads"]:
        seconds = medians(result)
        best, ours, sink = best_of_qemu(seconds), seconds.get(OURS), seconds.get(SINK)
        cells = ["WRONG" if name in result["wrong"] else f"{seconds[name]:.2f} s" if name in seconds else "–"
                 for name in servers]
        cells.append(f"{best / ours:.2f}" if best and ours else "–")
        if SINK in servers:
            cells.append(f"{100 * sink / ours:.0f} %" if sink and ours else "–")
        lines.append("| " + " | ".join([result["name"], *cells]) + " |")
    return "\n".join(lines)


# What follows is the chart; lengths are in its own units.
WIDTH, LEFT, RIGHT = 800, 150, 140
BAR, ROW, HEADING = 11, 16, 30
# A bar that is longer than this many times the best of qemu-nbd is cut; its figure is there all the same.
LONGEST = 3.0

# It brings its own background, so that it can be read on any page. Words have a rim of it, where they cross a line.
STYLE = """
svg { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 12px }
.card { fill: #ffffff; stroke: #d0d7de } text { fill: #1f2328; stroke: #ffffff; stroke-width: 3px; paint-order: stroke }
.quiet { fill: #59636e; font-size: 11px }
.title { font-size: 16px; font-weight: 600 } .name { font-weight: 600 } .line { stroke: #59636e; stroke-dasharray: 3 3 }
.ours { fill: #d9480f } .qemu { fill: #5c7cfa } .other { fill: #adb5bd } .sink { fill: none; stroke: #868e96 }
.wrong { fill: #c92a2a; font-weight: 600 }
@media (prefers-color-scheme: dark) {
.card { fill: #0d1117; stroke: #3d444d } text { fill: #e6edf3; stroke: #0d1117 }
.quiet { fill: #9198a1 } .line { stroke: #9198a1 }
.ours { fill: #ff8a3d } .qemu { fill: #748ffc } .other { fill: #6c757d } .sink { fill: none; stroke: #adb5bd }
.wrong { fill: #ff8787 }
}
"""

COLOURS = {OURS: "ours", SHIPPED: "qemu", DIRECT: "qemu", SINK: "sink"}


def chart(results):
    """Bars of time for each workload, beside the best of qemu-nbd, which is 1: shorter is better."""
    parts = [text(20, 32, "title", "Blockyard beside qemu-nbd and nbdkit"),
             text(20, 50, "quiet", "Time until the data is on stable storage and the server has ended: shorter is better. "
                                   "Dashed: the best of qemu-nbd.")]
    unit = longest_unit(results)
    y = 60
    for result in results["workloads"]:
        y = workload(parts, result, results["servers"], unit, y)
    y += 16
    said = [f"{results['size_mib']} MiB, {rounds(results)}"]
    said += [f"{name} {value}" for name, value in results["facts"].items()]
    for line in textwrap.wrap(" · ".join(said), 125, break_long_words=False):
        y += 15
        parts.append(text(20, y, "quiet", line))
    height = y + 18
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        "<title>Blockyard beside qemu-nbd and nbdkit: time per workload</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>',
        *parts,
        "</svg>",
    ]) + "\n"


def longest_unit(results):
    """How wide a bar of time 1 is, so that the longest fits."""
    longest = 1.0
    for result in results["workloads"]:
        seconds = medians(result)
        if best := best_of_qemu(seconds):
            longest = max(longest, *(value / best for value in seconds.values()))
    return (WIDTH - LEFT - RIGHT) / min(longest, LONGEST)


def workload(parts, result, servers, unit, y):
    """Adds one group of bars; returns where it ends."""
    seconds = medians(result)
    best = best_of_qemu(seconds)
    # Without QEMU there is nothing to be relative to but the slowest of the others.
    one = best or max(seconds.values(), default=1.0)
    y += HEADING
    parts.append(f'<text x="20" y="{y}"><tspan class="name">{html.escape(result["name"])}</tspan>'
                 f'<tspan class="quiet" dx="8">{html.escape(result["what"])}</tspan></text>')
    y += 6
    shown = [name for name in servers if name in seconds or name in result["wrong"]]
    if best:
        parts.append(f'<path class="line" d="M {LEFT + unit:.1f} {y} v {ROW * len(shown)}"/>')
    for name in shown:
        kind = COLOURS.get(name, "other")
        parts.append(text(LEFT - 8, y + BAR, "name" if name == OURS else "", name, "end"))
        if name in result["wrong"]:
            parts.append(text(LEFT + 6, y + BAR, "wrong", "WRONG"))
        else:
            relative = seconds[name] / one
            width = max(1, unit * min(relative, LONGEST))
            label = ("» " if relative > LONGEST else "") + f"{seconds[name]:.2f} s"
            if name == OURS and best:
                label += f" ({relative:.2f})"
            parts.append(f'<rect class="{kind}" x="{LEFT}" y="{y + 2}" width="{width:.1f}" height="{BAR}" rx="1"/>')
            parts.append(text(LEFT + width + 6, y + BAR, "name" if name == OURS else "", label))
        y += ROW
    return y


def text(x, y, kind, words, anchor="start"):
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'
