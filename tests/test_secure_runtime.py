"""Secure aggregation among processes: Flower's runtime, and a SuperLink with a SuperNode and a key for each client."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployed_apps import LIES
from deployment import Deployment
from safetensors.numpy import load_file
from test_flower_runtime import BIN, flower_home, flwr_run  # noqa: F401
from test_secagg_vectors import CASES, _case

from core import records
from privacy.secagg.graph import malicious_threshold
from privacy.secagg.keys import Identity
from simulations.run import preset, simulate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
MALICIOUS = {"secure-aggregation.profile": "malicious", "secure-aggregation.stage-seconds": 30.0}
CLIENTS = 5


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Provide a SuperLink and five SuperNodes with keys of their own."""
    with Deployment(tmp_path_factory.mktemp("deployment"), CLIENTS) as found:
        yield found
    assert not found._left()


def _rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").open()]


def _summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def _assert_equal_runs(ours: Path, theirs: Path, tolerance: float) -> None:
    """Assert that metrics are equal to four digits, and the models up to a tolerance."""
    for own, other in zip(_rounds(ours), _rounds(theirs), strict=True):
        assert f"{own['train_loss']:.4f}" == f"{other['train_loss']:.4f}"
        for key in ("central", "validation"):
            for name, value in own.get(key, {}).items():
                assert f"{value:.4f}" == f"{other[key][name]:.4f}"
        for key in ("sums", "dropped", "recovered", "failed"):
            assert own["secure_aggregation"][key] == other["secure_aggregation"][key]
    own, other = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert own.keys() == other.keys()
    for name, value in own.items():
        np.testing.assert_allclose(value, other[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "faults", [{}, {"faults.dropout": 0.2, "faults.stage": "any", "seed": 4}], ids=["all", "dropouts"]
)
def test_flwr_run_sums_as_the_local_engine_does(
    faults: dict[str, Any],
    flower_home: dict[str, str],  # noqa: F811
    tmp_path: Path,
) -> None:
    theirs, ours = flwr_run({**MALICIOUS, **faults, "rounds": 3}, flower_home, tmp_path)
    summary = _summary(theirs)
    assert {name: summary["secure_aggregation"][name] for name in ("sums", "failed")} == {"sums": 3, "failed": 0}
    # They drop out at advertise, mask, confirm and unmask.
    assert summary["secure_aggregation"]["dropped"] == (8 if faults else 0)
    bound = sum(row["secure_aggregation"]["worst_error"] for row in _rounds(ours))
    assert 0 < bound < 1e-4
    _assert_equal_runs(ours, theirs, bound)


def test_supernodes_with_keys_sum_as_the_local_engine_does(deployment: Deployment, tmp_path: Path) -> None:
    settings = {**MALICIOUS, "rounds": 2}
    theirs = deployment.run(settings, "plain")
    own = {**settings, "clients": CLIENTS, "evaluate-every": 100, "out": str(tmp_path)}
    ours = simulate(preset("smoke", own)).path
    summary = _summary(theirs)
    assert (summary["status"], summary["secure_aggregation"]["identities"]) == ("completed", "roster")
    assert [row["secure_aggregation"]["sums"] for row in _rounds(theirs)] == [[CLIENTS]] * 2
    # The roundings belong to the seed: what is left is a float's own.
    _assert_equal_runs(ours, theirs, 1e-6)


# What the server receives.


def _kept(folder: Path) -> list[dict[str, Any]]:
    [own] = folder.iterdir()
    return [pickle.loads(file.read_bytes()) for file in sorted(own.iterdir())]


def _windows(values: np.ndarray, layouts: str = "CF", size: int = 8) -> set[bytes]:
    """Return the bytes of all `size` consecutive numbers in these layouts, those of few numbers over and over apart."""
    found = set()
    for flat in (values.ravel(order=layout) for layout in layouts):  # type: ignore[arg-type]
        for i in range(len(flat) - size + 1):
            if len(set(flat[i : i + size].tolist())) > size // 2:
                found.add(flat[i : i + size].tobytes())
    return found


def _found(secrets: set[bytes], received: list[dict[str, Any]]) -> set[bytes]:
    """Return which of the secrets stand anywhere in what was received."""
    by_length: dict[int, set[bytes]] = {}
    for secret in secrets:
        by_length.setdefault(len(secret), set()).add(secret)
    found = set()
    for message in received:
        for part in message["bytes"]:
            for length, own in by_length.items():
                found |= own & {part[i : i + length] for i in range(len(part) - length + 1)}
    return found


def _numbers(received: list[dict[str, Any]]) -> set[float]:
    """Return every number that stands in a record of a message, in whatever record and list."""
    found = set()
    for message in received:
        for record in message["values"].values():
            for value in record.values():
                found |= {
                    float(v) for v in (value if isinstance(value, list) else [value]) if isinstance(v, int | float)
                }
    return found


def _of_training(received: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message for message in received if message["type"] in ("train", *records.SECURE_STAGES)]


def test_nothing_that_the_server_receives_is_of_one_client(deployment: Deployment, tmp_path: Path) -> None:
    settings = {**MALICIOUS, "rounds": 2}
    assert _summary(deployment.run(settings, "watched"))["status"] == "completed"
    received, truth = _kept(deployment.folder / "received"), _kept(deployment.folder / "truth")
    trained = [own for own in truth if "update" in own]
    assert len(trained) == 2 * CLIENTS
    training = _of_training(received)
    # Statistics, then two rounds: of five messages each, the first of them without training.
    assert [sum(m["type"] == kind for m in received) for kind in ("train", records.QUERY_STATISTICS)] == [10, 10]
    assert len(training) == CLIENTS * (4 + 5 + 5)

    plain: set[bytes] = set()
    for own in trained:
        for arrays in (own["model"], own["update"]):
            flat = np.concatenate([value.ravel() for value in arrays.values()])
            for value in [*arrays.values(), flat]:
                plain |= _windows(value) | _windows(value.astype(np.float64)) | _windows(value.astype(np.float16))
        for loss in (np.float64(own["loss"]), np.float32(own["loss"])):
            plain |= {loss.tobytes(), loss.tobytes()[::-1], repr(float(loss)).encode()}
    vectors = [own["vector"] for own in truth if "vector" in own]
    assert len(vectors) == 3 * CLIENTS
    for vector in vectors:
        plain |= _windows(vector) | _windows(vector.astype(np.int64))
    secrets = {value for own in truth for value in own.get("keys", {}).values() if value}
    # Of each client two keys, a seed and a share of its own; of each pair a key and a mask.
    assert len(secrets) == 3 * (4 * CLIENTS + 2 * 10)
    assert not _found(plain | secrets, received)
    # No number of one client: only who it is.
    assert {tuple(message["values"]) for message in training} == {(records.SECURE,)}
    assert {key for message in training for key in message["values"][records.SECURE]} == {records.CLIENT, records.PART}
    assert not any(message["arrays"] for message in received)
    assert _numbers(training) == set(range(CLIENTS))

    # The search finds all that without secure aggregation.
    with Deployment(tmp_path / "open", CLIENTS, roster=False) as clear:
        assert _summary(clear.run({"rounds": 1}, "watched"))["status"] == "completed"
        received, truth = _kept(clear.folder / "received"), _kept(clear.folder / "truth")
    trained = [own for own in truth if "update" in own]
    assert len(trained) == CLIENTS
    numbers = _numbers(_of_training(received))
    for own in trained:
        wanted = set().union(*(_windows(value, "C") for value in own["model"].values()))
        assert wanted
        assert _found(wanted, received) == wanted
        assert {own["examples"], own["loss"]} <= numbers
        assert _found({np.float64(own["loss"]).tobytes(), repr(own["loss"]).encode()}, received)


# Processes that die.


def _orders(deployment: Deployment, orders: dict[int, list[Any]]) -> None:
    (deployment.folder / "orders.json").write_text(json.dumps(orders))


DEATHS = {"secure-aggregation.stage-seconds": 15.0, "timeout-seconds": 90.0}


def test_rounds_go_on_without_processes_that_were_killed_at_mask_and_unmask(tmp_path: Path) -> None:
    with Deployment(tmp_path, CLIENTS) as deployment:
        _orders(deployment, {0: ["train", 1, 0], 1: [records.QUERY_UNMASK, 2, 0]})
        folder = deployment.run({**MALICIOUS, **DEATHS, "rounds": 3}, "mortal", seconds=250)
    rows = [row["secure_aggregation"] for row in _rounds(folder)]
    # Who dies at unmask is in the sum; who died before is asked, and missed, in every later round.
    assert [row["sums"] for row in rows] == [[4], [4], [3]]
    assert [row["dropped"] for row in rows] == [{"mask": 1}, {"advertise": 1, "unmask": 1}, {"advertise": 2}]
    summary = _summary(folder)
    assert summary["status"] == "completed"
    found = {name: summary["secure_aggregation"][name] for name in ("sums", "failed", "dropped", "recovered")}
    assert found == {"sums": 3, "failed": 0, "dropped": 5, "recovered": 2}


def test_too_few_processes_left_are_a_typed_error_and_the_run_goes_on(tmp_path: Path) -> None:
    with Deployment(tmp_path, CLIENTS) as deployment:
        _orders(deployment, {
            0: [records.QUERY_ADVERTISE, 1, 0], 1: [records.QUERY_CONFIRM, 1, 0], 2: [records.QUERY_SHARE, 2, 0],
        })  # fmt: skip
        folder = deployment.run({**MALICIOUS, **DEATHS, "rounds": 3}, "mortal", seconds=250)
    rows = [row["secure_aggregation"] for row in _rounds(folder)]
    # Four have advertised, and three of four shares are enough; then three of three, of whom one dies.
    assert [malicious_threshold(n) for n in (5, 4, 3)] == [4, 3, 3]
    assert [row["sums"] for row in rows] == [[4], [], []]
    assert rows[0]["dropped"] == {"advertise": 1, "confirm": 1}
    assert [[reason.partition(":")[0] for reason in row["failed"]] for row in rows[1:]] == [["TooFewError"]] * 2
    assert [row["aggregated"] for row in _rounds(folder)] == [True, False, False]
    summary = _summary(folder)
    assert summary["status"] == "completed"
    found = {name: summary["secure_aggregation"][name] for name in ("sums", "failed", "recovered")}
    assert found == {"sums": 1, "failed": 2, "recovered": 1}


def test_an_answer_that_is_late_does_not_count_and_its_client_takes_part_again(deployment: Deployment) -> None:
    _orders(deployment, {3: [records.QUERY_SHARE, 1, 12]})
    folder = deployment.run({**MALICIOUS, "rounds": 2, "secure-aggregation.stage-seconds": 10.0}, "mortal")
    rows = [row["secure_aggregation"] for row in _rounds(folder)]
    assert [(row["sums"], row["dropped"]) for row in rows] == [([4], {"share": 1}), ([5], {})]


# A server that lies.

ABORTS = {
    "a key swapped": "ForgedError",
    "a roster of its own": "ForgedError",
    "weaker terms": "RefusedError",
    "another model": "InconsistentError",
    "another config": "InconsistentError",
    "the true survivors after others": "InconsistentError",
    "both kinds of shares": "InconsistentError",
    "asked twice": "OutOfTurnError",
    "asked again for the other kind": "OutOfTurnError",
    "training in clear": "RefusedError",
    "its loss": "RefusedError",
    "replayed query.advertise": "OutOfTurnError",
    "replayed query.share": "OutOfTurnError",
    "replayed train": "OutOfTurnError",
    "replayed query.confirm": "OutOfTurnError",
    "replayed query.unmask": "OutOfTurnError",
}


def test_a_server_that_lies_gets_typed_errors_from_honest_clients(deployment: Deployment) -> None:
    folder = deployment.run({**MALICIOUS, "rounds": 6}, "lying")
    deployment.until((deployment.folder / "lies.done").exists, "its last answers")
    answers = [json.loads(line) for line in (deployment.folder / "lies.jsonl").open()]
    # Whoever is told of other survivors signs that, which no other client counts; it opens its shares to nobody.
    assert dict(answers).pop("other survivors") == "an answer"
    assert {name for name, _ in LIES.values()} - ABORTS.keys() == {"other survivors"}
    kinds = {name: reason.split(": ")[1] for name, reason in answers if name != "other survivors"}
    assert kinds == ABORTS
    # The others' rounds are none the worse: each had a sum, without the one that was lied to.
    rows = [row["secure_aggregation"] for row in _rounds(folder)]
    assert [row["sums"] for row in rows] == [[4], [4], [3], [4], [5], [5]]
    assert _summary(folder)["status"] == "completed"


def test_clients_with_an_identity_refuse_a_run_without_secure_aggregation(deployment: Deployment) -> None:
    summary = _summary(deployment.run({"rounds": 1}, "plain"))
    assert summary["status"] == "failed"
    assert "RefusedError: this run has secure-aggregation.profile=none" in summary["error"]


def test_clients_without_an_identity_refuse_a_run_with_a_roster(deployment: Deployment, tmp_path: Path) -> None:
    with Deployment(tmp_path, 3, roster=False) as bare:
        settings = {**MALICIOUS, "rounds": 1, "secure-aggregation.roster": str(deployment.roster)}
        summary = _summary(bare.run(settings, "plain"))
    assert summary["status"] == "failed"
    assert "RefusedError: this run has a roster, and client" in summary["error"]


# Known answers.


def _given(case: dict[str, Any], folder: Path) -> str:
    """Write what the known clients read, and return the roster's path."""
    folder.mkdir()
    (folder / "case.json").write_text(json.dumps(case))
    public = {}
    for own in case["clients"]:
        (folder / f"{own['id']}.key").write_text(own["identity"])
        public[own["id"]] = Identity(bytes.fromhex(own["identity"])).public.hex()
    (folder / "roster.json").write_text(json.dumps(public))
    return str(folder / "roster.json")


def _assert_known(found: dict[str, Any], case: dict[str, Any]) -> None:
    assert found["error"] == "", found["reasons"]
    assert found["masked"] == {str(own["id"]): own["masked"] for own in case["clients"]}
    assert found["total"] == case["total"]


def test_processes_of_their_own_give_the_known_bytes(deployment: Deployment) -> None:
    case = _case("malicious")
    roster = _given(case, deployment.folder / "known")
    bits = case["terms"]["bits"]
    deployment.submit({**MALICIOUS, "secure-aggregation.roster": roster, "secure-aggregation.bits": bits}, "known")
    found = Path(roster).parent / "found.json"
    deployment.until(found.exists, "the sum")
    deployment.until(lambda: found.read_text().endswith("}"), "all of it")
    _assert_known(json.loads(found.read_text()), case)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_engines_workers_give_the_known_bytes(
    name: str, workers: int, deployment: Deployment, tmp_path: Path
) -> None:
    case = _case(name)
    roster = _given(case, tmp_path / "known")
    settings = f'secure-aggregation.profile="malicious" secure-aggregation.roster="{roster}" partition.kind="iid"'
    settings += f" secure-aggregation.bits={case['terms']['bits']}"
    done = subprocess.run(
        [
            BIN / "fedra", "flower", deployment._app("known"), "--nodes", str(len(case["clients"])),
            "--workers", str(workers), "--run-config", settings,
        ],
        capture_output=True, text=True, timeout=120, env={**os.environ, "DEPLOYMENT": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    _assert_known(json.loads((tmp_path / "known" / "found.json").read_text()), case)
