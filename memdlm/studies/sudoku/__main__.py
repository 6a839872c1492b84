"""Four ways to train one Sudoku solver, side by side: masks at random, states of its own decoding, and these with the
hidden state carried along, without or with the gradient through it (Relay, arXiv 2605.22967).

    python -m memdlm.studies.sudoku --output runs/sudoku --preset tiny --arms all --seeds 1,2,3 --minutes 3

OUTPUT gets results.json, table.md, accuracy_over_nfe.png and one folder per arm and seed with the averaged model. The
same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

from rich.console import Console

from dllm.utils.parsing import one_line_errors, parse_args
from memdlm.studies.sudoku.report import markdown
from memdlm.studies.sudoku.settings import StudyOptions
from memdlm.studies.sudoku.study import PICTURE_FILE, RESULTS_FILE, TABLE_FILE, run_study


def main() -> None:
    """The command line."""
    (options,) = parse_args(StudyOptions)
    console = Console()
    contents = run_study(options, console)
    console.print(markdown(contents), markup=False, highlight=False, soft_wrap=True)
    console.print(f"{RESULTS_FILE}, {TABLE_FILE} and {PICTURE_FILE} are in {options.output}/", highlight=False)


if __name__ == "__main__":
    with one_line_errors():
        main()
