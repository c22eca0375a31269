"""Tables and a picture of the benchmarks of accuracy, from what they noted."""

import matplotlib.figure

SIDES = (("pre_projection", "before the head", "#0072b2"), ("projection", "behind it", "#d55e00"))
SETTINGS = (
    *("data", "images", "test_images", "backbone", "pretrained", "recipe", "epochs", "batch_size"),
    *("lr", "ae_epochs", "seeds", "protocol", "pairs", "size", "tested_on", "comparable"),
)


def with_rows(content):
    """The benchmarks of accuracy in a results file."""
    return [one for one in content["benchmarks"] if "rows" in one["extra_info"]]


def table(one):
    """One benchmark: its settings, and each head before and behind it."""
    info = one["extra_info"]
    settings = ", ".join(f"{key} {info[key]}" for key in SETTINGS if key in info)
    lines = [settings + ".", "", "| head | tap | probe | accuracy, % | gain over | images/s |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in shown(info["rows"]):
        cells = [
            f"`{row['head']}`",
            f"`{row['tap']}`",
            row["probe"],
            interval(row, "accuracy", "low", "high", ".1f"),
            interval(row, "gain", "gain_low", "gain_high", "+.1f"),
            f"{row['train_images_per_s']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines[2] = lines[2].replace("gain over", f"gain over `{info['default_head']}`, points")
    for head, figures in info.get("paper", {}).items():
        text = ", ".join(f"{key} {value}" for key, value in figures.items())
        lines += ["", f"The paper's own record of `{head}`: {text}."]
    return lines


def shown(rows):
    """Those on both sides of the head, and the best tap of each head and probe elsewhere."""
    best = {}
    for row in rows:
        kept = best.setdefault((row["head"], row["probe"]), row)
        if row["accuracy"] > kept["accuracy"]:
            best[row["head"], row["probe"]] = row
    sides = {tap for tap, *_ in SIDES}
    return [row for row in rows if row["tap"] in sides or row is best[row["head"], row["probe"]]]


def interval(row, name, low, high, form):
    """A share in per cent with its interval."""
    if row[name] is None:
        return ""
    value, low, high = (f"{100 * row[key]:{form}}" for key in (name, low, high))
    return f"{value} [{low}, {high}]"


def picture(ones, path):
    """Accuracy before and behind each head, a panel for each benchmark."""
    heights = [len({row["head"] for row in one["extra_info"]["rows"]}) for one in ones]
    size = (8, 0.45 * sum(heights) + 1.1 * len(ones))
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(ones), squeeze=False, height_ratios=[h + 1 for h in heights])
    for axes, one in zip(panels[:, 0], ones, strict=True):
        rows = one["extra_info"]["rows"]
        heads = list(dict.fromkeys(row["head"] for row in rows))
        probes = {row["probe"] for row in rows}
        probe = "linear" if "linear" in probes else probes.pop()
        for offset, (tap, label, colour) in zip((-0.12, 0.12), SIDES, strict=True):
            found = [r for r in rows if r["tap"] == tap and r["probe"] == probe]
            for number, row in enumerate(found):
                y = heads.index(row["head"]) + offset
                ends = [100 * row["low"], 100 * row["high"]]
                axes.plot(ends, [y, y], color=colour, linewidth=2)
                text = label if number == 0 else None
                axes.plot(100 * row["accuracy"], y, "o", color=colour, markersize=6, label=text)
        axes.set_yticks(range(len(heads)), heads, fontsize=8)
        axes.set_ylim(len(heads) - 0.5, -0.5)
        axes.grid(axis="x", color="#e5e5e5")
        axes.set_title(one["name"].removeprefix("test_").replace("_", " "), fontsize=9, loc="left")
        axes.set_xlabel(f"accuracy of a {probe} probe, % with 95% interval", fontsize=8)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
