"""Which built-in tasks of lm-eval need the network, and which of ours ask the same without it."""

from __future__ import annotations

import fnmatch
from typing import NamedTuple


class OfflineTwin(NamedTuple):
    """What a built-in task needs from the network, and our task that does the same offline (None: there is none)."""

    resource: str
    task: str | None


_BABILONG = "the data set RMT-team/babilong-1k-samples on the Hugging Face Hub"
_ESSAYS = "the data set baber/paul_graham_essays on the Hugging Face Hub"
_LONGBENCH = "the data set Xnhyacinth/LongBench on the Hugging Face Hub"
_CODE_EVAL = "the metric code_eval on the Hugging Face Hub, besides the data set"

# Pattern of a built-in name -> what it needs; the first pattern that matches counts.
OFFLINE_TWINS: dict[str, OfflineTwin] = {
    "babilong_longctx": OfflineTwin(_BABILONG, "memdlm_babilong"),
    "babilong": OfflineTwin(_BABILONG, "memdlm_babilong"),
    **{f"babilong_qa{n}": OfflineTwin(_BABILONG, f"memdlm_babilong_qa{n}") for n in range(1, 6)},
    "babilong_qa*": OfflineTwin(_BABILONG, None),
    "ruler": OfflineTwin(f"{_ESSAYS}, SQuAD and HotpotQA", "memdlm_ruler"),
    "niah_single_[23]": OfflineTwin(_ESSAYS, "memdlm_ruler_niah_single"),
    "niah_multikey_1": OfflineTwin(_ESSAYS, "memdlm_ruler_niah_multikey"),
    "niah_multivalue": OfflineTwin(_ESSAYS, "memdlm_ruler_niah_multivalue"),
    "niah_multiquery": OfflineTwin(_ESSAYS, None),
    "ruler_qa_squad": OfflineTwin("the file of SQuAD 2.0 at rajpurkar.github.io", None),
    "ruler_qa_hotpot": OfflineTwin("the file of HotpotQA (namlh2004/hotpotqa) on the Hugging Face Hub", None),
    "longbench2*": OfflineTwin("the data set LongBench-v2 on the Hugging Face Hub", None),
    "longbench*": OfflineTwin(_LONGBENCH, None),
    "humaneval*": OfflineTwin(_CODE_EVAL, None),
    "mbpp*": OfflineTwin(_CODE_EVAL, None),
}


def find_offline_twin(task: str) -> OfflineTwin | None:
    """The entry of a built-in task or group, or None where the table has none for it."""
    for pattern, twin in OFFLINE_TWINS.items():
        if fnmatch.fnmatchcase(task, pattern):
            return twin
    return None
