"""Trains every scenario of engine_scenarios.py under every engine and prints the support matrix as a Markdown table.

    python tests/distributed/support_matrix.py [--write]

A cell is the largest relative difference of a logged loss from one process on the same global batch (from DDP, where
one process has no counterpart). `--write` puts the table into README.md and docs/engines.md.
"""

import argparse
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from engine_scenarios import AGAINST_DDP, ENGINES, REFUSED, ROOT, SCENARIOS, loss_difference, runner

BEGIN, END = "<!-- support matrix -->", "<!-- end of support matrix -->"


def make_table(folder: pathlib.Path) -> str:
    """The table; takes minutes."""
    seen = runner(folder)
    rows = [f"| | {' | '.join(ENGINES.values())} |", "|---" * (len(ENGINES) + 1) + "|"]
    for name in SCENARIOS:
        cells = []
        for engine in ENGINES:
            if (engine, name) in REFUSED:
                cells.append("refused")
                continue
            expected = seen("ddp" if name in AGAINST_DDP else None)[0][name]
            cells.append(f"{loss_difference(seen(engine)[0][name], expected):.0e}".replace("0e+00", "0"))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def write(table: str, file: pathlib.Path) -> None:
    """Replaces what stands between the two marks in `file`."""
    text = file.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{file} lacks the lines {BEGIN} and {END}: put them where the table belongs")
    file.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into README.md and docs/engines.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = make_table(pathlib.Path(folder))
    print(table)
    for file in ("README.md", "docs/engines.md") if arguments.write else ():
        write(table, ROOT / file)


if __name__ == "__main__":
    main()
