"""Every defence against every attack on handwritten digits: the tables of docs/robustness.md.

    python studies/defences.py [--seeds 3] [--breaking-seeds 3] [--rounds 30] [--out FOLDER] [--page FILE.md]

20 clients, mildly non-iid (dirichlet, alpha 1), a network with one hidden layer of 64. Runs that --out has are not made
again; with `--defences`, `--attacks` and `--fractions` the tables have only those.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

from pages import DOCS, Runs, fill, table

from core.config import RunConfig
from simulations.run import Run, preset

CLIENTS, SHARE = 20, 0.2
FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.45)
# A defence holds where it keeps this share of its accuracy without attackers.
HOLDS = 0.9
DEFENCES = (
    "fedavg", "fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan", "rfa", "rfa, buckets of 2",
    "centredclipping", "normclipping", "fltrust",
)  # fmt: skip
# Strengths without a number are those of the papers (core/adversary.py).
ATTACKS: dict[str, dict[str, Any]] = {
    "label-flip": {}, "sign-flip": {}, "sign-flip x3": {"attack.strength": 3.0}, "scaling": {}, "gaussian": {},
    "zero": {}, "alie": {}, "alie z=1.5": {"attack.strength": 1.5}, "ipm": {}, "min-max": {}, "backdoor": {},
    "non-finite": {}, "wrong-shape": {},
}  # fmt: skip
BREAKING = ("sign-flip x3", "ipm")
# Their answers never reach a rule: there is nothing to select.
REFUSED = ("non-finite", "wrong-shape")


def defence(name: str, malicious: int) -> dict[str, Any]:
    """Return the settings of a defence that is told how many clients are malicious, or the most that it can take."""
    most = {"krum": (CLIENTS - 3) // 2, "multikrum": (CLIENTS - 3) // 2, "bulyan": (CLIENTS - 3) // 4}
    settings: dict[str, Any] = {"strategy": name.partition(",")[0]}
    if name in most:
        settings["strategy-options.num-malicious-nodes"] = min(malicious, most[name])
    if name == "fedtrimmedavg":
        settings["strategy-options.beta"] = malicious / CLIENTS
    if "buckets" in name:
        settings["strategy-options.bucket-size"] = 2
    if name == "fltrust":
        settings["server-examples"] = 100
    return settings


class Study:
    """The runs that the tables are made of, by defence, attack and share of malicious clients."""

    def __init__(self, runs: Runs, rounds: int, seeds: int) -> None:
        self.runs, self.rounds, self.seeds = runs, rounds, seeds

    def config(self, name: str, attack: str, fraction: float, seed: int) -> RunConfig:
        """Return the configuration of one run; the attack "" is none."""
        attacked = {"attack.kind": attack.partition(" ")[0], "attack.fraction": fraction, **ATTACKS.get(attack, {})}
        return preset(
            "digits",
            {
                "model": "mlp", "clients": CLIENTS, "rounds": self.rounds, "seed": seed, "partition.alpha": 1.0,
                "evaluate-every": self.rounds, "baselines": False, "engine.workers": 0, "engine.cohort-size": CLIENTS,
                **defence(name, round(fraction * CLIENTS)), **(attacked if attack else {}),
            },
        )  # fmt: skip

    def of(self, name: str, attack: str, fraction: float = SHARE) -> list[Run]:
        """Return one run a seed."""
        return [self.runs(self.config(name, attack, fraction, seed)) for seed in range(self.seeds)]

    def accuracy(self, name: str, attack: str, fraction: float = SHARE) -> float:
        """Return the mean accuracy on the central test set, in percent."""
        return 100 * fmean(run.metrics["accuracy"] for run in self.of(name, attack, fraction))

    def attackers(self, name: str, attack: str, key: str, fraction: float = SHARE) -> float | None:
        """Return the mean of what summary.json says of attackers, in percent; None where a rule has no such thing."""
        found = [run.summary["attack"][key] for run in self.of(name, attack, fraction)]
        return None if None in found else 100 * fmean(found)

    def cell(self, name: str, attack: str, fraction: float = SHARE) -> str:
        """Return an accuracy as the tables show it: in bold where the defence does not hold."""
        found = self.accuracy(name, attack, fraction)
        return f"{found:.1f}" if self.holds(name, attack, fraction) else f"**{found:.1f}**"

    def holds(self, name: str, attack: str, fraction: float) -> bool:
        """Return whether the defence keeps enough of its accuracy."""
        return self.accuracy(name, attack, fraction) >= HOLDS * self.accuracy(name, "")


def accuracies(study: Study, names: list[str], attacks: list[str]) -> str:
    """Return the table of accuracies, how far seeds are apart, and what the trigger does without attackers."""
    backdoor = "backdoor" in attacks
    head = ["defence", "none", *attacks, *(["backdoor opens"] if backdoor else [])]
    rows = []
    for name in names:
        row = [name, *(study.cell(name, attack) for attack in ("", *attacks))]
        rows.append(row + ([_percent(study.attackers(name, "backdoor", "backdoor_success"))] if backdoor else []))
        print(*row, sep="\t", flush=True)
    spread = [
        100 * pstdev(run.metrics["accuracy"] for run in study.of(name, attack))
        for name in names
        for attack in ("", *attacks)
    ]
    text = (
        f"{table(head, rows)}\n\n{study.seeds} seeds, {study.rounds} rounds, {SHARE:.0%} malicious. Standard deviation "
    )
    text += f"over the seeds: {median(spread):.1f} in the median cell, {max(spread):.1f} in the worst."
    if backdoor:
        opens = study.attackers("fedavg", "backdoor", "backdoor_success", 0.0)
        text += f"\nWithout attackers FedAvg gives {_percent(opens)} % of the triggered images the backdoor's label."
    return text


def influence(study: Study, names: list[str], attacks: list[str]) -> str:
    """Return the table of how often attackers were selected and what they weighed."""
    attacks = [attack for attack in attacks if attack not in REFUSED]
    rows = []
    for name in names:
        row = [name]
        for attack in attacks:
            both = [study.attackers(name, attack, key) for key in ("selected", "weight")]
            row.append(" / ".join(map(_percent, both)))
        if any(cell != "- / -" for cell in row[1:]):
            rows.append(row)
    return table(["defence", *attacks], rows)


def breakdown(study: Study, names: list[str], attacks: list[str], fractions: list[float]) -> str:
    """Return, for each of the attacks, the table of accuracies by the share of malicious clients."""
    parts = []
    for attack in [attack for attack in BREAKING if attack in attacks]:
        rows = []
        for name in names:
            held = [study.holds(name, attack, fraction) for fraction in fractions]
            until = held.index(False) if False in held else len(held)
            last = f"{fractions[until - 1]:.0%}" if until else f"under {fractions[0]:.0%}"
            rows.append([name, *(study.cell(name, attack, fraction) for fraction in fractions), last])
            print(attack, *rows[-1], sep="\t", flush=True)
        parts.append(f"{attack}:\n\n{table(['defence', *(f'{f:.0%}' for f in fractions), 'holds to'], rows)}")
    parts.append(f"{study.seeds} {'seed' if study.seeds == 1 else 'seeds'}.")
    return "\n\n".join(parts)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def main() -> None:
    """Make what runs are missing and write the tables into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--defences", default="/".join(DEFENCES), help="names with / between them")
    parser.add_argument("--attacks", default="/".join(ATTACKS), help="names with / between them")
    parser.add_argument("--fractions", default="/".join(map(str, FRACTIONS)), help="shares with / between them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--breaking-seeds", type=int, default=3, help="seeds of the table by share of attackers")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/defences"))
    parser.add_argument("--page", type=Path, default=DOCS / "robustness.md")
    given = parser.parse_args()
    names, attacks = given.defences.split("/"), given.attacks.split("/")
    runs = Runs(given.out)
    study, breaking = (Study(runs, given.rounds, seeds) for seeds in (given.seeds, given.breaking_seeds))
    fill(given.page, "defences", accuracies(study, names, attacks))
    fill(given.page, "selected", influence(study, names, attacks))
    fill(given.page, "breakdown", breakdown(breaking, names, attacks, [float(f) for f in given.fractions.split("/")]))


if __name__ == "__main__":
    main()
