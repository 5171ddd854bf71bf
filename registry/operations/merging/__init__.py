"""Merging, extraction and similarity of stored versions: reading sources, planning, computing, recipes."""
