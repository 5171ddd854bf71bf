"""Low-rank algebra: what adapters add to weights, from their factors. Importing this package imports no torch;
`low_rank` does, so operations import that when they come to the weights."""
