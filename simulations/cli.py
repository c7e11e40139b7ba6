"""The command line. `--help` answers at once: whatever is heavy is imported inside a command."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from core.errors import InputError, told

app = typer.Typer(
    help="Federated learning on one machine: a Flower server, many Ray-spawned clients, torch models, non-IID data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
Preset = Annotated[str, typer.Argument(metavar="PRESET|FILE.toml", help="A name in `fedra list`, or a file.")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, named as in presets.")]
Out = Annotated[str, typer.Option(metavar="DIR", help="Folder for run folders; runs by default.")]
INTERRUPTED = 130
console = Console(emoji=False)


@app.command()
def run(
    preset: Preset = "",
    settings: Settings = None,
    out: Out = "",
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Continue this run folder.")] = None,
) -> None:
    """Train a federation: fedra run medical rounds=10 strategy=fedprox"""
    with _loading():
        from server.recorder import RunFolder
        from simulations.progress import Progress
        from simulations.run import preset as load_preset
        from simulations.run import resume as resume_run
        from simulations.run import simulate

    if resume is not None:
        if preset or settings or out:
            raise InputError("--resume continues a run as it was configured; give it no preset, settings or --out.")
        config = RunFolder.resumable(resume).config
        start = partial(resume_run, resume)
    elif preset:
        config = load_preset(preset, _overrides(settings, out))
        start = partial(simulate, config)
    else:
        raise InputError("name a preset, a TOML file or --resume RUN; `fedra list` shows the presets.")
    with Progress(config, console) as progress:
        finished = start(on_start=progress.start, on_round=progress.round, on_baseline=progress.baseline)
    progress.summarise(finished)


@app.command(name="list")
def list_() -> None:
    """Show presets, tasks, strategies, other packages' plug-ins, partitions and every setting, a line each."""
    from core import adversary, compression
    from core.config import RunConfig, keys
    from core.processors import plugins as foreign_processors
    from server import selection
    from simulations.run import PRESETS, preset_names
    from strategies import plugins as foreign_strategies
    from strategies import sentences
    from tasks.catalogue import datasets, tasks
    from tasks.catalogue import plugins as foreign_tasks
    from tasks.partition import KINDS

    defaults = RunConfig().flat()
    sections: dict[str, Mapping[str, str]] = {
        "Presets": {name: _first_comment(PRESETS / f"{name}.toml") for name in preset_names()},
        "Tasks": tasks(),
        "Tasks of other packages (task=)": foreign_tasks(),
        "Data sets (dataset=)": datasets(),
        "Strategies (strategy=), each with its strategy-options.": sentences(),
        "Strategies of other packages (strategy=)": foreign_strategies(),
        "Update processors of other packages (processors=)": foreign_processors(),
        "Partitions (partition.kind=)": KINDS,
        "Client selection (sampling.kind=)": selection.KINDS,
        "Attacks (attack.kind=)": adversary.KINDS,
        "Compression of updates (compression.kind=)": compression.KINDS,
        "Settings (KEY=VALUE), with defaults": {key: f"{says} [{defaults[key]}]" for key, says in keys().items()},
    }
    for title, rows in sections.items():
        if not rows:
            continue
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, sentence in rows.items():
            table.add_row(f"[bold]{escape(name)}", escape(sentence))
        console.print(table, "")


@app.command()
def compare(preset: Preset, settings: Settings = None, out: Out = "") -> None:
    """Compare strategies or any settings over seeds: fedra compare medical strategy=fedavg,fedprox seeds=3"""
    with _loading():
        from simulations.compare import compare as run_all

    run_all(preset, _overrides(settings, out), console)


@app.command()
def tune(
    preset: Preset = "",
    settings: Settings = None,
    trials: Annotated[int | None, typer.Option(metavar="N", min=1, help="Trials in all; 20 by default.")] = None,
    metric: Annotated[str, typer.Option(metavar="NAME", help="Validation metric to tune for.")] = "",
    out: Out = "",
    resume: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Go on with this search.")] = None,
) -> None:
    """Search settings: fedra tune medical learning-rate=0.01..1 local-epochs=1..5 strategy=fedavg,fedprox"""
    with _loading():
        from simulations.tune import TRIALS, resume_tune
        from simulations.tune import tune as search

    if resume is not None:
        if preset or settings or metric or out:
            raise InputError("--resume goes on with a search as it was set up; beside it only --trials is taken.")
        resume_tune(resume, trials=trials, console=console)
    elif preset:
        search(preset, _overrides(settings, out), trials=trials or TRIALS, metric=metric, console=console)
    else:
        raise InputError("name a preset, a TOML file or --resume FOLDER; `fedra list` shows the presets.")


