"""Does a carried hidden state help to solve Sudoku? Run as `python -m memdlm.studies.sudoku`."""
