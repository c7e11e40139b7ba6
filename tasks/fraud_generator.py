"""Card transactions of several banks, invented: the fraud task's offline data set `generated`.

Mechanics, in the order of the code:

- Banks differ in size, spending level, favourite merchant categories, time of day, fraud rate and in which style of
  fraud hits them: seven thefts in ten follow the bank's own style, the others any style. So one bank sees few frauds,
  most of one style, while all banks together see enough of every style.
- A card has a spending level, a peak hour (one card in twenty is a night owl), weights over merchant categories and a
  regular merchant in each. Amounts are log-normal around card level x category price x merchant price.
- What honest cards do looks like fraud now and then: shopping sprees (several transactions within two hours), a journey
  on one card in four (some days of foreign transactions), and small payments for digital goods.
- A theft puts a burst of fraudulent transactions on a card; `STYLES` gives number, pace, hours, goods and amounts.
- Labels are what a bank records: a fraud of less than five euros stays unnoticed one time in twelve, a larger one
  one time in fifty, and one honest online transaction in four thousand is disputed by its owner.

A feature of a transaction knows that transaction and the same card's past, never its future. The central test set is
the last fifth of the time in every bank, so that nothing in training happens after anything in the test.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from core.config import RunConfig
from core.seeding import rng
from tasks.base import Table

BANKS = ("Alder Bank", "Birch Bank", "Cedar Bank", "Damson Bank", "Elm Bank", "Fir Bank", "Ginkgo Bank", "Hazel Bank")
DAYS, TEST_FROM_DAY = 60, 48
# 2,100 cards make about 59,000 transactions, however many banks share them; beyond 525 banks, four cards each.
CARDS, CARDS_PER_BANK, LEAST_CARDS = 2100, 4, 3
LEAST_PER_CARD, MEAN_PER_CARD = 8, 23
MERCHANTS = 40
FRAUD_RATE = 0.007
OWN_STYLE_SHARE = 0.7
# Category: share of honest transactions, log of the median amount in euros, share of merchants that are online.
CATEGORIES = {
    "groceries": (0.28, 3.3, 0.05), "restaurants": (0.19, 3.0, 0.1), "transport": (0.13, 1.8, 0.3),
    "fuel": (0.1, 3.7, 0.0), "clothing": (0.08, 3.9, 0.4), "electronics": (0.035, 5.0, 0.5),
    "travel": (0.025, 5.3, 0.7), "digital": (0.09, 2.0, 1.0), "gift cards": (0.02, 3.6, 0.6), "cash": (0.05, 4.5, 0.0),
}  # fmt: skip
SHARES, LOG_PRICES, ONLINE_SHARES = (np.array(column) for column in zip(*CATEGORIES.values(), strict=True))
FEATURES = (
    "log_amount", "hour_sin", "hour_cos", "weekend", "log_hours_since_previous", "log_count_last_hour",
    "log_count_last_day", "log_count_before", "log_amount_over_mean_before", "usual_hour", "new_merchant",
    "new_category", "foreign", "country_changed", "online", *(f"category_{name}" for name in CATEGORIES),
)  # fmt: skip


@dataclass(frozen=True)
class Style:
    """How one kind of fraudster uses a stolen card."""

    least: int
    most: int
    gap_hours: float
    """Mean time between two transactions of a burst of `least` to `most`."""
    first_hour: float
    window_hours: float
    """The burst starts within window_hours of first_hour o'clock."""
    log_amount: float
    """Log of the median amount in euros; where `relative`, over what this card would pay in the category."""
    log_spread: float
    relative: bool
    foreign: float
    """Share of bursts abroad."""
    goods: tuple[str, ...]
    """Merchant categories, drawn alike; empty is whatever people buy."""


