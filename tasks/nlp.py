"""Text classification: generated triage notes of many authors (offline), or one of four public corpora from files.

A text becomes a fixed number of token ids by hashing, so no vocabulary has to be collected from the clients:
id = 1 + murmurhash3_32(token) % (BUCKETS - 1), and 0 is padding.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from core.config import RunConfig
from core.data import Federation
from core.errors import InputError
from tasks.base import Dataset, Standardise, Table, choose, choose_model, classification_loss, refuse_missing
from tasks.nlp_generator import SPECIALTIES, generate
from tasks.partition import federate
from tasks.text_models import PADDING, BagOfEmbeddings, TextTransformer

BUCKETS = 4096
# 7,000 notes for up to 116 authors; for more authors 60 each, so that everybody has enough for three splits.
NOTES, NOTES_PER_AUTHOR = 7000, 60
SPAM = ("ham", "spam")
SITES = ("amazon", "imdb", "yelp")
CONDITIONS = (
    "neoplasms", "digestive system diseases", "nervous system diseases", "cardiovascular diseases",
    "general pathological conditions",
)  # fmt: skip
KINDS = ("surgery", "medical records", "internal medicine", "other")
PAGES = {
    "sms-spam": "https://archive.ics.uci.edu/dataset/228/sms+spam+collection",
    "sentiment": "https://archive.ics.uci.edu/dataset/331/sentiment+labelled+sentences",
    "abstracts": "https://github.com/sebischair/Medical-Abstracts-TC-Corpus",
    "transcriptions": "https://github.com/socd06/medical-nlp (its data/test.csv)",
}


class Nlp:
    """Classes of texts from hashed tokens; logits (B,) for two classes, else (B, classes)."""

    standardise: Standardise = "none"
    tuned_threshold = False

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        _, self.dataset = choose(DATASETS, config)
        self.labels = self.dataset.labels
        own = ("auroc", "f1") if len(self.labels) == 2 else ("macro_f1", "auroc")
        self.metrics = ("loss", "accuracy", *own, "ece")
        classes, length = len(self.labels), self.dataset.features
        self.models = {
            "embedding": lambda: BagOfEmbeddings(BUCKETS, classes),
            "transformer": lambda: TextTransformer(BUCKETS, classes, length),
        }

    def federation(self) -> Federation:
        """Return all clients' tokens x (n, length) int64 and labels, and the central test set."""
        folder = Path(self.config.data_dir) if self.config.data_dir else None
        return federate(self.dataset.read(self.config, folder), self.config)

    def model(self) -> nn.Module:
        """Return the configured model: logits (B,) for two classes, else (B, classes)."""
        return choose_model(self.models, self.config)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return each example's cross-entropy, (B,)."""
        return classification_loss(logits, y, self.config.positive_weight)


def encode(texts: Sequence[str], length: int) -> np.ndarray:
    """Return token ids (n, length) int64 in 0..BUCKETS - 1: the first `length` words of each text, then padding."""
    # Only who reads the data needs it: scikit-learn takes a second to import, and workers read none.
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.utils import murmurhash3_32

    # One letter or digit is a word too ("u", "2"): short messages are full of them.
    analyse = CountVectorizer(token_pattern=r"\w+").build_analyzer()
    known: dict[str, int] = {}
    x = np.full((len(texts), length), PADDING, dtype=np.int64)
    for row, text in enumerate(texts):
        tokens = analyse(text)[:length]
        for token in tokens:
            if token not in known:
                known[token] = 1 + murmurhash3_32(token, positive=True) % (BUCKETS - 1)
        x[row, : len(tokens)] = [known[token] for token in tokens]
    return x


def read_generated(config: RunConfig, folder: Path | None) -> Table:
    """Return triage notes of `config.clients` authors, who are the natural groups."""
    notes = max(NOTES, NOTES_PER_AUTHOR * config.clients)
    texts, labels, authors = generate(config.seed, config.clients, notes)
    names = tuple(f"author {author}" for author in range(config.clients))
    return Table(encode(texts, DATASETS["generated"].features), labels, authors, names)


def read_sms_spam(config: RunConfig, folder: Path | None) -> Table:
    """Return the messages of SMSSpamCollection (label, tab, message); there are no natural groups."""
    path = _find("sms-spam", "SMSSpamCollection", folder)
    texts: list[str] = []
    labels: list[int] = []
    for number, line in _lines(path):
        label, tab, text = line.partition("\t")
        if tab:
            labels.append(_code(label, SPAM, path, number))
            texts.append(text)
        elif texts and line.split()[0] not in SPAM:
            # Copies are in use in which line 6 is broken inside a word, as lines 6 and 7: "around he", "re though".
            texts[-1] += line
        else:
            raise InputError(f"{path} line {number} is not a label, a tab and a message: {line[:40]!r}.")
    return _table("sms-spam", path, texts, labels)