@app.command()
def report(run: Annotated[list[Path], typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Rebuild a run's report.html from its files."""
    from reports.page import write_report

    console.print(f"Report: {write_report(_one(run))}", highlight=False, soft_wrap=True)


@app.command()
def privacy(
    clients: Annotated[int, typer.Option(metavar="N", help="Clients of the federation.")],
    rounds: Annotated[int, typer.Option(metavar="T", help="Rounds of training.")],
    sampled: Annotated[float | None, typer.Option(metavar="M", help="Clients a round, or a share; else all.")] = None,
    delta: Annotated[float | None, typer.Option(metavar="D", help="Below 1 / clients; else 1e-5.")] = None,
    epsilon: Annotated[float | None, typer.Option(metavar="E", help="The budget; else 1, 2, 4 and 8.")] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(metavar="Z", help="The noise in clipping norms, instead of a budget.")
    ] = None,
    level: Annotated[str, typer.Option(metavar="LEVEL", help="Whom noise hides: client or example.")] = "client",
    noise: Annotated[
        str | None, typer.Option(metavar="WHERE", help="At level client: central, local or distributed.")
    ] = None,
    examples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="At level example: examples of a client.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="B", help="At level example, as in a run.")] = None,
    local_epochs: Annotated[int | None, typer.Option(metavar="E", help="At level example, as in a run.")] = None,
    local_steps: Annotated[int | None, typer.Option(metavar="K", help="At level example, as in a run.")] = None,
    parameters: Annotated[int, typer.Option(metavar="P", min=1, help="Numbers that the model has.")] = 10_000,
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for a page with plots, and the numbers.")] = "",
) -> None:
    """Plan privacy, running nothing: fedra privacy --clients 1000 --sampled 50 --rounds 200 --delta 1e-4"""
    from simulations.privacy_plan import privacy_plan

    given = {
        "clients": clients, "sampled": sampled, "rounds": rounds, "level": level, "noise": noise, "delta": delta,
        "epsilon": epsilon, "noise-multiplier": noise_multiplier, "examples": examples, "batch-size": batch_size,
        "local-epochs": local_epochs, "local-steps": local_steps, "parameters": parameters,
    }  # fmt: skip
    privacy_plan({name: value for name, value in given.items() if value is not None}, out=out, console=console)


@app.command()
def secure(
    clients: Annotated[list[int], typer.Option(metavar="N", help="Clients of a sum; several are compared.")],
    corrupt: Annotated[float | None, typer.Option(metavar="P", help="Share that spies for the server; 0.1.")] = None,
    dropout: Annotated[float | None, typer.Option(metavar="P", help="Share that may drop out; 0.1.")] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="PROFILE", help="malicious, semi-honest, or auto: by clients.")
    ] = None,
    parameters: Annotated[int, typer.Option(metavar="P", min=1, help="Numbers that the model has.")] = 10_000,
    bits: Annotated[int | None, typer.Option(metavar="M", help="Bits of the ring in which sums are taken; 32.")] = None,
    clip: Annotated[float | None, typer.Option(metavar="C", help="Largest L2 norm of an update; 100.")] = None,
) -> None:
    """Plan secure aggregation, running nothing: fedra secure --clients 10 --clients 100 --parameters 160000"""
    from simulations.secure_plan import secure_plan

    given = {"corrupt": corrupt, "dropout-tolerance": dropout, "profile": profile, "bits": bits, "clip": clip}
    secure_plan(clients, parameters, {key: v for key, v in given.items() if v is not None}, console=console)


@app.command()
def identities(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where keys and roster go.")],
    clients: Annotated[int, typer.Option(metavar="N", min=3, help="Clients of the federation.")],
) -> None:
    """Make clients' identity keys and the roster of them, for a deployment with secure aggregation."""
    from simulations.secure_plan import create_identities

    create_identities(folder, clients, console)


