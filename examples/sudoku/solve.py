"""Solve puzzles with a model of the study, and show them.

    python examples/sudoku/solve.py --model_name_or_path runs/sudoku/relay-seed1/final --puzzles puzzles.txt

A puzzle is a line of 16 or 81 characters, digits and '.' or '0' for blanks. A model with a relay decodes with it.
"""

from dataclasses import dataclass, field

from dllm import utils
from dllm.core.samplers import MDLMSampler
from dllm.models.auto import load_model, load_tokenizer
from dllm.models.relay_norm import relay_keys
from memdlm.relay.sampler import RelayMDLMSampler
from memdlm.studies.sudoku.board import score_boards, to_ids
from memdlm.studies.sudoku.decode import solve_with
from memdlm.studies.sudoku.puzzles import read_puzzles
from memdlm.studies.sudoku.settings import TAU


@dataclass
class Options:
    model_name_or_path: str = field(metadata={"help": "Folder of a model, e.g. OUTPUT/relay-seed1/final."})
    puzzles: str = field(metadata={"help": "File of puzzles, one per line or csv."})
    tau: float = field(default=TAU, metadata={"help": "Summed uncertainty that a step may commit, above 0."})
    limit: int | None = field(default=None, metadata={"help": "Only the first so many puzzles. None: all."})
    skip_bad: bool = field(default=False, metadata={"help": "Leave out puzzles without exactly one solution."})


def main() -> None:
    (options,) = utils.parse_args(Options)
    puzzles = read_puzzles(options.puzzles, skip_bad=options.skip_bad, most=options.limit)
    model = load_model(options.model_name_or_path)
    tokenizer = load_tokenizer(options.model_name_or_path, model=model)
    sampler_class = MDLMSampler if relay_keys(model.config) is None else RelayMDLMSampler
    clue_ids = to_ids(tokenizer, [puzzle.clues for puzzle in puzzles])
    found = solve_with(sampler_class(model, tokenizer), clue_ids, options.tau, batch_size=512)
    scores = score_boards(found.ids, puzzles, tokenizer)
    for puzzle, ids, nfe, exact in zip(puzzles, found.ids, found.nfe, scores.exact, strict=True):
        answer = "".join(token if len(token) == 1 else "?" for token in tokenizer.convert_ids_to_tokens(ids))
        print(f"{puzzle.clues} {answer} {'right' if exact else 'wrong'} after {int(nfe)} forwards ({puzzle.tier})")
    print(f"{int(scores.exact.sum())} of {len(puzzles)} solved, {found.nfe.double().mean():.2f} forwards per puzzle")


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
