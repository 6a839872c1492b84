"""Studies: each trains, measures and writes numbers, a table and a picture; each is a program of its own."""