STYLES = {
    "card testing": Style(4, 9, 0.1, 0, 24, 0.9, 0.5, False, 0.2, ("digital", "transport")),
    "electronics at night": Style(2, 4, 0.6, 0, 5, 6.0, 0.5, False, 0.1, ("electronics", "electronics", "clothing")),
    "cash abroad": Style(2, 5, 1.0, 8, 16, 5.0, 0.4, False, 1.0, ("cash", "cash", "gift cards")),
    "gift cards": Style(2, 6, 0.3, 9, 13, 4.6, 0.4, False, 0.0, ("gift cards", "gift cards", "digital")),
    "lookalike": Style(2, 5, 2.0, 8, 14, 1.6, 0.4, True, 0.1, ()),
}


@dataclass(frozen=True)
class Cards:
    """What is fixed about the cards (n of them) of all banks, card numbers of one bank being consecutive."""

    bank: np.ndarray
    level: np.ndarray
    """Log of the spending level, around 0."""
    peak: np.ndarray
    """Hour of the day around which the card is used."""
    tastes: np.ndarray
    """(n, categories): weights of the merchant categories."""
    regular: np.ndarray
    """(n, categories) int64: the card's usual merchant in each category."""
    journey: np.ndarray
    """(2, n): first and last hour of the card's journey; infinity where it stays at home."""
    per_bank: np.ndarray
    """(banks,) int64: number of cards."""
    fraud_rate: np.ndarray
    """(banks,): expected share of fraudulent transactions."""


@dataclass(frozen=True)
class Transactions:
    """Transactions as arrays (n,): hours since the first midnight, a Monday's, and log of the amount in euros."""

    card: np.ndarray
    hours: np.ndarray
    category: np.ndarray
    merchant: np.ndarray
    """(n,) int64: number inside the category."""
    log_amount: np.ndarray
    foreign: np.ndarray
    online: np.ndarray
    fraud: np.ndarray
    """(n,) bool: the truth, which `record` turns into labels."""

    def __len__(self) -> int:
        return len(self.card)

    def take(self, rows: np.ndarray) -> Transactions:
        """Return the given rows."""
        return Transactions(*(getattr(self, f.name)[rows] for f in fields(self)))


def generate(config: RunConfig) -> Table:
    """Return transactions of `config.clients` banks: x (n, 25) float32, y (n,) int64, natural groups the banks."""
    banks = config.clients
    cards, transactions = simulate_banks(banks, config.seed)
    names = BANKS[:banks] + tuple(f"Bank {i + 1}" for i in range(len(BANKS), banks))
    return Table(
        x=features(transactions),
        y=record(transactions, rng(config.seed, "fraud", "labels")),
        natural=cards.bank[transactions.card],
        names=names,
        central=transactions.hours >= TEST_FROM_DAY * 24,
    )


def simulate_banks(banks: int, seed: int) -> tuple[Cards, Transactions]:
    """Return cards, and transactions sorted by card and time: about 59,000, or 115 a bank where that is more."""
    cards = _cards(banks, rng(seed, "fraud", "cards"))
    g = rng(seed, "fraud", "merchants")
    log_price = LOG_PRICES[:, None] + g.normal(0, 0.3, (len(CATEGORIES), MERCHANTS))
    online = g.random((len(CATEGORIES), MERCHANTS)) < ONLINE_SHARES[:, None]
    honest = _honest(cards, log_price, online, rng(seed, "fraud", "honest"))
    stolen = _stolen(cards, honest, online, rng(seed, "fraud", "stolen"))
    both = Transactions(*(np.concatenate([getattr(part, f.name) for part in (honest, stolen)]) for f in fields(honest)))
    both = both.take(np.flatnonzero(both.hours < DAYS * 24))
    return cards, both.take(np.lexsort((both.hours, both.card)))


