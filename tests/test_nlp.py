"""The nlp task: hashed tokens, generated notes, public corpora with their errors, and both models under vmap."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad_and_value, vmap

from core.config import RunConfig
from core.data import Federation, Split
from core.errors import InputError
from core.metrics import score
from tasks.base import build_model, probabilities
from tasks.nlp import BUCKETS, DATASETS, Nlp, encode
from tasks.nlp_generator import SPECIALTIES, generate
from tasks.text_models import BagOfEmbeddings, TextTransformer

REAL = Path(__file__).parents[2] / "shared" / "data" / "nlp"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the public corpora are not at {REAL}")


def config(**changes: object) -> RunConfig:
    return RunConfig.of({"task": "nlp"}).with_(**changes)


def read(dataset: str, folder: Path | None):
    return DATASETS[dataset].read(config(dataset=dataset), folder)


def refusal(dataset: str, folder: Path | None) -> str:
    with pytest.raises(InputError) as caught:
        read(dataset, folder)
    return str(caught.value)


def train(task: Nlp, model: torch.nn.Module, split: Split, epochs: int, rate: float, seed: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    x, y = torch.from_numpy(split.x), torch.from_numpy(split.y)
    generator = np.random.default_rng(seed)
    model.train()
    for _ in range(epochs):
        order = torch.from_numpy(generator.permutation(len(y)))
        for rows in order.split(32):
            optimizer.zero_grad()
            task.loss(model(x[rows]), y[rows]).mean().backward()
            optimizer.step()


def central_metrics(task: Nlp, model: torch.nn.Module, federation: Federation) -> dict[str, float]:
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(federation.central.x))
    return score(probabilities(logits), federation.central.y, task.metrics)


def test_a_text_becomes_hashed_ids_then_padding():
    x = encode(["Chest PAIN, u 2", "", "pain " * 9], length=6)
    assert x.dtype == np.int64
    assert x.shape == (3, 6)
    assert (x[0] != 0).tolist() == [True, True, True, True, False, False]
    assert x[1].tolist() == [0] * 6
    # 1 + murmurhash3_32("pain") % 4095: the same on every client, whatever it has read.
    assert x[2].tolist() == [x[0, 1]] * 6 == [689] * 6


def test_the_generator_repeats_itself_and_follows_the_seed():
    texts, labels, authors = generate(seed=0, authors=3, notes=200)
    again = generate(seed=0, authors=3, notes=200)
    assert texts == again[0]
    assert (labels == again[1]).all()
    assert texts != generate(seed=1, authors=3, notes=200)[0]
    assert len(texts) == len(labels) == len(authors)
    assert np.unique(authors).tolist() == [0, 1, 2]
    assert labels.min() >= 0
    assert labels.max() < len(SPECIALTIES) == 6


def test_authors_differ_in_words_labels_and_size():
    texts, labels, authors = generate(seed=0, authors=10, notes=7000)
    words: list[set[str]] = [set() for _ in range(10)]
    for text, author in zip(texts, authors, strict=True):
        words[author].update(text.split())
    for i in range(10):
        others = set().union(*(words[j] for j in range(10) if j != i))
        assert len(words[i] & others) < 0.5 * len(others)
    assert np.bincount(labels).min() > 0.1 * len(labels)
    mix = np.stack([np.bincount(labels[authors == i], minlength=6) / (authors == i).sum() for i in range(10)])
    assert mix.std(axis=0).min() > 0.03
    sizes = np.bincount(authors)
    assert sizes.max() > 1.5 * sizes.min()


@pytest.mark.parametrize("clients", [1, 150])
def test_any_number_of_authors_gets_three_splits(clients):
    federation = Nlp(config(clients=clients)).federation()
    assert len(federation) == clients
    assert federation.names[0] == "author 0"
    assert federation.train.x.shape[1] == 48
    for name in ("train", "validation", "test"):
        assert getattr(federation, name).sizes.min() >= 1


def test_federated_averaging_reaches_the_pooled_model_and_one_author_does_not():
    task = Nlp(config())
    federation = task.federation()
    assert len(federation.train.y) + len(federation.central) > 5000

    pooled = build_model(task, seed=0)
    train(task, pooled, Split(federation.train.x, federation.train.y), epochs=5, rate=0.003, seed=0)
    alone = build_model(task, seed=0)
    train(task, alone, federation.train[0], epochs=15, rate=0.01, seed=0)

    weights = federation.train.sizes / federation.train.sizes.sum()
    model = build_model(task, seed=0)
    for server_round in range(12):
        copies = [copy.deepcopy(model) for _ in weights]
        for client, local in enumerate(copies):
            train(task, local, federation.train[client], epochs=1, rate=0.01, seed=100 * server_round + client)
        states = [local.state_dict() for local in copies]
        model.load_state_dict(
            {name: sum(w * s[name] for w, s in zip(weights.tolist(), states, strict=True)) for name in states[0]}
        )

    federated = central_metrics(task, model, federation)
    assert tuple(federated) == ("loss", "accuracy", "macro_f1", "auroc", "ece")
    best = central_metrics(task, pooled, federation)["accuracy"]
    assert 0.88 < best < 0.96
    assert federated["accuracy"] > 0.95 * best
    assert central_metrics(task, alone, federation)["accuracy"] < best - 0.15


@pytest.mark.parametrize("name", ["embedding", "transformer"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_stacked_clients_are_those_of_each_client(name, training):
    task = Nlp(config(model=name))
    model = build_model(task, seed=0).train(training)
    params = {n: p.detach().expand(3, *p.shape).clone() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, BUCKETS, (3, 4, 48), generator=generator)
    x[:, :, 20:] = 0
    y = torch.randint(0, 6, (3, 4), generator=generator)

    def objective(w, x, y):
        return task.loss(functional_call(model, w, (x,)), y).mean()

    gradients, losses = vmap(grad_and_value(objective), randomness="different")(params, x, y)
    assert losses.shape == (3,)
    assert gradients["embedding.weight"].shape == (3, BUCKETS, 32)
    assert all(g.isfinite().all() for g in gradients.values())
    if not training:
        task.loss(model(x[1]), y[1]).mean().backward()
        for n, p in model.named_parameters():
            torch.testing.assert_close(gradients[n][1], p.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [lambda c: BagOfEmbeddings(64, c), lambda c: TextTransformer(64, c, length=8)])
def test_padding_changes_nothing_and_an_empty_text_is_finite(make):
    x = torch.tensor([[5, 9, 3, 0, 0, 0, 0, 0], [0] * 8])
    assert make(2)(x).shape == (2,)
    model = make(3).eval()
    logits = model(x)
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()
    with torch.no_grad():
        model.embedding.weight[0] += 10
    torch.testing.assert_close(model(x), logits)


def test_only_the_transformer_reads_the_order_of_words():
    x = torch.tensor([[5, 9, 3, 0], [3, 9, 5, 0]])
    bag, transformer = BagOfEmbeddings(64, 3).eval()(x), TextTransformer(64, 3, length=4).eval()(x)
    torch.testing.assert_close(bag[0], bag[1])
    assert (transformer[0] - transformer[1]).abs().max() > 1e-4


def test_two_classes_are_scored_by_f1_and_more_by_macro_f1():
    assert Nlp(config(dataset="sms-spam")).metrics == ("loss", "accuracy", "auroc", "f1", "ece")
    assert Nlp(config(dataset="abstracts")).metrics == ("loss", "accuracy", "macro_f1", "auroc", "ece")
    with pytest.raises(InputError, match="did you mean 'sms-spam'"):
        Nlp(config(dataset="sms-span"))


@needs_real
@pytest.mark.parametrize(
    ("dataset", "counts", "length"),
    [
        ("sms-spam", [4827, 747], 40),
        ("sentiment", [1500, 1500], 40),
        ("abstracts", [633, 299, 385, 610, 961], 256),
        ("transcriptions", [198, 102, 109, 91], 512),
    ],
)
def test_public_corpora_have_their_published_counts(dataset, counts, length):
    table = read(dataset, REAL)
    assert np.bincount(table.y).tolist() == counts
    assert table.x.shape == (sum(counts), length)
    assert table.x.max() < BUCKETS
    assert (table.x != 0).any(axis=1).mean() > 0.999
    if dataset == "sentiment":
        assert table.names == ("amazon", "imdb", "yelp")
        assert np.bincount(table.natural).tolist() == [1000, 1000, 1000]
    else:
        assert table.natural is None


@needs_real
def test_sites_are_the_clients_of_the_sentiment_corpus():
    federation = Nlp(config(dataset="sentiment", clients=3, data_dir=str(REAL))).federation()
    assert federation.names == ("amazon", "imdb", "yelp")
    assert len(federation.central) == 600


@pytest.mark.parametrize(
    ("dataset", "file", "page"),
    [
        ("sms-spam", "SMSSpamCollection", "archive.ics.uci.edu"),
        ("sentiment", "amazon_cells_labelled.txt", "archive.ics.uci.edu"),
        ("abstracts", "medical_tc_test.csv", "Medical-Abstracts-TC-Corpus"),
        ("transcriptions", "mtsamples_test500.csv", "medical-nlp"),
    ],
)
def test_a_missing_file_is_named_with_its_publisher(dataset, file, page, tmp_path):
    for message in (refusal(dataset, None), refusal(dataset, tmp_path)):
        assert file in message
        assert page in message
        assert "data-dir=" in message
    assert str(tmp_path) in refusal(dataset, tmp_path)


def test_a_message_may_be_broken_in_two_lines(tmp_path):
    (tmp_path / "SMSSpamCollection").write_text("ham\tlives around he\nre though\r\nspam\twin now\n\n")
    table = read("sms-spam", tmp_path)
    assert table.y.tolist() == [0, 1]
    assert (table.x[:1, :4] == encode(["lives around here though"], 4)).all()


def test_a_next_line_character_does_not_end_a_sentence(tmp_path):
    folder = tmp_path / "sentiment labelled sentences"
    folder.mkdir()
    for site in ("amazon_cells", "imdb", "yelp"):
        (folder / f"{site}_labelled.txt").write_text("so\x85 good\tindeed\t1\nbad\t0\n", encoding="utf-8")
    table = read("sentiment", tmp_path)
    assert table.y.tolist() == [1, 0] * 3
    assert table.natural.tolist() == [0, 0, 1, 1, 2, 2]
    assert (table.x[0, :4] == encode(["so good indeed"], 4)).all()


@pytest.mark.parametrize(
    ("dataset", "file", "text", "said"),
    [
        ("sms-spam", "SMSSpamCollection", "hello\n", "line 1 is not a label, a tab"),
        ("sms-spam", "SMSSpamCollection", "ham\thi\nspam win\n", "line 2 is not a label, a tab"),
        ("sms-spam", "SMSSpamCollection", "ham\thi\n\neggs\thi\n", "line 3 has the unknown label 'eggs'; choices: ham"),
        ("sms-spam", "SMSSpamCollection", "\n", "holds no example"),
        ("sentiment", "amazon_cells_labelled.txt", "good\t1\nbad 0\n", "line 2 is not a sentence, a tab"),
        ("sentiment", "amazon_cells_labelled.txt", "good\t2\n", "line 1 has the unknown label '2'"),
        ("abstracts", "medical_tc_test.csv", "label,medical_abstract\n1,a\n", "lacks column 'condition_label'"),
        ("transcriptions", "mtsamples_test500.csv", "", "lacks column 'label', 'text'"),
        ("transcriptions", "mtsamples_test500.csv", 'label,text\n4,"a\nb"\n5,c\n', "line 4 has the unknown label '5'"),
        ("transcriptions", "mtsamples_test500.csv", "label,text\n4,a,b\n", "line 2 has 3 fields where the header has"),
    ],
)
def test_a_wrong_file_is_refused_with_the_line(dataset, file, text, said, tmp_path):
    (tmp_path / file).write_text(text)
    message = refusal(dataset, tmp_path)
    assert said in message
    assert file in message


def test_a_file_that_is_not_utf8_or_not_csv_is_refused(tmp_path):
    (tmp_path / "SMSSpamCollection").write_bytes(b"ham\t\xa3100\n")
    assert "cannot be read as UTF-8" in refusal("sms-spam", tmp_path)
    # A quote that is never closed swallows the rest of the file.
    (tmp_path / "mtsamples_test500.csv").write_text('label,text\n4,"' + "a" * 140_000)
    assert "line 2 is not CSV: field larger than field limit" in refusal("transcriptions", tmp_path)
