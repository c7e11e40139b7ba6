"""The page of a search: the best trial, how values developed, what each setting did, every trial."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from reports import markup
from reports import tune_plots as plots
from reports.markup import Html, Section, cell, element, figure, join, key, paragraph, tile
from reports.words import duration, metric, number, ordered, plural, setting

if TYPE_CHECKING:
    import optuna

DIGITS = 4
HEADLINES = 2
Results = Mapping[str, Any]
_FOOT = "Written by Fedra. This page loads nothing."
_MARKS = [("circle", plots.COMPLETED, "completed"), ("circle", plots.PRUNED, "pruned: its last value")]


def write_tune_page(path: Path, results: Results, study: optuna.Study) -> Path:
    """Write the page of a search, complete or not, and return its path; `results` is what tune.json holds."""
    parts = [_best(results, path.parent), _history(results), _settings(results, study), _combinations(results, study)]
    found = [part for part in (*parts, _trials(results), _failures(results), _repeat(results, path.parent)) if part]
    page = markup.page(_title(results), _head(results), _headline(results), found, _FOOT)
    path.write_text(page, encoding="utf-8")
    return path


def _title(results: Results) -> str:
    return f"{results['preset']}, tuned for validation {_name(results)}"


def _head(results: Results) -> Html:
    status = results["status"]
    pill = element("span", status, class_=f"pill {status}")
    head = element("div", element("h1", _title(results)), pill, class_="head")
    about = [
        f"task {results['task']}",
        f"{plural(len(results['space']), 'setting')} searched",
        f"seed {results['seed']}",
    ]
    line = element("p", " · ".join(about), class_="about")
    banner = Html()
    if status != "completed":
        said = (
            f"Interrupted after {len(results['trials'])} of {results['planned']} trials; the test set is not looked at."
        )
        banner = element("p", said, class_=f"banner {status}")
    spent = element("p", results["privacy"], class_="banner interrupted") if results.get("privacy") else Html()
    return join([head, line, banner, spent])


def _headline(results: Results) -> Html:
    best, states = results["best"], Counter(record["state"] for record in results["trials"])
    tiles = []
    if best:
        tiles.append(
            tile(f"Validation {_name(results)}", number(best["value"], DIGITS), f"best: trial {best['trial']}")
        )
        tested = best.get("test_metrics") or {}
        for name in list(dict.fromkeys([results["metric"], *ordered(tested)]))[: HEADLINES if tested else 0]:
            tiles.append(
                tile(f"Test {metric(name).title}", number(tested[name], DIGITS), f"of trial {best['trial']} only")
            )
    counts = ", ".join(f"{amount} {state}" for state, amount in states.items())
    tiles += [tile("Trials", str(len(results["trials"])), counts), tile("Time", duration(results["seconds"]))]
    return element("div", *tiles, class_="tiles")


def _best(results: Results, folder: Path) -> Section:
    best = results["best"]
    if not best:
        return Section("best", "Best trial", paragraph("No trial was completed.", quiet=True))
    rows = [
        (name, *(cell(setting(value), "text") for value in (best["params"].get(name), about["preset"], about["says"])))
        for name, about in results["space"].items()
    ]
    words = (
        f"Trial {best['trial']} has the best validation {_name(results)}, on the clients' validation splits. "
        "The test set chose nothing; it is looked at for this trial alone, once the search is complete. best.toml is "
        "its complete configuration:"
    )
    command = element("pre", element("code", f"fedra run {shlex.quote(str(folder / 'best.toml'))}"))
    link = paragraph(element("a", "Report of its run", href=quote(f"{best['run']}/report.html")))
    # Like the test metrics, it is there once the search is complete.
    link = link if "test_metrics" in best else Html()
    table = markup.table(["Setting", "Best", "Preset", "Searched"], rows, text=4)
    return Section("best", "Best trial", join([table, paragraph(words), command, link]))


def _history(results: Results) -> Section | None:
    chart = plots.history(results)
    if chart is None:
        return None
    legend = key([*_MARKS, ("line", plots.BEST, "best so far")])
    return Section("history", "History", figure(chart, f"Validation {_name(results)} by trial", legend))


def _settings(results: Results, study: optuna.Study) -> Section | None:
    """Return the value against each searched setting, and which settings mattered."""
    panels = [figure(chart, name) for name, chart in plots.against(results).items()]
    if not panels:
        return None
    content = [key(_MARKS), element("div", *panels, class_="grid")]
    if (importances := plots.importances(results, study)) is not None:
        content.append(figure(importances, "Share of each setting in the value's variation (PED-ANOVA)"))
    return Section("settings", "Settings", join(content))


def _combinations(results: Results, study: optuna.Study) -> Section | None:
    chart = plots.combinations(results, study)
    if chart is None:
        return None
    words = "A line is a completed trial; the better it is, the stronger. None: its strategy lacks the option."
    shown = figure(chart, "Value and settings of completed trials")
    return Section("combinations", "Combinations", join([paragraph(words, quiet=True), shown]))


def _trials(results: Results) -> Section:
    sign = -1 if results["higher_is_better"] else 1

    def place(record: Mapping[str, Any]) -> tuple[bool, float]:
        return record["state"] != "completed", sign * (record["value"] or 0.0)

    rows = [
        (
            record["trial"],
            cell(record["state"] + (f" (as {record['same_as']})" if "same_as" in record else ""), "text"),
            number(record["value"], DIGITS),
            *(setting(record["params"].get(name)) for name in results["space"]),
            record["rounds"],
            duration(record["seconds"]),
        )
        for record in sorted(results["trials"], key=place)
    ]
    headings = ["Trial", "State", f"Validation {_name(results)}", *results["space"], "Rounds", "Time"]
    return Section("trials", "Trials", markup.table(headings, rows, text=2))


def _failures(results: Results) -> Section | None:
    failed = [record for record in results["trials"] if record["state"] == "failed"]
    rows = [(record["trial"], cell(record["error"], "text wide")) for record in failed]
    return Section("failures", "Failed trials", markup.table(["Trial", "Reason"], rows, text=2)) if rows else None


def _repeat(results: Results, folder: Path) -> Section:
    fixed = " ".join(f"{name}={setting(value)}" for name, value in results["fixed"].items())
    words = (
        "Each trial is a run in runs/, drawn by a tree-structured Parzen estimator from those before it; one that is "
        "behind the median at a round is stopped there. Go on with more trials:"
    )
    more = len(results["trials"]) + 10 if results["status"] == "completed" else results["planned"]
    command = f"fedra tune --resume {shlex.quote(str(folder))} --trials {more}"
    pairs = (element("span", element("b", name), f" {version}") for name, version in results["versions"].items())
    parts = [paragraph(words), element("pre", element("code", command)), element("div", *pairs, class_="pairs")]
    return Section("search", "The search", join([paragraph(f"Fixed: {fixed}.") if fixed else Html(), *parts]))


def _name(results: Results) -> str:
    return metric(results["metric"]).title
