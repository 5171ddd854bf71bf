"""Values and pure rules that every other room builds on: no I/O, no torch, no SQL."""
