"""Generated triage notes: six specialties with overlapping vocabularies, and authors who each write in their own way.

A note is routed to the specialty that its findings point to. It is made in four steps:

1. Specialty: drawn from the author's own mix, Dirichlet(2) over the six (label skew between authors).
2. Findings: two to six concepts. 74 % come from the specialty's own list, 20 % from concepts that it shares with others
   (chest pain: cardiology, respiratory or gastroenterology), 6 % from any specialty (a second complaint). A negated
   finding ("no seizure") and a history ("pmh heartburn") come from all specialties alike, so that the same words also
   occur where they mean nothing.
3. Style: a concept has four wordings, of which an author mostly uses one or two (shares from Dirichlet(0.6)). Authors
   also have their own phrases around a finding, opening and closing, length, way of shortening long words (none, cut,
   vowels dropped) and rate of typing errors, up to 4 % of the words. So an author alone has seen about a third of the
   different words that the others write (feature shift).
4. Label noise: 3 % of the notes carry the label of another specialty, drawn uniformly.

The number of notes per author is uneven (log-normal, sigma 0.3). Each author has a random stream of their own. With ten
authors and 7,000 notes a bag of words trained on all of them reaches an accuracy of about 0.92, one author alone 0.57.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.seeding import rng

LABEL_NOISE = 0.03
# Shares of the findings that come from the specialty's own list and from the concepts that it shares with others.
OWN, COMMON = 0.74, 0.2
# Fewer would not leave every author something to train, validate and test on beside the central test set.
LEAST_NOTES = 30

# Four wordings of each concept, divided by "|". They share few words: knowing one does not give away the others.
CONCEPTS = {
    "cardiology": (
        "palpitations|racing heart|fluttering beat|pounding pulse",
        "crushing chest pressure|central tightness|heavy weight sternum|angina like pain",
        "raised troponin|trop positive|cardiac enzymes up|myocardial marker elevated",
        "st depression on ecg|ischaemic ekg|abnormal tracing|twelve lead changes",
        "atrial fibrillation|af rate fast|irregularly irregular rhythm|absent p waves",
        "ankle oedema|puffy legs|pitting swelling of feet|fluid to knees",
        "hypertension uncontrolled|htn|blood pressure very high|bp through the roof",
        "systolic murmur|valve noise|added heart sound|aortic stenosis",
        "jugular venous distension|jvp up|neck veins full|engorged veins",
    ),
    "respiratory": (
        "productive cough|bringing up phlegm|green sputum|chesty hacking",
        "wheeze|whistling breath|bronchospasm|musical expiration",
        "asthma exacerbation|reactive airways|inhaler not helping|salbutamol overuse",
        "copd flare|emphysema worse|chronic bronchitis|lungs of a smoker",
        "low saturations|sats down|hypoxic on air|spo2 falling",
        "crackles at base|creps|coarse rales|bubbling on auscultation",
        "consolidation on cxr|pneumonia|lobar infiltrate|chest film opacity",
        "haemoptysis|blood streaked mucus|coughed red|rusty spit",
        "sleep apnoea|stops snoring then gasps|osa|cpap intolerance",
    ),
    "gastroenterology": (
        "heartburn|acid reflux|gord|burning after meals",
        "diarrhoea|loose stools|watery motions|bowels open often",
        "melaena|black tarry faeces|dark stool|digested blood",
        "jaundice|yellow sclera|icteric|bilirubin raised",
        "epigastric tenderness|upper tummy ache|dyspepsia|stomach gnawing",
        "constipation|not opened bowels|bunged up|hard pellets",
        "gallstones|biliary colic|murphy sign|cholecystitis",
        "dysphagia|food sticks|trouble swallowing|bolus stuck",
        "ascites|distended belly|shifting dullness|liver cirrhosis",
    ),
    "neurology": (
        "headache|migraine|cephalgia|head throbbing",
        "seizure|fit|convulsion|tonic clonic episode",
        "slurred speech|dysarthria|talking nonsense|aphasia",
        "facial droop|mouth asymmetry|seventh nerve palsy|lopsided smile",
        "tremor|shaking hands|parkinsonism|pill rolling",
        "photophobia|light hurts eyes|neck stiffness|meningism",
        "double vision|diplopia|blurred sight|field defect",
        "confusion|disorientated|muddled|acute delirium",
        "unsteady gait|ataxia|staggering|poor coordination",
    ),
    "orthopaedics": (
        "wrist fracture|colles|broken radius|distal forearm deformity",
        "knee effusion|swollen patella|joint locked|meniscus tear",
        "hip pain after fall|neck of femur|nof|groin ache cannot weight bear",
        "shoulder dislocation|humeral head out|arm popped|reduced under sedation",
        "sciatica|shooting down leg|disc prolapse|l5 radiculopathy",
        "ankle sprain|twisted foot|inversion injury|ligament strain",
        "osteoarthritis|worn cartilage|degenerative changes|bone on bone",
        "reduced range of movement|stiff joint|rom limited|frozen capsule",
        "plaster cast check|pop tight|splint review|backslab problem",
    ),
    "urology": (
        "haematuria|blood in urine|pink water|clots passed",
        "dysuria|burning on voiding|stings to pee|painful micturition",
        "urinary retention|unable to void|bladder full|residual 800",
        "renal colic|kidney stone|loin to groin|ureteric calculus",
        "frequency and nocturia|up all night to toilet|luts|weak stream",
        "raised psa|enlarged prostate|bph|craggy gland",
        "testicular swelling|scrotal lump|hydrocele|torsion query",
        "catheter blocked|suprapubic leaking|foley bypassing|bag empty",
        "flank tenderness|pyelonephritis|renal angle sore|infected kidney",
    ),
}
SHARED = {
    "chest pain|cp|thoracic ache|sore ribs": "cardiology respiratory gastroenterology",
    "shortness of breath|sob|dyspnoea|breathless": "cardiology respiratory",
    "collapse|syncope|blackout|passed out": "cardiology neurology",
    "dizziness|lightheaded|vertigo|giddy": "cardiology neurology",
    "nausea|queasy|retching|feels sick": "gastroenterology neurology urology",
    "fever|pyrexia|temp 38|hot and shivery": "respiratory urology gastroenterology",
    "weakness|loss of power|reduced grip|limb heavy": "neurology orthopaedics",
    "numbness|paraesthesia|pins and needles|tingling": "neurology orthopaedics",
    "back pain|lumbago|lumbar ache|spine sore": "orthopaedics urology",
    "abdominal pain|abdo discomfort|belly cramps|guarding": "gastroenterology urology",
    "fall|tripped|mechanical tumble|found on floor": "orthopaedics neurology cardiology",
    "weight loss|clothes loose|cachexia|lost kilos": "gastroenterology respiratory urology",
}
SPECIALTIES = tuple(CONCEPTS)
_COMMON_IN = {name: [concept for concept, where in SHARED.items() if name in where.split()] for name in SPECIALTIES}
AROUND = (
    "{}", "c/o {}", "complains of {}", "reports {}", "{} noted", "presents with {}", "{} since yesterday",
    "{} for 3 days", "{} x 2/52", "ongoing {}", "sudden {}", "pc: {}",
)  # fmt: skip
NEGATED = ("no {}", "denies {}", "nil {}", "without {}")
HISTORY = ("hx of {}", "pmh {}", "known {}", "previous {}", "background of {}")
OPENINGS = (
    "pt seen in ed", "thank you for seeing this patient", "triage note", "dear colleague", "{} yo", "{} year old", "s:",
    "reviewed at bedside", "walk in", "brought by ambulance",
)  # fmt: skip
CLOSINGS = (
    "plan: bloods and review", "many thanks", "please advise", "d/w reg", "obs stable", "for senior review",
    "kind regards", "await results", "nbm for now", "",
)  # fmt: skip


@dataclass(frozen=True)
class _Author:
    """Habits of one author; every habit is a list of cumulative shares, to be drawn from by `_pick`."""

    specialty: list[float]
    wordings: dict[str, list[float]]
    around: list[float]
    opening: list[float]
    closing: list[float]
    findings: int
    """Least number of findings in a note; the most is two more."""
    aside: float
    """Probability of a negated finding, and of a history."""
    shortening: int
    """What happens to long words: 0 and 1 nothing, 2 cut to four letters, 3 vowels dropped after the first letter."""
    typing_errors: float
    """Probability that two neighbouring letters of a word change places."""


def generate(seed: int, authors: int, notes: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return about `notes` texts, their labels (n,) int64 in 0..5, and their authors (n,) int64 in 0..authors - 1.

    Every author writes at least `LEAST_NOTES`; the rows stand in the order of the authors.
    """
    shares = rng(seed, "nlp", "sizes").lognormal(0, 0.3, authors)
    counts = np.maximum(np.round(shares / shares.sum() * notes).astype(int), LEAST_NOTES)
    texts: list[str] = []
    labels: list[int] = []
    for number, count in enumerate(counts):
        generator = rng(seed, "nlp", "author", number)
        author = _author(generator)
        for _ in range(count):
            label = _pick(generator, author.specialty)
            texts.append(_note(generator, author, SPECIALTIES[label]))
            if generator.random() < LABEL_NOISE:
                label = (label + 1 + int(generator.integers(len(SPECIALTIES) - 1))) % len(SPECIALTIES)
            labels.append(label)
    return texts, np.array(labels, dtype=np.int64), np.repeat(np.arange(authors, dtype=np.int64), counts)


