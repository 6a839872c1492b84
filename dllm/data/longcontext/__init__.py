"""Long-context tasks for lm-eval that need no download: bAbI facts in a text (BABILong), needles and lists (RULER)."""

from dllm.data.longcontext.babilong import babilong_dataset
from dllm.data.longcontext.offline import OFFLINE_TWINS, OfflineTwin, find_offline_twin
from dllm.data.longcontext.ruler import ruler_dataset
from dllm.data.longcontext.settings import LongContextSettings, parse_lengths

__all__ = [
    "OFFLINE_TWINS",
    "LongContextSettings",
    "OfflineTwin",
    "babilong_dataset",
    "find_offline_twin",
    "parse_lengths",
    "ruler_dataset",
]
