"""The sections that say what was run: configuration, versions, and the command that repeats it."""

from __future__ import annotations

import shlex
from typing import Any

from core.config import RunConfig, keys
from reports import markup
from reports.load import RunData
from reports.markup import Section, cell, element, join, paragraph
from reports.words import plural


def configuration(run: RunData) -> Section:
    """Return every setting: those that differ from the default first and marked, the others folded away."""
    defaults, sentences = RunConfig().flat(), keys()
    changed, same = [], []
    for name, value in run.config.items():
        default = _text(defaults[name]) if name in defaults else "the strategy's"
        row = (cell(name, "text"), cell(_text(value), "text value"))
        sentence = sentences.get(name, "Option of the strategy.")
        if name in defaults and value == defaults[name]:
            same.append((*row, cell(sentence, "text wide")))
        else:
            changed.append((*row, cell(default, "text wide"), cell(sentence, "text wide")))
    parts: list[Any] = []
    if changed:
        headings = ["Changed setting", "Value", "Default", "Meaning"]
        parts.append(markup.table(headings, changed, text=4, classes=["changed"] * len(changed)))
    folded = element("summary", f"{plural(len(same), 'setting')} at the default")
    parts.append(element("details", folded, markup.table(["Setting", "Value", "Meaning"], same, text=3)))
    return Section("configuration", "Configuration", join(parts))


def versions(run: RunData) -> Section | None:
    """Return the versions of the packages that decide the numbers."""
    found = run.summary.get("versions") or {}
    pairs = (element("span", element("b", name), f" {version}") for name, version in found.items())
    return Section("versions", "Versions", element("div", *pairs, class_="pairs")) if found else None


def repeat(run: RunData) -> Section:
    """Return the commands that repeat the run and, when it did not end by itself, continue it."""
    folder = run.path.absolute()
    parts = [paragraph("config.toml in the run folder is complete:"), _command("fedra run", folder / "config.toml")]
    # All rounds without a new model would be none the next time either.
    in_vain = len(run.rounds) == run.config.get("rounds") and not any(r.get("aggregated", True) for r in run.rounds)
    if run.summary.get("status") != "completed" and not in_vain:
        parts += [paragraph("Continue from the last finished round:"), _command("fedra run --resume", folder)]
    return Section("repeat", "Repeat this run", join(parts))


def _command(verb: str, path: object) -> markup.Html:
    return element("pre", element("code", f"{verb} {shlex.quote(str(path))}"))


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value == "":
        return "(empty)"
    return f"{value:g}" if isinstance(value, float) else str(value)
