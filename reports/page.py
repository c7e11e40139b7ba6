"""A run's page: `write_report(folder)` builds report.html, which opens from disk and loads nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from reports import answers, audit, cost, markup, protection, provenance, sections, secure
from reports.load import RunData, load
from reports.markup import Html, Section, element
from reports.words import plural

SECTIONS: list[Callable[[RunData], Section | None]] = [
    sections.learning,
    sections.federation,
    sections.clients,
    sections.differences,
    secure.totals,
    protection.section,
    secure.section,
    answers.malicious,
    audit.section,
    cost.speed,
    answers.uncounted,
    answers.failures,
    provenance.configuration,
    provenance.versions,
    provenance.repeat,
]
STAMP = re.compile(r"(\d{8}T\d{6}Z)-")


def write_report(folder: Path) -> Path:
    """Write report.html into a run folder, finished or not, and return its path; `InputError` if it is none."""
    run = load(folder)
    found = [part for section in SECTIONS if (part := section(run)) is not None]
    page = markup.page(
        _title(run), _head(run), sections.headline(run), found, "Written by Fedra. This page loads nothing."
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _title(run: RunData) -> str:
    summary = run.summary
    return f"{summary.get('task', 'run')} with {summary.get('strategy', '?')}, seed {summary.get('seed', '?')}"


def _head(run: RunData) -> Html:
    """Return the title, the status and one line on what was run."""
    summary, config = run.summary, run.config
    status = str(summary.get("status", "unknown"))
    about = [
        summary.get("dataset") or "default data set",
        f"{plural(int(config.get('clients', 0)), 'client')}, {config.get('partition.kind', 'natural')} partition",
        f"preset {config.get('preset', 'custom')}",
        _began(run.path),
    ]
    known = status if status in ("completed", "interrupted", "failed") else "interrupted"
    pill = element("span", status, class_=f"pill {known}")
    head = element("div", element("h1", _title(run)), pill, class_="head")
    line = element("p", " · ".join(str(part) for part in about if part), class_="about")
    warnings = [element("p", f"Warning: {said}", class_="banner warning") for said in summary.get("warnings") or []]
    return markup.join([head, line, _banner(run, known), *warnings])


def _banner(run: RunData, status: str) -> Html:
    """Return what a reader must know before the numbers: why the run ended when it did not reach its last round."""
    summary = run.summary
    done, planned = summary.get("rounds") or 0, run.config.get("rounds", "?")
    reached = f"after {done} of {planned} rounds"
    sentences = {
        "failed": f"Failed {reached}: {summary.get('error') or 'the error was not recorded'}",
        "interrupted": f"Interrupted {reached}. What follows describes the finished rounds.",
        "completed": f"Stopped early, {reached}: {summary.get('stopped_by')}." if summary.get("stopped_by") else "",
    }
    return element("p", sentences[status], class_=f"banner {status}") if sentences[status] else Html()


def _began(path: Path) -> str:
    stamp = STAMP.match(path.absolute().name)
    if not stamp:
        return ""
    return f"{datetime.strptime(stamp[1], '%Y%m%dT%H%M%SZ').replace(tzinfo=UTC):%d %B %Y, %H:%M} UTC"
