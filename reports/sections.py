"""The sections that show results: headline, learning curves, baselines, clients, heterogeneity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reports import heterogeneity, look, markup, plots
from reports.heterogeneity import Counts
from reports.load import RunData, nested
from reports.markup import NO_HTML, Cell, Html, Section, cell, element, figure, join, key, paragraph, tile
from reports.protection import extrapolated
from reports.words import NOTHING, SCORES, duration, finite, metric, number, ordered, percent, plural, rate, size

if TYPE_CHECKING:
    import numpy as np

HEADLINES = 4
LABEL_COLUMNS = 8
TABLE_ROWS = 1000
# Below this a gap between pooled and alone is noise, and a share of it says nothing.
GAP = 0.002
# An empty key: the figure beside one that has a key starts at the same height.
LEVEL = key([("faint", "transparent", " ")])


def headline(run: RunData) -> Html:
    """Return the row of figures that a reader wants first."""
    summary = run.summary
    central = summary.get("metrics") or {}
    names = [name for name in ordered(central) if name in SCORES][:HEADLINES] or ordered(central)[:HEADLINES]
    tiles = [tile(metric(name).title, number(central[name]), *_of_clients(run, name)) for name in names]
    if not tiles:
        tiles = [tile("Metrics", NOTHING, "no round was evaluated")]
    traffic = summary.get("traffic") or {}
    up, down = (finite(traffic.get(f"{way}_bytes")) for way in ("uplink", "downlink"))
    total = None if up is None or down is None else up + down
    cost = [
        tile("Clients per second", rate(summary.get("clients_per_second")), "trained, all rounds"),
        tile("Time", duration(summary.get("seconds")), plural(int(summary.get("rounds") or 0), "round")),
        tile("Traffic", size(total), f"{size(down)} to clients, {size(up)} back"),
        _privacy(summary),
    ]
    if (virtual := finite(summary.get("virtual_seconds"))) is not None:
        cost.insert(2, tile("Virtual time", duration(virtual), "on the clients' devices"))
    return join([element("div", *tiles, class_="tiles main"), element("div", *cost, class_="tiles")])


def learning(run: RunData) -> Section:
    """Return the learning curves, a panel per metric."""
    curves = plots.learning_curves(run)
    if not curves:
        return Section(
            "learning", "Learning curves", paragraph("No round was finished, so there is no curve.", quiet=True)
        )
    words = plots.CURVES[run.personal]
    legend = key(
        [
            ("line", look.FEDERATED, words.central),
            ("line", look.CLIENTS, f"{words.mean}, on their own test splits"),
            ("dot", look.CLIENTS, words.worst),
            ("dash", look.GREY, "training loss"),
        ]
    )
    panels = [figure(panel, metric(name).title) for name, panel in curves.items()]
    name = next(iter(curves))
    if (timed := plots.virtual_curve(run, name)) is not None:
        panels.insert(1, figure(timed, f"{metric(name).title} over virtual time"))
    said = [_which_model(run), _whose(run, quiet=True)]
    return Section("learning", "Learning curves", join([*said, legend, element("div", *panels, class_="grid")]))


def federation(run: RunData) -> Section | None:
    """Return what federation bought: against clients alone and against pooled data; None without baselines."""
    found = run.summary.get("baselines") or {}
    federated = run.summary.get("metrics") or {}
    pooled, alone = found.get("central") or {}, found.get("local") or {}
    if not found or not federated:
        return None
    rows = [
        (
            metric(n).title,
            number(alone.get(n)),
            number(federated[n]),
            number(pooled.get(n)),
            _gap_closed(n, alone, federated, pooled),
        )
        for n in ordered(federated)
    ]
    headings = ["On the central test set", "Clients alone, mean", "Federated", "Pooled data", "Gap closed"]
    own, clients = alone.get("own_test") or {}, run.summary.get("clients_metrics") or {}
    parts = [
        _verdict(alone, federated, pooled),
        _at_home(run, own, clients),
        _whose(run, quiet=True),
        markup.table(headings, rows, even=True),
    ]
    if own:
        both = [(name, own.get(name) or {}, clients[name]) for name in ordered(clients)]
        cells = [
            (metric(n).title, *(number(side.get(part)) for part in ("mean", "worst") for side in (a, f)))
            for n, a, f in both
        ]
        trained = "Own model" if run.personal else "Federated"
        headings = ["On clients' own test splits", "Alone, mean", f"{trained}, mean", "Alone, worst"]
        headings.append(f"{trained}, worst")
        parts.append(markup.table(headings, cells, even=True))
    chart = plots.baselines(run)
    if chart is not None:
        marks = [
            ("faint", look.ALONE, "a client alone"),
            ("diamond", look.ALONE, "clients alone, mean"),
            ("circle", look.FEDERATED, "federated"),
            ("square", look.POOLED, "pooled data"),
        ]
        parts.append(figure(chart, "Federated against each client alone and all data in one place", key(marks)))
    note = (
        "Alone: each client trains the same model on its own rows only. Pooled: one model on all rows. "
        "Both train as many epochs as a federated client unless baseline.* says otherwise. "
        "Gap closed: the share of the way from alone to pooled."
    )
    return Section("federation", "What federation bought", join([*parts, paragraph(note, quiet=True)]))


def clients(run: RunData) -> Section | None:
    """Return how the global model serves the clients: mean, worst and spread of each metric."""
    spread = run.summary.get("clients_metrics") or {}
    if not spread and run.clients is None:
        return None
    central = run.summary.get("metrics") or {}
    rows = [
        (metric(n).title, *(number(spread[n].get(part)) for part in ("mean", "worst", "std")), number(central.get(n)))
        for n in ordered(spread)
    ]
    words = plots.CURVES[run.personal]
    named = [words.mean.capitalize(), words.worst.capitalize(), "Standard deviation", words.central.capitalize()]
    headings = ["Metric", *named]
    whose = "Each client's own model" if run.personal else "The global model"
    note = f"{whose} on each client's own test split. Clients whose split cannot define a metric do not count."
    panels = []
    if (chart := plots.client_spread(run)) is not None:
        marks = [
            ("circle", look.CLIENTS, f"{words.mean} ± standard deviation"),
            ("tick", look.CLIENTS, words.worst),
            ("diamond", look.FEDERATED, words.central),
        ]
        panels.append(figure(chart, "Scores over clients", key(marks)))
    if (scored := plots.client_scores(run)) is not None:
        name, chart = scored
        of = "of each client's own model" if run.personal else "of each client"
        panels.append(figure(chart, f"{metric(name).title} {of} on its own test split", LEVEL))
    table = [markup.table(headings, rows, even=True), paragraph(note, quiet=True)] if rows else []
    return Section("clients", "Clients", join([_whose(run), *table, element("div", *panels, class_="halves")]))


def differences(run: RunData) -> Section | None:
    """Return the heterogeneity of the clients: numbers, pictures and a table; None when they were not described."""
    counts = Counts.of(run)
    if counts is None:
        return None
    pictures = [
        figure(heterogeneity.examples(counts), "Training examples"),
        figure(heterogeneity.label_shares(counts), "Label shares"),
    ]
    colors = zip(look.PALETTE, counts.labels, strict=False) if counts.has_colors else ()
    legend = key(("square", color, label) for color, label in colors)
    registered = run.summary.get("clients") or 0
    drawn = f"Of {registered:,} clients these were drawn. " if registered > len(counts.names) else ""
    body = [
        paragraph(drawn + counts.sentence),
        legend,
        element("div", *pictures, class_="halves"),
        _label_table(counts),
    ]
    return Section("heterogeneity", "Heterogeneity", join(body))


def _of_clients(run: RunData, name: str) -> list[str]:
    """Return a headline figure's small print: where it was measured, and how the clients fare."""
    summary = run.summary
    mean, worst = (nested(summary, "clients_metrics", name, part) for part in ("mean", "worst"))
    if finite(mean) is None:
        return ["central test set"]
    counted, evaluated = nested(summary, "clients_metrics", name, "clients"), summary.get("clients")
    # A metric that needs both classes leaves out clients whose few test rows have one.
    few = f", over {counted} of {evaluated}" if counted and evaluated and counted < evaluated else ""
    said = f"mean {number(mean)}, worst {number(worst)}{few}"
    # A headline that mixes two models says which is which.
    return ["global model", f"clients' own models: {said}"] if run.personal else [f"clients: {said}"]


