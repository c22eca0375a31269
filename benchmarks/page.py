"""Writes BENCHMARKS.md and the README's table of speeds from results/*.json, and from nothing else.

    python benchmarks/page.py

The files come from `pytest benchmarks --benchmark-only --benchmark-json=FILE`.
"""

import json
from itertools import groupby
from pathlib import Path

import matplotlib.figure
from accuracy import tables
from headline import ROWS

HERE = Path(__file__).parent
PAGE, README = HERE / "BENCHMARKS.md", HERE.parent / "README.md"
MARK = "<!-- speeds: written by benchmarks/page.py -->"

KNOWN = {  # what has a column of its own, or is for machines
    *("ratio", "ratio_low", "ratio_high", "ms", "peer_ms", "peak_mib", "peer_peak_mib"),
    *("samples_per_s", "peer_samples_per_s", "gflop_per_s"),
    *("of_matmul_ceiling", "of_copy_ceiling", "summary"),
}
HOW = """
Written by `python benchmarks/page.py` from `benchmarks/results/*.json`, and from nothing else.
Times are CPU time on one thread (CUDA events on a GPU), ours and the peer's in turn in one process:
the median of the ratios of the pairs, with their quartiles. Differences below 1.1 are none. The
ceiling is that of a large matrix product, or of a large copy where a call only moves bytes; memory
is the most that tensors made during the call hold.
"""
EXPECT = """
Expect to win: a frozen or fixed first layer, where the head is a large part of the step (Barlow
Twins) or is stepped alone; whole grids of probes, which cost little more than one setting; ridge,
spectra and CKA; early exit. Expect parity: presets against the library's own heads, in any
precision; whole SimCLR and BYOL steps, where the head is a small part; taps against plain hooks;
one kNN setting; autoencoder pretraining against a plain loop. Expect to lose: a swap against
setattr, as it looks for optimisers and copies that hold the old head, one or two tenths of a second
once; a grid of MLP probes, which costs several times a loop for one of them; memory of kNN with
Euclidean distances against scikit-learn.
"""


def results():
    """Every results file of pytest-benchmark, by name."""
    read = {path.stem: json.loads(path.read_text()) for path in sorted(HERE.glob("results/*.json"))}
    return {name: content for name, content in read.items() if "benchmarks" in content}


def infos(content):
    """What each benchmark of a file noted, by its name, where it has a peer."""
    found = {one["name"]: one["extra_info"] for one in content["benchmarks"]}
    return {name: info for name, info in found.items() if "ratio" in info}


def ratio(info):
    """Median with quartiles."""
    return f"{info['ratio']:.2f} [{info['ratio_low']:.2f}, {info['ratio_high']:.2f}]"


def headline(files):
    """The table of what a reader should know first, with a column for each file."""
    columns = {name: found for name, content in files.items() if (found := infos(content))}
    lines = [
        f"| ours | peer | {' | '.join(f'ours / peer, {name}' for name in columns)} |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for ours, peer, names in ROWS:
        cells = [cell(found, names) for found in columns.values()]
        lines.append(f"| {ours} | {peer} | {' | '.join(cells)} |")
    return lines


def cell(found, names):
    """The ratios of some benchmarks, or of all whose names begin alike."""
    start = names[0].rstrip("*")
    if start != names[0]:
        ratios = [info["ratio"] for name, info in found.items() if name.startswith(start)]
        return f"{min(ratios):.2f} to {max(ratios):.2f} ({len(ratios)} heads)" if ratios else ""
    shown = [found[name] for name in names if name in found]
    if len(shown) == 1:
        return ratio(shown[0])
    return ", ".join(f"{info['ratio']:.2f}" for info in shown)


def picture(found, path):
    """All ratios on one axis, with their quartiles."""
    shown = {n: i for n, i in found.items() if not n.startswith("test_head_against")}
    figure = matplotlib.figure.Figure(figsize=(9, 0.27 * len(shown) + 1), layout="constrained")
    axes = figure.subplots()
    for y, info in enumerate(shown.values()):
        axes.plot([info["ratio_low"], info["ratio_high"]], [y, y], color="#0072b2", linewidth=2)
        axes.plot(info["ratio"], y, "o", color="#0072b2", markersize=5)
    axes.axvline(1, color="#8a8a8b", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(shown)), [words(name) for name in shown], fontsize=7)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("time of ours / peer's; below 1 ours is faster")
    figure.savefig(path, dpi=110)