def _cards(banks: int, g: np.random.Generator) -> Cards:
    sizes = np.exp(g.normal(0, 0.35, banks))
    level, hour_shift = g.normal(0, 0.45, banks), g.normal(0, 1, banks)
    tastes = SHARES * np.exp(g.normal(0, 0.4, (banks, len(CATEGORIES))))
    sizes /= sizes.sum()
    rates = np.exp(g.normal(0, 0.35, banks))
    wanted = sizes * max(CARDS, CARDS_PER_BANK * banks)
    per_bank = np.maximum(LEAST_CARDS, np.round(wanted)).astype(np.int64)
    bank = np.repeat(np.arange(banks), per_bank)
    n = len(bank)
    start = np.where(g.random(n) < 0.25, g.uniform(0, DAYS - 5, n) * 24, np.inf)
    return Cards(
        bank=bank,
        level=level[bank] + g.normal(0, 0.45, n),
        peak=np.where(g.random(n) < 0.05, 23, g.normal(14, 2.5, n) + hour_shift[bank]),
        tastes=tastes[bank] * g.gamma(1.5, size=(n, len(CATEGORIES))),
        regular=g.integers(MERCHANTS, size=(n, len(CATEGORIES))),
        journey=np.stack([start, start + g.uniform(4, 10, n) * 24]),
        per_bank=per_bank,
        # The banks' rates differ while all their transactions together keep the rate.
        fraud_rate=FRAUD_RATE * rates / (sizes * rates).sum(),
    )


def _honest(cards: Cards, log_price: np.ndarray, online: np.ndarray, g: np.random.Generator) -> Transactions:
    """Return what the cards' owners buy, unsorted."""
    counts = LEAST_PER_CARD + g.poisson((MEAN_PER_CARD - LEAST_PER_CARD) * g.gamma(4, 0.25, len(cards.bank)))
    card = np.repeat(np.arange(len(counts)), counts)
    hours = g.integers(DAYS, size=len(card)) * 24 + (cards.peak[card] + g.normal(0, 3.2, len(card))) % 24
    begins = np.flatnonzero(g.random(len(card)) < 0.07)
    spree = np.repeat(begins, g.integers(1, 6, len(begins)))
    hours = np.concatenate([hours, hours[spree] + g.uniform(0, 2, len(spree))])
    card = np.concatenate([card, card[spree]])
    n = len(card)
    category = _choose(cards.tastes[card], g)
    merchant = np.where(g.random(n) < 0.75, cards.regular[card, category], g.integers(MERCHANTS, size=n))
    web = online[category, merchant]
    away = (hours >= cards.journey[0, card]) & (hours < cards.journey[1, card])
    return Transactions(
        card=card,
        hours=hours,
        category=category,
        merchant=merchant,
        log_amount=cards.level[card] + log_price[category, merchant] + g.normal(0, 0.5, n),
        # Some web shops are abroad wherever the card's owner is.
        foreign=np.where(web, g.random(n) < 0.06, away),
        online=web,
        fraud=np.zeros(n, dtype=bool),
    )


def _stolen(cards: Cards, honest: Transactions, online: np.ndarray, g: np.random.Generator) -> Transactions:
    """Return the bursts of transactions on stolen cards, unsorted; a few may end after the last day."""
    styles = list(STYLES.values())
    burst = np.array([(style.least + style.most) / 2 for style in styles])
    own_style = np.arange(len(cards.per_bank)) % len(styles)
    mean_burst = OWN_STYLE_SHARE * burst[own_style] + (1 - OWN_STYLE_SHARE) * burst.mean()
    rows = np.bincount(cards.bank[honest.card], minlength=len(cards.per_bank))
    bank = np.repeat(np.arange(len(rows)), g.poisson(cards.fraud_rate * rows / mean_burst))
    first_card = np.cumsum(cards.per_bank) - cards.per_bank
    victim = first_card[bank] + g.integers(cards.per_bank[bank])
    style = np.where(g.random(len(bank)) < OWN_STYLE_SHARE, own_style[bank], g.integers(len(styles), size=len(bank)))

    def of_style(name: str) -> np.ndarray:
        return np.array([getattr(one, name) for one in styles])[style]

    # From the third day on, so that most stolen cards have a past.
    start = g.integers(2, DAYS, len(bank)) * 24 + of_style("first_hour")
    start = start + g.random(len(bank)) * of_style("window_hours")
    lengths = g.integers(of_style("least"), of_style("most") + 1)
    theft = np.repeat(np.arange(len(bank)), lengths)
    n = len(theft)
    elapsed = np.cumsum(g.exponential(of_style("gap_hours")[theft]))
    elapsed -= elapsed[np.cumsum(lengths) - lengths][theft]
    goods = np.array([[s.goods.count(name) for name in CATEGORIES] if s.goods else SHARES for s in styles])
    category, merchant = _choose(goods[style[theft]], g), g.integers(MERCHANTS, size=n)
    own = np.where(of_style("relative")[theft], cards.level[victim[theft]] + LOG_PRICES[category], 0)
    return Transactions(
        card=victim[theft],
        hours=start[theft] + elapsed,
        category=category,
        merchant=merchant,
        log_amount=own + of_style("log_amount")[theft] + of_style("log_spread")[theft] * g.normal(size=n),
        foreign=(g.random(len(bank)) < of_style("foreign"))[theft],
        online=online[category, merchant],
        fraud=np.ones(n, dtype=bool),
    )


