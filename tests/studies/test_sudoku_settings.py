"""Flags of the Sudoku study: presets, what makes two studies the same, bad input."""

import dataclasses

import pytest

from dllm.utils.parsing import InputError, parse_args
from memdlm.studies.sudoku.settings import PRESETS, Sizes, StudyOptions

# Another value than the default for every flag; two where a flag cannot stand alone.
OTHERS = {
    "output": "other",
    "arms": "relay",
    "seeds": "4",
    "preset": "paper",
    "minutes": 2.5,
    "max_steps": 7,
    "puzzles": "test.txt",
    "train_puzzles": "train.txt",
    "skip_bad": True,
    "prove_train": False,
    "data_seed": 3,
    "tie_embeddings": False,
    "num_unroll": 3,
    "bptt_window": 1,
    "tau": 0.3,
    "tau_jitter": 0.0,
    "tau_sweep": "0.5",
    "eval_batch_size": 5,
    "device": "cpu",
    "side": 9,
    "num_train": 10,
    "num_test": 11,
    "min_blanks": 2,
    "max_blanks": 12,
    "hidden_size": 96,
    "num_layers": 1,
    "num_heads": 2,
    "feed_forward": 8,
    "dropout": 0.2,
    "batch_size": 3,
    "learning_rate": 0.1,
    "warmup_steps": 0,
    "ema_decay": 0.5,
    "save_steps": 9,
    "bf16": True,
    "num_workers": 2,
}
FILES = {"puzzles": "a.txt", "train_puzzles": "b.txt"}


def test_every_flag_is_accepted_and_decides_what_is_the_same_study():
    assert set(OTHERS) == {field.name for field in dataclasses.fields(StudyOptions)}
    base = StudyOptions(output="out", **FILES).identity()
    for name, value in OTHERS.items():
        options = StudyOptions(**{"output": "out", **FILES, name: value})
        changed = {key for key in base if options.identity()[key] != base[key]}
        if name in ("output", "arms", "seeds", "device", "num_workers"):
            assert not changed, name
        elif name == "preset":
            assert {"preset", "hidden_size", "max_steps", "minutes"} <= changed
        else:
            assert changed - {"minutes"} == {name} - {"minutes"} and changed, name


def test_presets_fill_in_what_no_flag_says():
    tiny, paper = StudyOptions(output="o"), StudyOptions(output="o", preset="paper", **FILES, batch_size=64)
    assert tiny.sizes == PRESETS["tiny"] and (tiny.minutes, tiny.max_steps) == (3.0, None)
    assert paper.sizes == dataclasses.replace(Sizes(), batch_size=64)
    assert (paper.minutes, paper.max_steps) == (None, 300_000)
    assert StudyOptions(output="o", max_steps=5).minutes is None
    assert StudyOptions(output="o", preset="paper", minutes=1, **FILES).max_steps is None


def test_the_paper_preset_is_the_published_setting():
    sizes = PRESETS["paper"]
    assert (sizes.hidden_size, sizes.num_layers, sizes.num_heads, sizes.feed_forward) == (384, 4, 6, 1536)
    assert (sizes.batch_size, sizes.learning_rate, sizes.warmup_steps, sizes.ema_decay) == (512, 5e-4, 2000, 0.9999)
    assert (sizes.dropout, sizes.bf16, StudyOptions(output="o").tau) == (0.1, True, 0.15)


def test_lists_are_read():
    options = StudyOptions(output="o", arms="relay, rollout", seeds="3,1,3", tau_sweep="0.2,0.05", tau=0.1)
    assert options.arm_list() == ["rollout", "relay"]
    assert options.seed_list() == [3, 1]
    assert options.taus() == [0.05, 0.1, 0.2]
    assert StudyOptions(output="o").arm_list() == ["mask_uniform", "rollout", "relay_sg", "relay"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--preset big", "--preset 'big' is unknown: choose from tiny, paper"),
        ("--arms relay,mlm", "--arms 'mlm' is unknown"),
        ("--arms ,", "--arms is empty"),
        ("--seeds 1,x", "--seeds 'x' is no whole number"),
        ("--seeds -1", "--seeds '-1' is no whole number"),
        ("--tau_sweep 0.1,a", "--tau_sweep '0.1,a'"),
        ("--tau_sweep 0", "--tau_sweep must be above 0"),
        ("--tau nan", "--tau must be above 0"),
        ("--tau_jitter -1", "--tau_jitter must be at least 0"),
        ("--minutes 0", "--minutes must be above 0"),
        ("--max_steps 0", "--max_steps must be at least 1"),
        ("--num_unroll 0", "--num_unroll must be at least 1"),
        ("--bptt_window 3", "--bptt_window 3 is more than --num_unroll 2"),
        ("--bptt_window 1 --arms rollout", "no effect without the arm relay"),
        ("--side 5", "--side must be one of 4, 9"),
        ("--max_blanks 16", "--max_blanks must lie between --min_blanks 8 and 15"),
        ("--min_blanks 12", "--max_blanks must lie between"),
        ("--hidden_size 60", "--hidden_size 60 must be a multiple"),
        ("--dropout 1", "--dropout must be in"),
        ("--ema_decay 1", "--ema_decay must be in"),
        ("--learning_rate 0", "--learning_rate must be above 0"),
        ("--warmup_steps -1", "--warmup_steps must be at least 0"),
        ("--batch_size 0", "--batch_size must be at least 1"),
        ("--data_seed -1", "--data_seed must be at least 0"),
        ("--skip_bad True", "--skip_bad has no effect without"),
        ("--prove_train False", "--prove_train False has no effect without"),
        ("--preset paper", "give --train_puzzles FILE, or --num_train"),
        ("--preset paper --num_train 5", "give --puzzles FILE, or --num_test"),
        ("--device cuda:7", "--device 'cuda:7'"),
        ("--tua 0.1", "unknown flag --tua; the closest known one is --tau"),
    ],
)
def test_bad_flags_end_with_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        parse_args(StudyOptions, args=["--output", "o", *flags.split()])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1


def test_sizes_are_checked_without_flags_too():
    with pytest.raises(InputError, match="--num_layers must be at least 1"):
        Sizes(num_layers=0)