def words(name):
    """A benchmark's name as words."""
    return name.removeprefix("test_").replace("_", " ")


def section(name, content):
    """One results file: how it was made, and every number."""
    about, commit = content["machine_info"], content["commit_info"]
    ran = about | content.get("headplug", {})
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    lines = [
        f"## {name}",
        "",
        f"`{ran['command']}`, {content['datetime'][:10]}, commit "
        f"`{commit['id'][:10]}`{' with changes' * commit['dirty']}; {about['machine']['cpu']}, "
        f"{about['machine']['cores']} cores, GPU: {about['machine']['gpu']}; {versions}.",
    ]
    if tops := ran.get("ceilings"):
        products = ", ".join(f"{k} {v / 1e9:,.0f} GFLOP/s" for k, v in tops.items() if k != "copy")
        lines += ["", f"Ceilings, measured: {products}; copying {tops['copy'] / 1e9:.1f} GB/s."]
    if accuracies := tables.with_rows(content):
        lines += ["", f"![Accuracy before and behind each head](results/{name}-accuracy.png)"]
    for one in accuracies:
        lines += ["", f"### {words(one['name'])}", "", *tables.table(one)]
    timed = [one for one in content["benchmarks"] if one not in accuracies]
    for module, group in groupby(timed, lambda one: one["fullname"].split("::")[0]):
        lines += ["", f"### {module.removeprefix('benchmarks/')}", ""]
        lines += [
            "| benchmark | ours, ms | ours / peer's time | samples/s | of the ceiling | "
            "MiB, ours / peer | also |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [row(one) for one in group]
    return lines


def row(one):
    """One benchmark as a row of its section."""
    info = one["extra_info"]
    ceiling = info.get("of_matmul_ceiling", info.get("of_copy_ceiling"))
    ms = info.get("ms", 1000 * one["stats"]["median"])
    memory = [plain(info[k]) for k in ("peak_mib", "peer_peak_mib") if k in info]
    rest = {
        k: v for k, v in info.items() if k not in KNOWN and not k.startswith(("peer_g", "peer_of"))
    }
    cells = [
        words(one["name"]),
        f"{ms:,.1f}" if ms > 0.01 else "",
        ratio(info) if "ratio" in info else "",
        f"{info['samples_per_s']:,.0f}" if "samples_per_s" in info else "",
        f"{ceiling:.0%}" if ceiling else "",
        " / ".join(memory),
        ", ".join(f"{k} {plain(v)}" for k, v in rest.items()),
    ]
    return f"| {' | '.join(cells)} |"


def plain(value):
    """A number or a list of numbers, short."""
    if isinstance(value, list):
        return " ".join(map(plain, value))
    if isinstance(value, dict):
        return "; ".join(f"{k} {plain(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def flowing(text):
    """A paragraph on one line."""
    return " ".join(text.split())


def written(files):
    """The text of the page, and of the README around its new table."""
    table = headline(files)
    page = [
        "# Benchmarks",
        "",
        flowing(HOW),
        "",
        *table,
        "",
        "![All ratios](results/speeds.png)",
        "",
        flowing(EXPECT),
    ]
    for name, content in files.items():
        page += ["", *section(name, content)]
    before, _, rest = README.read_text("utf-8").partition(MARK + "\n")
    _, _, after = rest.partition(MARK)
    return "\n".join(page) + "\n", "\n".join([before + MARK, *table, MARK + after])


def main():
    """Writes the page, its pictures and the README's table."""
    files = results()
    if "cpu" not in files:
        raise SystemExit("results/cpu.json is missing: run pytest with --benchmark-json=FILE.")
    page, readme = written(files)
    PAGE.write_text(page, "utf-8")
    README.write_text(readme, "utf-8")
    picture(infos(files["cpu"]), HERE / "results" / "speeds.png")
    for name, content in files.items():
        if accuracies := tables.with_rows(content):
            tables.picture(accuracies, HERE / "results" / f"{name}-accuracy.png")


if __name__ == "__main__":
    main()
