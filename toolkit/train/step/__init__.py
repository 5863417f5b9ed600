"""One optimizer step: packs of completions, log-probabilities, weights, a retry in parts."""
