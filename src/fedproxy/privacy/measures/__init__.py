"""The numbers that attacks end in: pure functions of arrays, without models or files."""