@app.command()
def audit(
    run: Annotated[list[Path], typer.Argument(metavar="RUN", help="A finished run's folder.")],
    canaries: Annotated[int | None, typer.Option(metavar="N", min=1, help="1000 by default, or what fits.")] = None,
    shadows: Annotated[int, typer.Option(metavar="K", min=0, help="Shadow models of membership inference.")] = 16,
    only: Annotated[str, typer.Option(metavar="PARTS", help="Of canaries,membership,inversion, with commas.")] = "",
) -> None:
    """Attack a finished run: does its noise hold what epsilon claims, who was in it, what does an update show?"""
    with _loading():
        from simulations.audit import audit as attack

    parts = [part.strip() for part in only.split(",") if part.strip()]
    attack(_one(run), canaries=canaries, shadows=shadows, only=parts, console=console)


@app.command()
def flower(
    app_dir: Annotated[Path, typer.Argument(metavar="APP_DIR", help="A Flower app: the folder of its pyproject.toml.")],
    nodes: Annotated[int, typer.Option(min=1, help="Clients; each gets its partition-id.")] = 10,
    run_config: Annotated[list[str] | None, typer.Option(metavar="'K=V ...'", help="As in `flwr run`.")] = None,
    workers: Annotated[str, typer.Option(help="Ray workers: auto is one a core, 0 runs in this process.")] = "auto",
    address: Annotated[str, typer.Option(help="An existing Ray cluster to join: auto or HOST:PORT.")] = "",
    seed: Annotated[int, typer.Option(help="Seeds global generators for each message; -1 leaves them alone.")] = 0,
) -> None:
    """Run somebody else's Flower app, unmodified: fedra flower APP_DIR --nodes 100"""
    from core.config import RunConfig
    from core.idle import refuse_idle
    from simulations.flower import run_app
    from simulations.flower_app import FlowerApp
    from simulations.run import worker_count

    found = FlowerApp.read(app_dir, run_config or [])
    engine = {"engine.workers": int(workers) if workers.isdigit() else workers, "engine.address": address}
    config = RunConfig.of({"clients": nodes, **engine})
    refuse_idle([config])
    count = worker_count(config)
    where = f"{count} Ray workers" if count else "this process"
    console.print(f"{found.folder.name}: {nodes} nodes in {where}", highlight=False)
    seconds = run_app(found, nodes, count, address, None if seed < 0 else seed)
    console.print(f"completed in {seconds:.1f} s", highlight=False)


def _loading() -> Status:
    """Return what shows on a terminal while torch and Flower are imported, which takes seconds on a busy machine."""
    return console.status("loading")


def _one(runs: list[Path]) -> Path:
    """Return the only run folder; a pattern such as runs/* may have become several."""
    if len(runs) > 1:
        raise InputError(f"give one run folder, you gave {len(runs)}; the last of them is {runs[-1]}.")
    return runs[0]


def _overrides(settings: list[str] | None, out: str) -> dict[str, Any]:
    from core.config import parse_override

    overrides = dict(parse_override(text) for text in settings or [])
    return {**overrides, "out": out} if out else overrides


def _first_comment(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def _interrupt(_signal: int, _frame: object) -> None:
    # Once: what follows is the run saving itself, which a second Ctrl-C must not spoil.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line; exit code 0 done, 2 wrong input (one sentence), 1 failed, 130 interrupted."""
    # As with `python -m`: a strategy named module:attr may lie in the folder one stands in.
    sys.path.insert(0, os.getcwd())
    errors = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # which is what typer makes of KeyboardInterrupt
            errors.print("Interrupted.")
        sys.exit(code)
    except InputError as error:
        if os.environ.get("FEDRA_TRACEBACK") and error.__cause__ is not None:
            # Of somebody's own code, which has to be found.
            raise
        errors.print(f"[red]Error:[/red] {escape(str(error))}")
        sys.exit(2)
    except click.exceptions.NoArgsIsHelpError:
        sys.exit(2)
    except click.NoSuchOption as error:
        hint = "settings are written KEY=VALUE without dashes, for example rounds=5"
        errors.print(f"[red]Error:[/red] No such option {escape(error.option_name)}; {hint}. Try 'fedra --help'.")
        sys.exit(2)
    except click.ClickException as error:
        errors.print(f"[red]Error:[/red] {escape(error.format_message())} Try 'fedra --help'.")
        sys.exit(2)
    except Exception as error:
        if os.environ.get("FEDRA_TRACEBACK"):
            raise
        errors.print(f"[red]Failed:[/red] {escape(told(error))}")
        errors.print("Set FEDRA_TRACEBACK=1 to see where.")
        sys.exit(1)
