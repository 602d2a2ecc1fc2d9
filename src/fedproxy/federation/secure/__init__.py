"""Secure sums in the rounds: what is summed, what a step says, and the parts that server and client have in it."""
