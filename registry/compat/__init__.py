"""Will it load? An adapter held against a model, by what both look like: one rule, one function, one code. Nothing
here reads a file, a database or a weight."""