def _privacy(summary: Mapping[str, Any]) -> Html:
    """Return the privacy tile. Without protection it says so: silence would read as protection."""
    privacy, masked = summary.get("privacy") or {}, summary.get("secure_aggregation")
    level = privacy.get("level", "none")
    masks = f"updates masked by {masked.get('protocol', 'secure aggregation')}" if masked else ""
    if level == "none":
        return tile("Privacy", "none", masks + ", no noise" if masks else "updates leave clients in clear")
    delta = finite(privacy.get("delta"))
    bound = f"{level} level, δ = {NOTHING if delta is None else format(delta, 'g')}"
    if privacy.get("accountant"):
        bound += f" ({privacy['accountant']})"
    return tile("Privacy", f"ε = {rate(privacy.get('epsilon'))}", *filter(None, (bound, extrapolated(privacy), masks)))


def _which_model(run: RunData) -> Html:
    best, kept = run.summary.get("best"), run.summary.get("kept")
    said = "The numbers above are of the last round."
    if kept == "best" and best:
        on = "of the clients' own models on" if run.personal else "on"
        said = (
            f"The numbers above are of round {best['round']} (dotted line), "
            f"the best by {metric(best['metric']).title} {on} the validation splits."
        )
    threshold = finite(run.summary.get("threshold"))
    if threshold is not None and threshold != 0.5:
        said += f" A prediction counts as positive from {number(threshold)}, chosen on the clients' validation splits."
    return paragraph(said, quiet=True)


