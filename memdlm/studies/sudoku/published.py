"""Numbers that the authors of Relay (arXiv 2605.22967) published for the setting of the preset `paper`."""

from __future__ import annotations

# Exact match in percent, (mean, standard deviation) over three seeds: table 1 of the paper, as quoted by a third
# party's reproduction. By arm, then tied embeddings.
EXACT_MATCH: dict[str, dict[bool, tuple[float, float]]] = {
    "mask_uniform": {True: (20.27, 0.25), False: (18.58, 2.17)},
    "rollout": {True: (38.70, 2.09), False: (35.55, 1.15)},
    "relay_sg": {True: (58.42, 0.11), False: (59.45, 3.06)},
    "relay": {True: (62.67, 2.40), False: (62.07, 0.70)},
}
# Ablation of the decoder, one seed: tau -> (batch-wide NFE at batch 512, token accuracy in percent, exact match in
# percent). By arm and tied embeddings.
SWEEP: dict[tuple[str, bool], dict[float, tuple[float, float, float]]] = {
    ("relay", True): {
        0.05: (26.70, 85.28, 74.45),
        0.10: (23.23, 83.75, 70.07),
        0.15: (21.01, 82.26, 65.80),
        0.20: (19.05, 80.70, 61.52),
        0.25: (17.72, 79.25, 57.40),
    },
    ("relay", False): {
        0.05: (29.65, 85.25, 73.90),
        0.10: (25.02, 83.63, 69.10),
        0.15: (22.24, 82.04, 64.31),
        0.20: (20.16, 80.49, 59.74),
        0.25: (18.54, 79.06, 55.46),
    },
    ("relay_sg", False): {
        0.05: (29.24, 83.58, 70.35),
        0.10: (24.65, 81.89, 65.23),
        0.15: (21.98, 80.33, 60.51),
        0.20: (19.96, 78.79, 55.91),
        0.25: (18.33, 77.40, 51.65),
    },
    ("mask_uniform", False): {
        0.05: (37.43, 63.27, 32.57),
        0.10: (35.58, 63.15, 31.12),
        0.15: (33.32, 62.64, 28.47),
        0.20: (30.43, 61.96, 25.65),
        0.25: (27.64, 61.37, 23.13),
    },
}
