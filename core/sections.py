"""The sections of a configuration: what stands under `partition.`, `engine.`, `attack.` and so on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


def hyphens(name: str) -> str:
    """Return the key of a field: cohort_size is cohort-size."""
    return name.replace("_", "-")


class Section(BaseModel):
    """Fields with a default and a sentence; unknown ones and numbers that are not finite are refused."""

    model_config = ConfigDict(
        extra="forbid", alias_generator=hyphens, populate_by_name=True, frozen=True, allow_inf_nan=False
    )


class Partition(Section):
    kind: Literal["natural", "iid", "dirichlet", "shards", "quantity", "feature", "mixed"] = Field(
        "natural", description="How examples are dealt to clients; `fedra list` explains each kind."
    )
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration: 0.1 is very uneven, 100 is nearly iid.")
    shards: int = Field(2, ge=1, description="Label shards per client for kind=shards: 2 gives about two labels each.")
    strictness: float = Field(
        0.8, ge=0, le=1, description="For kind=feature: 0 is iid, 1 sorts the clients by the feature."
    )
    min_examples: int = Field(10, ge=1, description="Every client gets at least this many examples.")


class Engine(Section):
    workers: Literal["auto"] | int = Field("auto", description="Ray worker processes; 0 runs in this process.")
    cohort_size: Literal["auto"] | int = Field(
        "auto",
        description="Clients trained together: auto measures and records its choice; 1 is a plain loop.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where clients train: auto is a GPU where there is one, and the choice is recorded."
    )
    gpus_per_worker: Literal["auto"] | float = Field(
        "auto", description="Share of a GPU for each Ray worker (0.5: two a GPU); auto divides the GPUs among them."
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="Of the forward pass: bf16 is torch's autocast; weights stay float32."
    )
    compile: bool = Field(
        False,
        description="Whether torch.compile makes a cohort's gradient; not under a penalty (fedprox) or one by one.",
    )
    address: str = Field("", description="An existing Ray cluster to join: auto or HOST:PORT; empty starts one here.")

    @field_validator("gpus_per_worker")
    @classmethod
    def _share(cls, value: str | float) -> str | float:
        if not isinstance(value, str) and not (0 < value <= 1 or value == int(value) > 0):
            raise ValueError("must be 'auto', a share above 0 and up to 1, or a whole number")
        return value

    @field_validator("workers", "cohort_size")
    @classmethod
    def _not_negative(cls, value: str | int, info: Any) -> str | int:
        least = 0 if info.field_name == "workers" else 1
        if isinstance(value, int) and value < least:
            raise ValueError(f"must be 'auto' or a whole number from {least}")
        return value


class EarlyStopping(Section):
    metric: str = Field("", description="Validation metric to watch (loss, auroc, ...); empty watches nothing.")
    patience: int = Field(5, ge=1, description="Evaluations without improvement before the run stops.")


class Baseline(Section):
    optimizer: str = Field("", description="Optimiser of the baselines; empty is the clients' own.")
    learning_rate: float = Field(0.0, ge=0, description="Learning rate of the baselines; 0 is the clients' own.")
    epochs: int = Field(0, ge=0, description="Epochs of the baselines; 0 is as many as the federated clients see.")
    alone_epochs: int = Field(0, ge=0, description="Epochs of each client alone; 0 is as many as baseline.epochs.")


class Sampling(Section):
    kind: Literal["uniform", "poisson", "cyclic", "power-of-choice", "oort"] = Field(
        "uniform", description="How a round's clients are chosen: `fedra list` explains each kind."
    )
    candidates: float = Field(
        2.0, ge=1, description="For power-of-choice: candidates for each place; 1 ignores the loss, 2 to 4 is usual."
    )
    exploration: float = Field(0.1, ge=0, le=1, description="For oort: share of places for clients never seen.")
    over_selection: float = Field(
        1.0, ge=1, le=10, description="Ask this many times the clients and take the first to answer; 1.3 is usual."
    )


class Devices(Section):
    kind: Literal["none", "lognormal", "trace"] = Field(
        "none", description="What clients run on: none keeps no virtual time; lognormal draws; trace reads a file."
    )
    trace: str = Field("", description="CSV file for kind=trace: a row a client, columns as the settings below.")
    seconds_per_example: float = Field(
        0.001, gt=0, description="Median virtual seconds that training takes for an example and epoch."
    )
    compute_spread: float = Field(0.5, ge=0, description="Sigma of the log-normal of compute time over clients.")
    uplink_bytes_per_second: float = Field(250_000.0, gt=0, description="Median bandwidth from client to server.")
    downlink_bytes_per_second: float = Field(1_250_000.0, gt=0, description="Median bandwidth from server to client.")
    bandwidth_spread: float = Field(0.5, ge=0, description="Sigma of the log-normal of bandwidth over clients.")
    jitter: float = Field(0.1, ge=0, description="Sigma of the log-normal of one client's time over rounds.")
    availability: float = Field(1.0, gt=0, le=1, description="Probability that a client can be reached in a round.")
    deadline_seconds: float = Field(
        0.0, ge=0, description="Virtual seconds after which a round takes no more answers; 0 waits for all."
    )


class Faults(Section):
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability that a sampled client's answer is lost.")
    stage: Literal["train", "advertise", "share", "confirm", "unmask", "any"] = Field(
        "train", description="For secure aggregation: at which message a client drops out; any draws one for each."
    )
    stragglers: float = Field(
        0.0, ge=0, le=1, description="Probability that a sampled client has time for only part of its epochs."
    )
    late: Literal["lost", "partial"] = Field(
        "lost", description="What becomes of work that is not finished in time: lost, or what was done is sent."
    )


class Attack(Section):
    kind: Literal[
        "none", "label-flip", "backdoor", "sign-flip", "scaling", "gaussian", "zero", "alie", "ipm", "min-max",
        "non-finite", "wrong-shape",
    ] = Field("none", description="What malicious clients do: `fedra list` explains each kind.")  # fmt: skip
    fraction: float = Field(0.2, ge=0, le=0.5, description="Share of all clients that are malicious.")
    strength: float = Field(
        0.0, ge=0, description="Factor, noise or deviation of the attack; 0 is the usual one of its paper."
    )
    target: int = Field(0, ge=0, description="Label that a backdoor leads to.")


class Compression(Section):
    kind: Literal["none", "fp16", "int8", "int4", "top-k"] = Field(
        "none", description="How an update travels to the server: `fedra list` explains each kind."
    )
    fraction: float = Field(0.01, gt=0, le=1, description="For top-k: share of an update's numbers that is sent.")
    rotation: bool = Field(False, description="For int8 and int4: rotate at random before rounding.")


class Privacy(Section):
    level: Literal["none", "example", "client"] = Field(
        "none", description="Whom differential privacy hides: nobody, each example of a client, or a client whole."
    )
    noise: Literal["central", "local", "distributed"] = Field(
        "central", description="For level=client, who adds noise: the server to the sum, or each client to its update."
    )
    mechanism: Literal["gaussian", "banded"] = Field(
        "gaussian", description="For central noise: new in every round, or banded over rounds (sampling.kind=cyclic)."
    )
    epsilon: float = Field(
        0.0, ge=0, description="Budget: the noise is made for it, and the run ends before it is exceeded; 0 is none."
    )
    delta: float = Field(
        1e-5, ge=1e-12, lt=1, description="Probability that epsilon does not hold; below 1 / clients, from 1e-12 on."
    )
    noise_multiplier: float = Field(
        0.0, ge=0, description="Noise in multiples of clipping-norm; 0 takes what privacy.epsilon needs. 0.5 to 2."
    )
    clipping_norm: float = Field(
        1.0, gt=0, description="Largest L2 norm of an example's gradient, or of a client's update; 0.1 to 10 is usual."
    )
    clipping: Literal["fixed", "adaptive"] = Field(
        "fixed", description="For level=client: adaptive moves clipping-norm to a quantile of the updates' norms."
    )
    clipping_quantile: float = Field(
        0.5, gt=0, lt=1, description="For adaptive clipping: share of updates that clipping leaves as they are."
    )
    clipping_rate: float = Field(0.2, gt=0, description="For adaptive clipping: its learning rate, on the logarithm.")
    population: int = Field(
        0,
        ge=0,
        description="For level=client: clients of a deployment that the run stands for; noise and epsilon are theirs. "
        "0 is the run's own.",
    )
    weight_cap: int = Field(
        0, ge=0, description="For level=client: weigh updates by examples up to so many; 0 weighs clients alike."
    )
    noise_seed: int = Field(
        -1,
        ge=-1,
        lt=2**63,
        description="Seed of noise and of who is drawn, so that runs repeat and epsilon is no "
        "guarantee; -1 is the operating system's randomness.",
    )
    preprocessing: Literal["covered", "uncovered"] = Field(
        "covered", description="Whether to run although inputs are scaled by what epsilon does not cover."
    )


class Audit(Section):
    canaries: int = Field(
        0,
        ge=0,
        description="Canaries that a private run carries, so that its noise can be measured; 1000 is usual, and the "
        "model is not for use.",
    )


class SecureAggregation(Section):
    profile: Literal["none", "auto", "malicious", "semi-honest"] = Field(
        "none",
        description="Whether the server learns no more of updates than their sum, against a server that may lie "
        "(malicious) or one that keeps to the protocol (semi-honest); auto is malicious up to 128 clients a round.",
    )
    bits: int = Field(
        32, ge=8, le=32, description="Bits of the ring in which sums are taken; each number travels in so many."
    )
    clip: float = Field(
        100.0, gt=0, description="Largest L2 norm of an update: longer ones are cut to it, and how many is reported."
    )
    threshold: int = Field(
        0, ge=0, description="For semi-honest: how many shares open a mask; 0 is the least that is safe enough."
    )
    min_cohort: int = Field(3, ge=3, description="The smallest number of clients whose sum the server may see.")
    dropout_tolerance: float = Field(
        0.1, ge=0, lt=1, description="Share of a round's clients that may drop out without losing its sum."
    )
    corrupt: float = Field(
        0.1, ge=0, lt=1, description="Share of a round's clients that may work for a server that spies."
    )
    groups: int = Field(
        1, ge=1, description="Sums a round, of random groups of clients: robust strategies choose among their means."
    )
    roster: str = Field(
        "", description="File with the clients' public keys (`fedra identities`); empty makes simulated ones."
    )
    stage_seconds: float = Field(
        60.0, gt=0, description="Seconds that clients of a deployment have for each message beside training."
    )