def read_sentiment(config: RunConfig, folder: Path | None) -> Table:
    """Return the sentences of *_labelled.txt (sentence, tab, label); the three sites are the natural groups."""
    texts: list[str] = []
    labels: list[int] = []
    sites: list[int] = []
    for site, name in enumerate(("amazon_cells", "imdb", "yelp")):
        path = _find("sentiment", f"{name}_labelled.txt", folder)
        for number, line in _lines(path):
            text, tab, label = line.rpartition("\t")
            if not tab:
                raise InputError(f"{path} line {number} is not a sentence, a tab and a label: {line[:40]!r}.")
            labels.append(_code(label, ("0", "1"), path, number))
            texts.append(text)
            sites.append(site)
    return replace(_table("sentiment", path, texts, labels), natural=np.array(sites, dtype=np.int64), names=SITES)


def read_abstracts(config: RunConfig, folder: Path | None) -> Table:
    """Return the abstracts of medical_tc_test.csv; a condition is the label, so there are no natural groups."""
    path = _find("abstracts", "medical_tc_test.csv", folder)
    return _table("abstracts", path, *_csv(path, "condition_label", "medical_abstract", len(CONDITIONS)))


def read_transcriptions(config: RunConfig, folder: Path | None) -> Table:
    """Return the transcriptions of mtsamples_test500.csv; there are no natural groups."""
    path = _find("transcriptions", "mtsamples_test500.csv", folder)
    return _table("transcriptions", path, *_csv(path, "label", "text", len(KINDS)))


def _csv(path: Path, label: str, text: str, classes: int) -> tuple[list[str], list[int]]:
    """Return the texts and labels of a CSV file whose column `label` holds 1 for the first class and so on."""
    codes = [str(code) for code in range(1, classes + 1)]
    rows = csv.reader(io.StringIO(_decoded(path), newline=""))
    texts, labels = [], []
    line = 1
    try:
        header = next(rows, [])
        missing = [column for column in (label, text) if column not in header]
        if missing:
            raise refuse_missing(str(path), missing, header)
        line = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                raise InputError(f"{path} line {line} has {len(row)} fields where the header has {len(header)}.")
            if row:
                labels.append(_code(row[header.index(label)], codes, path, line))
                texts.append(row[header.index(text)])
            # A quoted text may hold line breaks: a row begins where the one before it ended.
            line = rows.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path} line {line} is not CSV: {error}.") from None
    return texts, labels


def _table(dataset: str, path: Path, texts: list[str], labels: list[int]) -> Table:
    if not texts:
        raise InputError(f"{path} holds no example; get it again from {PAGES[dataset]}.")
    return Table(encode(texts, DATASETS[dataset].features), np.array(labels, dtype=np.int64))


def _find(dataset: str, file: str, folder: Path | None) -> Path:
    """Return where `file` lies in `folder`, or in the sub-folder that the sentences are published in."""
    if folder is None:
        raise InputError(
            f"data set '{dataset}' needs the file {file} from {PAGES[dataset]}; give its folder as data-dir=FOLDER."
        )
    for part in (".", "sentiment labelled sentences", "sentiment_labelled_sentences"):
        if (folder / part / file).is_file():
            return folder / part / file
    raise InputError(
        f"data set '{dataset}' needs the file {file}, which is not in data-dir={folder}; get it from {PAGES[dataset]}."
    )


def _decoded(path: Path) -> str:
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front, which would become part of the first field.
        return path.read_bytes().decode("utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}.") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line) for every line that is not blank."""
    # Not splitlines: IMDb sentences contain U+0085, which it would take for a line break.
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _code(value: str, codes: Sequence[str], path: Path, line: int) -> int:
    value = value.strip()
    if value not in codes:
        raise InputError(f"{path} line {line} has the unknown label {value[:40]!r}; choices: {', '.join(codes)}.")
    return codes.index(value)


DATASETS = {
    "generated": Dataset(
        "triage notes in six specialties, each author with a hand of their own; generated, no file needed",
        read_generated, SPECIALTIES, 48,
    ),
    "sms-spam": Dataset(
        "5,574 English text messages, 13 % spam (Almeida et al. 2011)",
        read_sms_spam, SPAM, 40, reads_files=True,
    ),
    "sentiment": Dataset(
        "3,000 review sentences of Amazon, IMDb and Yelp, the three natural clients (Kotzias et al. 2015)",
        read_sentiment, ("negative", "positive"), 40, reads_files=True,
    ),
    "abstracts": Dataset(
        "2,888 medical abstracts on five groups of conditions (Schopf et al. 2022)",
        read_abstracts, CONDITIONS, 256, reads_files=True,
    ),
    "transcriptions": Dataset(
        "500 medical transcriptions of four kinds (MTSamples)",
        read_transcriptions, KINDS, 512, reads_files=True,
    ),
}  # fmt: skip
