"""What the study found: tables in Markdown and a picture of accuracy over forwards."""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from memdlm.relay import ARMS
from memdlm.studies.sudoku.published import EXACT_MATCH, SWEEP
from memdlm.studies.sudoku.puzzles import TIERS
from memdlm.studies.sudoku.settings import DEFAULT_STEPS, PRESETS, TAU

Cell = dict[str, Any]  # what `memdlm.studies.sudoku.run.run_cell` gives

# Okabe and Ito's colours, which all common kinds of colour vision tell apart; markers and lines differ too.
STYLES: dict[str, dict[str, Any]] = {
    "mask_uniform": {"color": "#000000", "marker": "o", "linestyle": ":"},
    "rollout": {"color": "#E69F00", "marker": "s", "linestyle": "-."},
    "relay_sg": {"color": "#0072B2", "marker": "^", "linestyle": "--"},
    "relay": {"color": "#D55E00", "marker": "D", "linestyle": "-"},
}
# (key of an entry, heading, factor, digits)
_MEASURES = (
    ("exact", "exact match, %", 100, 1),
    ("token_accuracy", "token accuracy, %", 100, 1),
    ("legal", "legal, %", 100, 1),
    ("nfe", "NFE per puzzle", 1, 2),
    ("batch_nfe", "batch-wide NFE", 1, 2),
)


def spread(values: Sequence[float], factor: float = 1, digits: int = 2) -> str:
    """ "mean +- standard deviation [least, greatest]" of values times `factor`; the mean alone of one value, "-" of
    none."""
    if not values:
        return "-"
    scaled = [factor * value for value in values]
    text = f"{statistics.fmean(scaled):.{digits}f}"
    if len(scaled) == 1:
        return text
    return f"{text} +- {statistics.stdev(scaled):.{digits}f} [{min(scaled):.{digits}f}, {max(scaled):.{digits}f}]"


def at_tau(cell: Cell, tau: float, entries: str = "by_tau") -> dict[str, Any]:
    """The entry of a cell at one tau."""
    return next(entry for entry in cell[entries] if entry["tau"] == tau)


def markdown(results: dict[str, Any]) -> str:
    """The report: the arms side by side, the sweep over tau, difficulty, the control, and what was published.

    Args:
        results: contents of results.json.
    """
    settings, cells = results["settings"], results["cells"]
    arms = [arm for arm in ARMS if any(cell["arm"] == arm for cell in cells)]
    parts = [_heading(results), _arms(cells, arms, settings), _sweep(cells, arms), _tiers(cells, arms, settings["tau"])]
    control = _control(cells, arms, settings["tau"])
    parts += [control] if control else []
    parts += [_published(settings)] if settings["preset"] == "paper" else []
    return "\n".join(parts)


