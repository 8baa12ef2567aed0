"""The stages at FLUX.1-dev's full size, on random weights: all of them, or `capture` and `scores` alone."""
