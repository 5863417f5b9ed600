"""The parts of one optimizer step: packing of completions, log-probabilities, importance weights,
and the retry in smaller parts after an out-of-memory error.
"""