def _author(generator: np.random.Generator) -> _Author:
    concepts = [concept for own in CONCEPTS.values() for concept in own] + list(SHARED)
    wordings = generator.dirichlet([0.6] * 4, size=len(concepts)).cumsum(axis=1).tolist()

    def habit(options: Sequence[object], concentration: float) -> list[float]:
        return generator.dirichlet([concentration] * len(options)).cumsum().tolist()

    return _Author(
        specialty=habit(SPECIALTIES, 2.0),
        wordings=dict(zip(concepts, wordings, strict=True)),
        around=habit(AROUND, 0.3),
        opening=habit(OPENINGS, 0.1),
        closing=habit(CLOSINGS, 0.1),
        findings=int(generator.integers(2, 5)),
        aside=generator.uniform(0.1, 0.5),
        shortening=int(generator.integers(4)),
        typing_errors=generator.uniform(0, 0.04),
    )


def _pick(generator: np.random.Generator, cumulative: Sequence[float]) -> int:
    # The last share is left out: rounding may leave it a little below 1.
    return bisect(cumulative, generator.random(), hi=len(cumulative) - 1)


def _uniform(generator: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(generator.integers(len(options)))]


def _note(generator: np.random.Generator, author: _Author, specialty: str) -> str:
    def worded(concept: str) -> str:
        return concept.split("|")[_pick(generator, author.wordings[concept])]

    def anything() -> str:
        return worded(_uniform(generator, CONCEPTS[_uniform(generator, SPECIALTIES)]))

    parts = [OPENINGS[_pick(generator, author.opening)].format(generator.integers(18, 95))]
    for _ in range(author.findings + int(generator.integers(3))):
        source = generator.random()
        if source < OWN:
            found = worded(_uniform(generator, CONCEPTS[specialty]))
        elif source < OWN + COMMON:
            found = worded(_uniform(generator, _COMMON_IN[specialty]))
        else:
            found = anything()
        parts.append(AROUND[_pick(generator, author.around)].format(found))
    for asides in (NEGATED, HISTORY):
        if generator.random() < author.aside:
            parts.append(_uniform(generator, asides).format(anything()))
    parts.append(CLOSINGS[_pick(generator, author.closing)])
    return " ".join(_written(generator, author, word) for word in ", ".join(parts).split(" "))


def _written(generator: np.random.Generator, author: _Author, word: str) -> str:
    """Return the word as the author writes it: perhaps shortened, perhaps with two letters swapped."""
    if len(word) > 6 and author.shortening == 2:
        word = word[:4]
    elif len(word) > 6 and author.shortening == 3:
        word = word[0] + "".join(letter for letter in word[1:] if letter not in "aeiou")
    if len(word) > 3 and generator.random() < author.typing_errors:
        at = int(generator.integers(len(word) - 1))
        word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word