def _verdict(alone: Mapping[str, Any], federated: Mapping[str, Any], pooled: Mapping[str, Any]) -> Html:
    """Return the section in one sentence, by the most telling metric."""
    name = ordered(federated)[0]
    parts = [f"Federated training reaches {metric(name).title} ", element("strong", number(federated[name]))]
    if finite(alone.get(name)) is not None:
        parts.append(f"; a client alone reaches {number(alone[name])} on average")
    if finite(pooled.get(name)) is not None:
        parts.append(f"; one model on all data in one place {number(pooled[name])}")
    return paragraph(*parts, ".")


def _whose(run: RunData, quiet: bool = False) -> Html:
    """Return which model stands behind which number, where clients have models of their own."""
    if not run.personal:
        return NO_HTML
    return paragraph(
        "Numbers of clients are of each client's own model; those on the central test set are of the global model.",
        quiet=quiet,
    )


def _at_home(run: RunData, own: Mapping[str, Any], clients: Mapping[str, Any]) -> Html:
    """Return how the clients fare on their own rows, where a model of their own is hardest to beat."""
    how = "by each client's own model, trained in the federation" if run.personal else "federated"
    for name in ordered(clients):
        alone, federated = ((side.get(name) or {}).get("mean") for side in (own, clients))
        if finite(alone) is not None and finite(federated) is not None:
            return paragraph(
                f"On the clients' own test splits: {metric(name).title} {number(federated)} {how}, "
                f"{number(alone)} alone, on average."
            )
    return join([])


def _gap_closed(name: str, alone: Mapping[str, Any], federated: Mapping[str, Any], pooled: Mapping[str, Any]) -> str:
    """Return the share of the way from alone to pooled that federation went, a dash where pooling gains nothing."""
    values = [finite(side.get(name)) for side in (alone, federated, pooled)]
    a, f, p = values
    if a is None or f is None or p is None:
        return NOTHING
    sign = 1 if metric(name).higher_is_better else -1
    return percent((f - a) / (p - a)) if sign * (p - a) > GAP else NOTHING


def _label_table(counts: Counts) -> Html:
    few = len(counts.labels) <= LABEL_COLUMNS
    splits = [split for split in ("train", "validation", "test") if split in counts.sizes]
    rows = []
    shown = list(zip(counts.names, counts.shares, strict=True))[:TABLE_ROWS]
    for i, (name, shares) in enumerate(shown):
        sizes = [f"{counts.sizes[split][i]:,}" for split in splits]
        rows.append([name, *sizes, *map(_share, shares)] if few else [name, _commonest(counts.labels, shares), *sizes])
    titles = [split.capitalize() for split in splits]
    headings = ["Client", *titles, *counts.labels] if few else ["Client", "Commonest labels", *titles]
    first = f" The first {TABLE_ROWS:,} of {len(counts.names):,} clients." if len(counts.names) > TABLE_ROWS else ""
    note = paragraph(f"Examples of each split, and the label shares of the training split.{first}", quiet=True)
    return join([note, markup.table(headings, rows, text=1 if few else 2)])


def _share(share: float) -> Cell:
    # Half ink at most, so that the number stays legible.
    return cell(percent(share), "share", f"--share: {50 * share:.0f}%")


def _commonest(labels: Sequence[str], shares: np.ndarray, many: int = 3) -> Cell:
    top = [int(k) for k in (-shares).argsort(kind="stable")[:many] if shares[k] > 0]
    return cell(", ".join(f"{labels[k]} {percent(shares[k])}" for k in top) or NOTHING, "text wide")
