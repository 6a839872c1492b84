"""What the study can be asked for."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, make_dataclass
from typing import Any, get_type_hints

from dllm.utils.parsing import InputError
from memdlm.relay import ARMS
from memdlm.studies.sudoku.grid import SIDES

TAU = 0.15  # the published one
# Where neither --minutes nor --max_steps is given, by preset.
DEFAULT_MINUTES = {"tiny": 3.0}
DEFAULT_STEPS = {"paper": 300_000}
# What may differ between two runs that write into one folder.
_NOT_IDENTITY = ("output", "arms", "seeds", "device", "num_workers")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _above_zero(flag: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise InputError(f"--{flag} must be above 0 and finite, got {value}")


@dataclass(frozen=True)
class Sizes:
    """What a preset decides. The defaults are the published ones (arXiv 2605.22967).

    Raises:
        InputError: a number out of its range.
    """

    side: int = _option(9, "Cells of a row, 4 or 9, of puzzles that are made; files must agree.")
    num_train: int | None = _option(None, "Training puzzles that are made, or read at most, at least 1.")
    num_test: int | None = _option(None, "Test puzzles that are made, or read at most, at least 1.")
    min_blanks: int = _option(40, "Fewest blanks of made puzzles, at least 1.")
    max_blanks: int = _option(56, "Most blanks of made puzzles.")
    hidden_size: int = _option(384, "Width of the model, a multiple of twice the heads.")
    num_layers: int = _option(4, "Layers, at least 1.")
    num_heads: int = _option(6, "Attention heads, at least 1.")
    feed_forward: int = _option(1536, "Width inside the feed-forward part, at least 1.")
    dropout: float = _option(0.1, "Of attention and of what a layer adds, in [0, 1).")
    batch_size: int = _option(512, "Rows of a training step, at least 1.")
    learning_rate: float = _option(5e-4, "After the warm-up, above 0.")
    warmup_steps: int = _option(2000, "Steps of linear warm-up, at least 0; then the rate is constant.")
    ema_decay: float = _option(0.9999, "Of the averaged weights that are evaluated, in [0, 1).")
    save_steps: int = _option(5000, "Steps between checkpoints, at least 1.")
    bf16: bool = _option(True, "Train in bfloat16 mixed precision.")
    num_workers: int = _option(4, "Processes that make training batches, at least 0.")

    def __post_init__(self) -> None:
        counts = ("num_train", "num_test", "min_blanks", "hidden_size", "num_layers", "num_heads", "feed_forward")
        for name in (*counts, "batch_size", "save_steps", "warmup_steps", "num_workers"):
            value, least = self.__dict__[name], 0 if name in ("warmup_steps", "num_workers") else 1
            if value is not None and value < least:
                raise InputError(f"--{name} must be at least {least}, got {value}")
        for name in ("dropout", "ema_decay"):
            if not 0 <= self.__dict__[name] < 1:
                raise InputError(f"--{name} must be in [0, 1), got {self.__dict__[name]}")
        _above_zero("learning_rate", self.learning_rate)
        if self.hidden_size % (2 * self.num_heads):
            raise InputError(f"--hidden_size {self.hidden_size} must be a multiple of twice --num_heads")
        if self.side not in SIDES:
            raise InputError(f"--side must be one of {', '.join(map(str, SIDES))}, got {self.side}")
        if not self.min_blanks <= self.max_blanks < self.side**2:
            raise InputError(
                f"--max_blanks must lie between --min_blanks {self.min_blanks} and {self.side**2 - 1}, got "
                f"{self.max_blanks}"
            )


PRESETS = {
    # Learns within a few minutes on one core.
    "tiny": Sizes(
        side=4,
        num_train=8000,
        num_test=500,
        min_blanks=8,
        max_blanks=11,
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        feed_forward=256,
        dropout=0.0,
        batch_size=64,
        learning_rate=1e-3,
        warmup_steps=100,
        ema_decay=0.99,
        save_steps=500,
        bf16=False,
        num_workers=0,
    ),
    # One 80 GB GPU for about 36 hours for each arm and seed.
    "paper": Sizes(),
}
_HINTS = get_type_hints(Sizes)
# One flag per field of Sizes, so that it is declared once.
_SizeFlags = make_dataclass(
    "_SizeFlags",
    [
        (f.name, _HINTS[f.name] | None, _option(None, f.metadata["help"] + " None: as the preset says."))
        for f in dataclasses.fields(Sizes)
    ],
    kw_only=True,
)
_SizeFlags.__module__ = __name__


@dataclass
class StudyOptions(_SizeFlags):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
    """What is trained and measured; with a flag for each field of `Sizes`.

    Raises:
        InputError: an unknown arm or preset, a list that is none, a number out of its range, a pair that cannot take
            effect together.
    """

    output: str = field(metadata={"help": "Folder of results.json, table.md, accuracy_over_nfe.png and the models."})
    arms: str = _option("all", f"Arms, separated by commas: {', '.join(ARMS)}; or all.")
    seeds: str = _option("1,2,3", "Seeds of weights, data order and masks, separated by commas, each at least 0.")
    preset: str = _option("tiny", f"Sizes and training: {' or '.join(PRESETS)}.")
    minutes: float | None = _option(
        None,
        "Minutes of training for each arm and seed, above 0. None: no limit if --max_steps is given, else "
        f"{DEFAULT_MINUTES['tiny']:g} (tiny) or no limit (paper).",
    )
    max_steps: int | None = _option(
        None,
        "Most optimizer steps for each arm and seed, at least 1. None: no limit if --minutes is given, else no limit "
        f"(tiny) or {DEFAULT_STEPS['paper']} (paper).",
    )
    puzzles: str | None = _option(None, "File of test puzzles, one per line or csv. None: made from --data_seed.")
    train_puzzles: str | None = _option(None, "File of training puzzles. None: made from --data_seed.")
    skip_bad: bool = _option(False, "Leave out puzzles without exactly one solution instead of refusing the file.")
    prove_train: bool = _option(
        True, "Prove the training file's puzzles unique. False: believe stated solutions (for millions of puzzles)."
    )
    data_seed: int = _option(0, "Seed of made puzzles, at least 0.")
    tie_embeddings: bool = _option(True, "The embedding is the head.")
    num_unroll: int = _option(2, "K, forwards of a training step of the arms with a rollout, at least 1.")
    bptt_window: int | None = _option(None, "Forwards that gradients of the arm relay flow through, 1 to K. None: K.")
    tau: float = _option(TAU, "Summed uncertainty that a step may reveal, in training and decoding, above 0.")
    tau_jitter: float = _option(0.1, "Standard deviation that is added to tau in training, at least 0.")
    tau_sweep: str = _option("0.05,0.1,0.15,0.2,0.25", "Values of tau to decode with, separated by commas.")
    eval_batch_size: int = _option(512, "Puzzles decoded at a time, at least 1; the batch-wide NFE depends on it.")
    device: str | None = _option(None, "cpu, or None: the GPU if there is one.")

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise InputError(f"--preset {self.preset!r} is unknown: choose from {', '.join(PRESETS)}")
        if self.minutes is None and self.max_steps is None:
            self.minutes, self.max_steps = DEFAULT_MINUTES.get(self.preset), DEFAULT_STEPS.get(self.preset)
        self._check_numbers()
        self._check_pairs()

    @property
    def sizes(self) -> Sizes:
        """The preset, with what the flags say otherwise."""
        given = {f.name: self.__dict__[f.name] for f in dataclasses.fields(Sizes)}
        given = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(PRESETS[self.preset], **given)

    def _check_numbers(self) -> None:
        for name in ("data_seed", "max_steps", "num_unroll", "bptt_window", "eval_batch_size"):
            value, least = self.__dict__[name], 0 if name == "data_seed" else 1
            if value is not None and value < least:
                raise InputError(f"--{name} must be at least {least}, got {value}")
        for name in ("minutes", "tau"):
            _above_zero(name, self.__dict__[name])
        if not 0 <= self.tau_jitter < math.inf:
            raise InputError(f"--tau_jitter must be at least 0 and finite, got {self.tau_jitter}")
        if self.device not in (None, "cpu"):
            raise InputError(f"--device {self.device!r}: give cpu, or drop it to use the GPU if there is one")

    def _check_pairs(self) -> None:
        sizes, arms = self.sizes, self.arm_list()
        self.seed_list()
        self.taus()
        if self.bptt_window is not None and self.bptt_window > self.num_unroll:
            raise InputError(f"--bptt_window {self.bptt_window} is more than --num_unroll {self.num_unroll}")
        if self.bptt_window is not None and "relay" not in arms:
            raise InputError("--bptt_window has no effect without the arm relay: drop it")
        if not self.prove_train and self.train_puzzles is None:
            raise InputError("--prove_train False has no effect without --train_puzzles: drop it")
        if self.skip_bad and self.train_puzzles is None and self.puzzles is None:
            raise InputError("--skip_bad has no effect without --puzzles or --train_puzzles: drop it")
        for flag, path, number in (
            ("train", self.train_puzzles, sizes.num_train),
            ("test", self.puzzles, sizes.num_test),
        ):
            if path is None and number is None:
                file = "--train_puzzles" if flag == "train" else "--puzzles"
                raise InputError(f"give {file} FILE, or --num_{flag} for puzzles that are made")

    def arm_list(self) -> list[str]:
        """The arms, in the order of `memdlm.relay.ARMS`.

        Raises:
            InputError: an unknown one, or none.
        """
        asked = list(ARMS) if self.arms.strip() == "all" else _listed("arms", self.arms)
        unknown = [name for name in asked if name not in ARMS]
        if unknown:
            raise InputError(f"--arms {unknown[0]!r} is unknown: choose from {', '.join(ARMS)}, or all")
        return [name for name in ARMS if name in asked]

    def seed_list(self) -> list[int]:
        """The seeds, without repetition.

        Raises:
            InputError: something that is no seed, or none.
        """
        words = _listed("seeds", self.seeds)
        wrong = [word for word in words if not word.isdecimal()]
        if wrong:
            raise InputError(f"--seeds {wrong[0]!r} is no whole number of at least 0; the form is 1,2,3")
        return list(dict.fromkeys(int(word) for word in words))

    def taus(self) -> list[float]:
        """The values of tau to decode with, ascending, `tau` among them.

        Raises:
            InputError: something that is no number above 0.
        """
        try:
            values = {float(word) for word in _listed("tau_sweep", self.tau_sweep)} | {self.tau}
        except ValueError as error:
            raise InputError(f"--tau_sweep {self.tau_sweep!r}: {error}; the form is 0.05,0.15") from error
        for value in values:
            _above_zero("tau_sweep", value)
        return sorted(values)

    def identity(self) -> dict[str, Any]:
        """Everything that decides the numbers of an arm and a seed."""
        values = dataclasses.asdict(self) | dataclasses.asdict(self.sizes)
        return {name: value for name, value in values.items() if name not in _NOT_IDENTITY}


def _listed(flag: str, text: str) -> list[str]:
    words = [part.strip() for part in text.split(",") if part.strip()]
    if not words:
        raise InputError(f"--{flag} is empty: name at least one")
    return words