def _heading(results: dict[str, Any]) -> str:
    settings, data = results["settings"], results["data"]
    seeds = sorted({cell["seed"] for cell in results["cells"]})
    tiers = ", ".join(f"{name} {number}" for name, number in data["test_tiers"].items())
    limits = [f"{settings['minutes']:g} minutes"] if settings["minutes"] is not None else []
    limits += [f"{settings['max_steps']} steps"] if settings["max_steps"] is not None else []
    return (
        f"# Sudoku: four ways to train one denoiser\n\n"
        f"Preset {settings['preset']}, {settings['side']}x{settings['side']} puzzles; {data['num_train']} to train on, "
        f"{data['num_test']} to test on, none in both ({tiers}). At most {' and '.join(limits)} for each arm and seed; "
        f"seeds {', '.join(map(str, seeds))}. Averaged weights. Values are mean +- standard deviation "
        f"[least, greatest] over the seeds.\n\n"
        f"NFE per puzzle counts the forwards in which a puzzle still had a blank. The batch-wide NFE is the published "
        f"count: all forwards of a batch ({settings['eval_batch_size']} puzzles at most) for every puzzle in it, and "
        f"one more.\n"
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _of(cells: Sequence[Cell], arm: str, value: Callable[[Cell], float]) -> list[float]:
    return [value(cell) for cell in cells if cell["arm"] == arm]


def _measures(cells: Sequence[Cell], arm: str, tau: float) -> list[str]:
    return [
        spread(_of(cells, arm, lambda cell, key=key: at_tau(cell, tau)[key]), factor, digits)
        for key, _, factor, digits in _MEASURES
    ]


def _arms(cells: Sequence[Cell], arms: Sequence[str], settings: dict[str, Any]) -> str:
    tau = settings["tau"]
    headings = ["arm", "seeds", *(heading for _, heading, _, _ in _MEASURES), "steps", "minutes of training"]
    rows = []
    for arm in arms:
        own = _of(cells, arm, lambda cell: cell["seed"])
        steps = spread(_of(cells, arm, lambda cell: cell["steps"]), digits=0)
        minutes = spread(_of(cells, arm, lambda cell: cell["train_seconds"]), 1 / 60, 1)
        rows.append([arm, str(len(own)), *_measures(cells, arm, tau), steps, minutes])
    return f"## Arms, tau = {tau:g}\n\n" + _table(headings, rows)


def _sweep(cells: Sequence[Cell], arms: Sequence[str]) -> str:
    taus = [entry["tau"] for entry in cells[0]["by_tau"]]
    headings = ["tau", "arm", *(heading for _, heading, _, _ in _MEASURES)]
    rows = [[f"{tau:g}", arm, *_measures(cells, arm, tau)] for tau in taus for arm in arms]
    return "## Summed uncertainty per step\n\n" + _table(headings, rows)


def _tiers(cells: Sequence[Cell], arms: Sequence[str], tau: float) -> str:
    present = at_tau(cells[0], tau)["by_tier"]
    rows = []
    for tier in TIERS:
        if tier not in present:
            continue
        for arm in arms:
            entries = [at_tau(cell, tau)["by_tier"][tier] for cell in cells if cell["arm"] == arm]
            columns = [
                spread([entry[key] for entry in entries], factor, digits)
                for key, _, factor, digits in _MEASURES
                if key != "batch_nfe"
            ]
            rows.append([tier, str(present[tier]["num_puzzles"]), arm, *columns])
    headings = ["tier", "puzzles", "arm", *(heading for key, heading, _, _ in _MEASURES if key != "batch_nfe")]
    text = "Tiers go by the guesses that a solver needs which fills in singles by itself.\n\n"
    return f"## Difficulty, tau = {tau:g}\n\n{text}" + _table(headings, rows)


def _control(cells: Sequence[Cell], arms: Sequence[str], tau: float) -> str:
    rows = []
    for arm in arms:
        own = [cell for cell in cells if cell["arm"] == arm and "without_state" in cell]
        if not own:
            continue
        for name, entries in (("as trained", "by_tau"), ("state zeroed", "without_state")):
            found = [at_tau(cell, tau, entries) for cell in own]
            rows.append(
                [arm, name]
                + [spread([entry[key] for entry in found], factor, digits) for key, _, factor, digits in _MEASURES]
            )
    if not rows:
        return ""
    text = (
        "The same weights, decoded with every forward getting what a first one gets: what is lost is what the carried "
        "state does in decoding; what remains beyond the arm rollout is what training with it did to the weights.\n\n"
    )
    headings = ["arm", "decoding", *(heading for _, heading, _, _ in _MEASURES)]
    return f"## Control: without the carried state, tau = {tau:g}\n\n{text}" + _table(headings, rows)


def _published(settings: dict[str, Any]) -> str:
    tied = settings["tie_embeddings"]
    main = [[arm, f"{mean:.2f} +- {deviation:.2f}"] for arm, (mean, deviation) in _published_arms(tied)]
    sweep = [
        [f"{tau:g}", arm, f"{nfe:.2f}", f"{accuracy:.2f}", f"{exact:.2f}"]
        for (arm, is_tied), entries in SWEEP.items()
        if is_tied == tied
        for tau, (nfe, accuracy, exact) in entries.items()
    ]
    return (
        f"## Published (not measured here), {'tied' if tied else 'untied'} embeddings\n\n"
        f"Relay, arXiv 2605.22967: Sudoku-Extreme, 300,000 steps, batch 512. {_differences(settings)}\n\n"
        "Three seeds, tau = 0.15:\n\n"
        + _table(["arm", "exact match, %"], main)
        + "\nOne seed, batches of 512:\n\n"
        + _table(["tau", "arm", "batch-wide NFE", "token accuracy, %", "exact match, %"], sweep)
    )


def _differences(settings: dict[str, Any]) -> str:
    """In what this study is not the published one."""
    sizes = dataclasses.asdict(PRESETS["paper"])
    # What does not describe the setting: data are named below, the rest changes no number.
    for name in ("num_train", "num_test", "min_blanks", "max_blanks", "num_workers", "save_steps"):
        del sizes[name]
    wanted = {**sizes, "max_steps": DEFAULT_STEPS["paper"], "minutes": None, "num_unroll": 2, "bptt_window": None}
    wanted |= {"tau": TAU, "tau_jitter": 0.1}
    found = [f"{name} {settings[name]}" for name, value in wanted.items() if settings[name] != value]
    data = "made puzzles" if settings["train_puzzles"] is None else f"trained on {settings['train_puzzles']}"
    return f"Different here: {', '.join([*found, data])}."


def _published_arms(tied: bool) -> list[tuple[str, tuple[float, float]]]:
    return [(arm, EXACT_MATCH[arm][tied]) for arm in ARMS]


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """Writes a PNG: exact match over NFE per puzzle, one line per arm through its values of tau, bars of one standard
    deviation over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cells = results["cells"]
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    for arm in ARMS:
        own = [cell for cell in cells if cell["arm"] == arm]
        if not own:
            continue
        taus = [entry["tau"] for entry in own[0]["by_tau"]]
        nfe = [[at_tau(cell, tau)["nfe"] for cell in own] for tau in taus]
        exact = [[100 * at_tau(cell, tau)["exact"] for cell in own] for tau in taus]
        axis.errorbar(
            [statistics.fmean(values) for values in nfe],
            [statistics.fmean(values) for values in exact],
            xerr=[_deviation(values) for values in nfe],
            yerr=[_deviation(values) for values in exact],
            label=f"{arm} (n = {len(own)} seeds)" if len(own) > 1 else arm,
            capsize=2,
            elinewidth=0.7,
            **STYLES[arm],
        )
    taus = ", ".join(f"{entry['tau']:g}" for entry in cells[0]["by_tau"])
    axis.set_xlabel("forwards per puzzle (NFE)")
    axis.set_ylabel("puzzles solved exactly (%)")
    side = results["settings"]["side"]
    axis.set_title(
        f"{side}x{side} Sudoku, {results['data']['num_test']} test puzzles; bars: one standard deviation over seeds\n"
        f"tau from right to left: {taus}",
        fontsize=11,
    )
    axis.grid(alpha=0.3)
    axis.legend()
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=150, format="png")
    plt.close(figure)
    partial.replace(path)


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
