"""Sweeps: many runs of one script over methods, hyper-parameters, subjects and seeds, and what came out of them."""
