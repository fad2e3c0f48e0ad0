"""Sweeps without Ray: the search space, the study that is kept on disk, what one trial does, and what it comes to."""
