"""How answers of the long-context tasks are scored: `process_results` of their YAML files.

Every metric comes once for all documents (`acc`) and once per length (`acc@1024`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_CONTROL = re.compile(r"[\x00-\x1f]")


def clean(answer: str) -> str:
    """The answer without spaces around it, in small letters; control characters become line breaks."""
    return _CONTROL.sub("\n", answer.strip()).strip().lower()


def babilong_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """acc: 1 if the target stands in the answer (lm-eval's babilong tasks); acc_strict: 1 if, besides, no other label
    stands in its first sentence, labels in the question aside (the benchmark's authors, arXiv 2406.10149)."""
    answer, target = clean(results[0]), doc["target"].lower()
    named = {label for label in map(str.lower, doc["labels"]) if label in answer.split(".")[0]}
    named -= {label for label in named if label in doc["question"].lower()}
    acc = float(target in answer)
    return {"acc": acc, "acc_strict": float(named == {target}), f"acc@{doc['length']}": acc}


def ruler_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """acc: share of the wanted strings that stand in the answer (RULER's string_match_all, arXiv 2404.06654)."""
    answer = clean(results[0])
    acc = sum(wanted.lower() in answer for wanted in doc["outputs"]) / len(doc["outputs"])
    return {"acc": acc, f"acc@{doc['length']}": acc}
