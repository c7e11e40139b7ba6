"""A client's part in differential privacy: private batches and steps, clipping, noise and a budget of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from flwr.app import Context

from client.canaries import CanarySteps
from core import records
from core.batches import Batches
from core.config import RunConfig
from core.training import LocalRound, LocalUpdate
from privacy.accounting import Event, epsilon, keep_spent, spent_by
from privacy.client_level import ClientLevel, Clipping, with_noise
from privacy.dpsgd import PrivateSteps
from privacy.example_level import ExampleLevel, poisson_batches
from privacy.noise import Source, source


class ClientPrivacy:
    """What a cohort of clients does; what each has spent is its own and lies in its `Context.state`."""

    def __init__(self, config: RunConfig) -> None:
        own = config.privacy
        self._config, self._source = config, source(own.noise_seed)
        self._examples = ExampleLevel(config) if own.level == "example" else None
        self._clients = ClientLevel.of(config) if own.level == "client" else None
        self._clipping = Clipping(self._clients) if self._clients else None
        self._own_event = self._clients.own_event if self._clients else None

    @staticmethod
    def of(config: RunConfig) -> ClientPrivacy | None:
        """Return the configured privacy; None where there is none."""
        return ClientPrivacy(config) if config.privacy.level != "none" else None

    def exhausted(self, contexts: Sequence[Context], sizes: Sequence[int]) -> list[bool]:
        """Return which clients' budgets one more round would exceed."""
        own = self._config.privacy
        if not own.epsilon:
            return [False] * len(contexts)
        return [
            bool(cost) and epsilon(spent_by(context.state) + cost, own.delta) > own.epsilon
            for context, cost in zip(contexts, map(self._cost, sizes), strict=True)
        ]

    def _cost(self, size: int) -> Counter[Event]:
        """Return what a round costs a client that has so many examples; nothing where the server accounts."""
        if self._examples and size:
            return Counter(self._examples.cost(size))
        return Counter({self._own_event: 1} if self._own_event else {})

    def seeds(self, clients: Sequence[int]) -> tuple[int, ...] | None:
        """Return secret seeds for what the clients' models draw; None where a run is to repeat.

        A dropout mask that all can compute and that depends on who (or which example) stands beside would let one
        client change what others send.
        """
        if not self._source.guaranteed:
            return None
        return tuple((self._source.uniform(len(clients)) * 2.0**53).long().tolist())

    def source(self, *path: int | str) -> Source:
        """Return where noise comes from that stands for these names."""
        return self._source.at(*path)

    def batches(self, server_round: int, clients: Sequence[int], sizes: Sequence[int]) -> Batches | None:
        """Return Poisson batches for a round; None where examples are not hidden and any batches will do."""
        if self._examples is None:
            return None
        sources = [self._source.at("batches", server_round, client) for client in clients]
        return poisson_batches(self._examples, sizes, sources)

    def steps(self, server_round: int, clients: Sequence[int], sizes: Sequence[int]) -> PrivateSteps | None:
        """Return the cohort's private steps for a round; None where examples are not hidden."""
        if self._examples is None:
            return None
        events = [self._examples.event(size) for size in sizes]
        expected = [event.rate * size for event, size in zip(events, sizes, strict=True)]
        return PrivateSteps.begin(
            self._config.privacy.clipping_norm,
            [event.noise_multiplier for event in events],
            expected,
            [self._source.at("steps", server_round, client) for client in clients],
            self._guests(server_round, clients, events, expected) if self._config.audit.canaries else None,
        )

    def _guests(
        self, server_round: int, clients: Sequence[int], events: Sequence[Event], expected: Sequence[float]
    ) -> CanarySteps:
        sources = [self._source.at("canaries", server_round, client) for client in clients]
        return CanarySteps.of(self._config, clients, events, expected, sources)

    @staticmethod
    def canaries(r: LocalRound) -> list[bytes]:
        """Return what each client's canaries look like after the round; nothing where the run is not audited."""
        guests = r.private.guests if isinstance(r.private, PrivateSteps) else None
        return guests.columns() if isinstance(guests, CanarySteps) else []

    def protect(self, update: LocalUpdate, r: LocalRound, server_round: int, clients: Sequence[int]) -> LocalUpdate:
        """Return the update as it may leave: clipped, and under local noise noised."""
        if self._clipping is None:
            return update
        update = self._clipping(update, r)
        if self._config.privacy.noise != "local":
            return update
        assert self._clients is not None
        sources = [self._source.at("update", server_round, client) for client in clients]
        return with_noise(update, r, self._clients.noise_multiplier, sources)

    def taken(self, r: LocalRound) -> dict[str, list[int]]:
        """Return how many private steps (at level example) or updates each client has taken, a column a number.

        Raises `RuntimeError` where a client took none, or more than it has drawn batches: two steps on one batch cost
        more than the ledger counts for two.
        """
        if self._examples is not None:
            assert isinstance(r.private, PrivateSteps)
            drawn = r.batches.steps.numpy()
            if ((r.private.taken < 1) | (r.private.taken > drawn)).any():
                taken = int(r.private.taken.max())
                raise RuntimeError(f"{taken} private steps on {int(drawn.max())} batches: each batch is for one step")
            return {records.PRIVATE_STEPS: r.private.taken.tolist(), records.DROPPED: r.private.dropped.tolist()}
        return {records.PRIVATE_STEPS: [1] * len(r.sizes)} if self._own_event else {}

    def note(self, contexts: Sequence[Context], sizes: Sequence[int], taken: Mapping[str, Sequence[int]]) -> None:
        """Let each client remember what it has spent."""
        for context, size, steps in zip(contexts, sizes, taken.get(records.PRIVATE_STEPS, ()), strict=bool(taken)):
            [event] = self._cost(size)
            keep_spent(context.state, spent_by(context.state) + Counter({event: steps}))
