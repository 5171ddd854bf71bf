"""The command `registry`: each command parses, calls the facade and prints. It decides nothing about artifacts."""
