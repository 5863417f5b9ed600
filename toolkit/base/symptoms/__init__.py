"""The most common error texts of other libraries. For each text, a ``Symptom`` gives the remedy,
and the check that finds the problem before the run.

``find_symptoms`` searches a traceback or a log. ``envcheck explain -`` prints the result, and
``toolkit`` commands use it to explain errors of other libraries. The texts are those of vLLM 0.8 to
0.31, torch 2.6 to 2.13, the driver, NCCL, containers and Slurm. tests/contract fails if upstream
changes a text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.symptoms import consequences, devices, driver, host, memory, model, software
from toolkit.base.symptoms.pasted import condense, error_lines, group_by_rank
from toolkit.base.symptoms.symptom import Symptom, words_in

if TYPE_CHECKING:
    from toolkit.base.symptoms.symptom import Entry

__all__ = ["CONSEQUENCES", "SYMPTOMS", "TEXTS", "Symptom", "find_symptoms", "similar_symptoms"]

# The most specific symptoms come first, the general ones last.
_ENTRIES: tuple[Entry, ...] = (
    *memory.ENTRIES,
    *driver.ENTRIES,
    *devices.ENTRIES,
    *software.ENTRIES,
    *host.ENTRIES,
    *model.ENTRIES,
)
_ALL_ENTRIES = (*_ENTRIES, *consequences.ENTRIES)
SYMPTOMS: tuple[Symptom, ...] = tuple(entry.symptom for entry in _ALL_ENTRIES)
CONSEQUENCES = frozenset(entry.symptom.id for entry in consequences.ENTRIES)
TEXTS: dict[str, tuple[str, ...]] = {
    entry.symptom.id: tuple(one.text for one in entry.texts) for entry in _ALL_ENTRIES
}
# In a text copied from a screen, line breaks may split words. Only this many characters at the end
# of a text are also searched with all line breaks removed.
MAX_REJOINED_CHARACTERS = 100_000
_MIN_SHARED_WORDS = 0.5  # the least share of a known text's words that must occur
_MAX_SIMILAR = 3


def find_symptoms(text: str) -> list[Symptom]:
    """Return the known failures in a pasted traceback or log, the most specific first; empty if
    there are none. A failure that only follows another failure is returned only if no other failure
    is found.

    Colours, log prefixes, mixed output of several ranks, and line breaks (also inside a word) are
    ignored.
    """
    wrapped, joined = group_by_rank(condense(text))
    forms = [(form, form.lower()) for form in (wrapped, joined[-MAX_REJOINED_CHARACTERS:])]
    forms = [(form if len(form) == len(lowered) else lowered, lowered) for form, lowered in forms]
    return _find_in_entries(_ENTRIES, forms) or _find_in_entries(consequences.ENTRIES, forms)


def _find_in_entries(entries: tuple[Entry, ...], forms: list[tuple[str, str]]) -> list[Symptom]:
    symptoms: dict[str, Symptom] = {}
    for entry in entries:
        if entry.unless & symptoms.keys():
            continue
        for form, lowered in forms:
            if symptom := entry.find(form, lowered):
                symptoms[entry.symptom.id] = symptom
                break
    return list(symptoms.values())


def similar_symptoms(text: str) -> list[Symptom]:
    """Return at most three symptoms for a text without a known error, the most similar first. These
    are the symptoms whose texts share the most words with the error lines of the text.
    """
    lines = [words_in(line) for line in error_lines(condense(text))]
    scores: dict[Symptom, float] = {}
    for entry in _ALL_ENTRIES:
        for pattern in entry.texts:
            words = pattern.words
            if len(words) < 2:
                continue
            share = max((len(words & line) / len(words) for line in lines), default=0.0)
            scores[entry.symptom] = max(share, scores.get(entry.symptom, 0.0))
    by_score = sorted(scores, key=lambda symptom: -scores[symptom])
    return [symptom for symptom in by_score if scores[symptom] >= _MIN_SHARED_WORDS][:_MAX_SIMILAR]