def record(t: Transactions, g: np.random.Generator) -> np.ndarray:
    """Return the labels (n,) int64 that banks record: unnoticed frauds are 0, disputed honest transactions are 1."""
    draw = g.random(len(t))
    unnoticed = draw < np.where(t.log_amount < np.log(5), 1 / 12, 1 / 50)
    disputed = t.online & (draw < 1 / 4000)
    return np.where(t.fraud, ~unnoticed, disputed).astype(np.int64)


def features(t: Transactions) -> np.ndarray:
    """Return x (n, 25) float32, columns `FEATURES`, of transactions sorted by card and time."""
    first = np.searchsorted(t.card, t.card)
    before = np.arange(len(t)) - first
    previous = np.maximum(np.arange(len(t)) - 1, first)
    # Cards laid end to end on one time axis, further apart than a day: one search serves all of them.
    axis = t.card * (DAYS + 2) * 24 + t.hours
    recent = {hours: np.arange(len(t)) - np.searchsorted(axis, axis - hours) for hours in (1, 24)}
    amount = np.exp(t.log_amount)
    mean_before = np.where(before > 0, _sum_before(amount, first) / np.maximum(before, 1), amount)
    angle = 2 * np.pi * t.hours / 24
    sine, cosine = np.sin(angle), np.cos(angle)
    usual = (_sum_before(sine, first) * sine + _sum_before(cosine, first) * cosine) / np.maximum(before, 1)
    gap = np.where(before > 0, t.hours - t.hours[previous], DAYS * 24)
    columns = [
        t.log_amount,
        sine,
        cosine,
        t.hours // 24 % 7 >= 5,
        np.log(gap + 0.01),
        np.log1p(recent[1]),
        np.log1p(recent[24]),
        np.log1p(before),
        t.log_amount - np.log(mean_before),
        usual,
        _first_time((t.card * len(CATEGORIES) + t.category) * MERCHANTS + t.merchant),
        _first_time(t.card * len(CATEGORIES) + t.category),
        t.foreign,
        t.foreign != t.foreign[previous],
        t.online,
        *(t.category == kind for kind in range(len(CATEGORIES))),
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def _choose(weights: np.ndarray, g: np.random.Generator) -> np.ndarray:
    """Return for each row of weights (n, k) an index (n,) drawn in proportion."""
    edges = np.cumsum(weights, axis=1)
    return (g.random(len(weights))[:, None] * edges[:, -1:] >= edges).sum(axis=1)


def _sum_before(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return for each row the sum of the same card's earlier rows; `first` is the row at which its card begins."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    return total[:-1] - total[first]


def _first_time(key: np.ndarray) -> np.ndarray:
    """Return a mask (n,) of rows whose key has not occurred in an earlier row."""
    mask = np.zeros(len(key), dtype=bool)
    mask[np.unique(key, return_index=True)[1]] = True
    return mask
