"""The report of a comparison: the answer first, then the numbers behind it, in one HTML file.

A pure function of the results mapping. The page needs no network, no script and no font, and reads
on a phone and in the dark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

from headplug.compare import figures
from headplug.compare.digest import (
    Results,
    Table,
    answer,
    head_tables,
    number,
    ranked,
    results_table,
    score,
)
from headplug.files import atomic

__all__ = ["answer", "results_table", "write_report"]


def write_report(results: Results, path: str | Path) -> Path:
    """Writes the report of `results` as one self-contained HTML page.

    Args:
        results: The mapping of results.json, schema 1.
        path: The file to write, e.g. "report.html".

    Returns:
        `path`.

    Raises:
        DataError: The results have another schema.
        RunError: The file cannot be written.
    """
    page = _page(results)
    with atomic(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return Path(path)


def _page(results: Results) -> str:
    lead, *more = answer(results)
    config = results.get("config") or {}
    subject = [str(config[key]) for key in ("data", "backbone", "recipe") if config.get(key)]
    seeds = len(results["seeds"])
    subject.append(f"{seeds} seed{'s' * (seeds != 1)}")
    parts = {
        "palette": "".join(f"--c{i}:{light};" for i, (light, _) in enumerate(figures.COLOURS)),
        "dark_palette": "".join(f"--c{i}:{dark};" for i, (_, dark) in enumerate(figures.COLOURS)),
        "subject": escape(" · ".join(subject)),
        "lead": _prose(lead),
        "more": "".join(f"<p>{_prose(sentence)}</p>" for sentence in more),
        "failed": _failed(results.get("failed") or ()),
        "made": _made(results),
        "numbers": "",
    }
    if results["runs"]:
        both = zip(_CAPTIONS, head_tables(results), strict=True)
        parts["numbers"] = (
            f"<section><h2>Head by head</h2>"
            f"{''.join(_table(c, t) for c, t in both if len(t[0]) > 1)}</section>"
            f"<section><h2>Layer by layer</h2>{_figures(results)}</section>"
            f"<section><h2>All numbers</h2>{_details(results)}</section>"
        )
    return Template(_TEMPLATE).substitute(parts)


def _failed(failed: Iterable[Mapping[str, Any]]) -> str:
    items = "".join(
        "<li>" + _prose("`{head}`, seed {seed}: {error}".format(**run)) + "</li>" for run in failed
    )
    title = "These runs failed and are in no number below"
    return f'<section class="failed"><h2>{title}</h2><ul>{items}</ul></section>' if items else ""


def _figures(results: Results) -> str:
    runs, default = results["runs"], (results.get("summary") or {}).get("default_head")
    look = figures.looks(ranked(results), default)
    keys = [
        f'<li><i style="color:var(--c{i})">{glyph}</i> {_name(head)}</li>'
        for i, (head, glyph) in enumerate(zip(look, figures.GLYPHS, strict=False))
    ]
    others = len(ranked(results)) - len(look)
    if others:
        keys.append(f'<li><i style="color:var(--grey)">—</i> {others} others, in the tables</li>')
    drawn = "".join(
        f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, svg in figures.drawn(runs, look)
    )
    return f'<ul class="legend">{"".join(keys)}</ul><div class="figures">{drawn}</div>'


def _details(results: Results) -> str:
    """The full tables, folded away."""
    titles = ("Every measurement", "Rank of the features", "Every run")
    tables: dict[str, list[dict[str, str]]] = {title: [] for title in titles}
    measured, ranks, ran = tables.values()
    for run in results["runs"]:
        which = {"head": run["head"], "seed": str(run["seed"])}
        measured += [
            {
                **which,
                "tap": row["tap"],
                "probe": row["probe"],
                "setting": _options(row.get("setting")),
                "accuracy": score(row),
                "where chosen": score({"accuracy": row.get("val_accuracy")}),
                "selected on": row.get("selected_on") or "-",
            }
            for row in run["taps"]
        ]
        ranks += [
            {
                **which,
                "tap": row["tap"],
                "dimensions": number(row.get("dim"), 0),
                "RankMe": number(row.get("rankme"), 1),
                "effective rank": number(row.get("effective_rank"), 1),
                "participation ratio": number(row.get("participation_ratio"), 1),
                "stable rank": number(row.get("stable_rank"), 1),
                "alpha": number(row.get("alpha"), 2),
                "condition number": number(row.get("condition_number"), 0),
                "dead units, %": score({"accuracy": row.get("dead_units")}),
            }
            for row in run.get("spectra") or ()
        ]
        ran.append(
            {
                **which,
                "training, s": number(run.get("train_seconds"), 1),
                "autoencoder": _options(run.get("autoencoder")),
                "configuration": _options(run.get("head_config")),
            }
        )
    return "".join(
        f"<details><summary>{title} ({len(rows)} rows)</summary>"
        + _table(title, ([("", label) for label in rows[0]], [list(row.values()) for row in rows]))
        + "</details>"
        for title, rows in tables.items()
        if rows
    )


def _made(results: Results) -> str:
    """Command, selection rule, configuration, versions, machine and definitions."""
    best = (results.get("summary") or {}).get("best") or {}
    gain = (results.get("summary") or {}).get("gain") or {}
    about = {
        **{key: results.get(key) for key in ("command", "created", "seeds")},
        "selected on": best.get("selected_on"),
        "gain's interval": gain.get("method"),
    }
    parts = {
        "This run": {key: value for key, value in about.items() if value is not None},
        "Data": results.get("data"),
        "Configuration": results.get("config"),
        "Machine": results.get("machine"),
        "Versions": results.get("versions"),
        "Definitions": results.get("definitions"),
    }
    return "".join(
        f"<section><h3>{title}</h3><dl>"
        + "".join(f"<dt>{escape(k)}</dt><dd>{escape(_plain(v))}</dd>" for k, v in entries.items())
        + "</dl></section>"
        for title, entries in parts.items()
        if entries
    )


def _table(caption: str, table: Table) -> str:
    """A table that scrolls sideways in its own box; its first column is the row's heading."""
    columns, rows = table
    numeric = (all(re.fullmatch(r"[\d.,]+|-", cell) for cell in c) for c in zip(*rows, strict=True))
    side = [' class="n"' if is_number else "" for is_number in numeric]
    groups = [(group, len(list(own))) for group, own in groupby(columns, key=lambda c: c[0])]
    top = "".join(f'<th colspan="{n}" scope="colgroup">{escape(g)}</th>' for g, n in groups)
    top = f'<tr class="groups">{top}</tr>' if len(groups) > 1 else ""
    labels = "".join(
        f'<th scope="col"{s}>{escape(c[1])}</th>' for c, s in zip(columns, side, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{_name(row[0])}</th>'
        + "".join(f"<td{s}>{_cell(cell)}</td>" for cell, s in zip(row[1:], side[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption><span>{escape(caption)}</span></caption>"
        f"<thead>{top}<tr>{labels}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    """A cell, with the interval in smaller type."""
    return re.sub(r" (\[[^\]]*\])$", r" <small>\1</small>", escape(text))


def _name(text: str) -> str:
    """A head's name, which may break after its punctuation."""
    return re.sub(r"([\[,])", r"\1<wbr>", escape(text))


def _prose(sentence: str) -> str:
    return re.sub(r"`([^`]*)`", lambda name: f"<code>{_name(name[1])}</code>", escape(sentence))


def _options(options: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key}={_plain(value)}" for key, value in (options or {}).items()) or "-"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


_CAPTIONS = (
    "Before and after the head. Accuracies in per cent on the test images, mean over seeds, with "
    "their 95% interval in brackets; heads in the order of their accuracy where settings are "
    "chosen.",
    "The best layer of each head, and what the head costs.",
)
_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>headplug: $subject</title>
<style>
:root{color-scheme:light dark;--page:#f6f6f4;--card:#fff;--ink:#1d2126;--soft:#59626d;
--rule:#dcdfe3;--grey:#8b9199;--accent:#0072b2;--bad:#b3261e;$palette}
@media(prefers-color-scheme:dark){:root{--page:#14171a;--card:#1d2125;--ink:#e8eaed;--soft:#a6aeb8;
--rule:#353b42;--grey:#7b838c;--accent:#56a9e0;--bad:#ff8a80;$dark_palette}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
main{max-width:75rem;margin:0 auto;padding:2rem clamp(1rem,4vw,3rem) 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:0}
h2{font-size:1.2rem;margin:2.5rem 0 .75rem}
h3{font-size:1rem;margin:0 0 .5rem}
.subject,figcaption,caption,dt,small{color:var(--soft)}
.subject{margin:.25rem 0 1.5rem}
code{font:.92em ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
overflow-wrap:anywhere}
.answer,.failed,.scroll,figure{background:var(--card);border:1px solid var(--rule);
border-radius:8px}
.answer{border-left:5px solid var(--accent);padding:1.1rem 1.4rem}
.answer p{margin:.35rem 0 0;max-width:70ch}
.answer .lead{font-size:1.25rem;line-height:1.4;margin:0 0 .6rem}
.lead code{font-weight:600}
.failed{border-left:5px solid var(--bad);padding:1rem 1.4rem;margin-top:1rem}
.failed h2{margin:0;color:var(--bad);font-size:1rem}
.failed ul{margin:.4rem 0 0;padding-left:1.1rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin-bottom:1rem}
table{border-collapse:collapse;font-size:.875rem;min-width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.8rem .9rem .3rem}
caption span{display:block;position:sticky;left:.9rem;width:min(62rem,calc(100vw - 5rem))}
th,td{padding:.45rem .9rem;text-align:left;vertical-align:baseline;white-space:nowrap}
thead th{font-weight:600;color:var(--soft)}
thead tr:last-child th{border-bottom:1px solid var(--rule)}
.groups th{padding-bottom:0;color:var(--ink)}
tbody tr+tr>*{border-top:1px solid var(--rule)}
th[scope=row]{font-weight:600;white-space:normal;min-width:min(15rem,36vw);position:sticky;left:0;
background:var(--card)}
.n{text-align:right}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1.4rem;list-style:none;margin:0 0 .8rem;padding:0;
font-size:.9rem}
.legend i{font-style:normal}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));gap:1rem}
figure{margin:0;padding:1rem}
figure svg{display:block;width:100%;height:auto;stroke-linejoin:round}
figure svg text{font-family:inherit!important}
figcaption{font-size:.875rem;margin-top:.5rem}
details{margin:.6rem 0}
summary{cursor:pointer;padding:.3rem 0;font-weight:600}
.made{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:2rem}
dl{display:grid;grid-template-columns:minmax(6rem,auto) 1fr;gap:.2rem 1rem;margin:0;
font-size:.875rem}
dd{margin:0;overflow-wrap:anywhere}
</style>
</head>
<body>
<main>
<header><h1>Which projection head, and which layer?</h1><p class="subject">$subject</p></header>
<section class="answer"><p class="lead">$lead</p>$more</section>
$failed
$numbers
<section><h2>How it was made</h2><div class="made">$made</div></section>
</main>
</body>
</html>
"""
