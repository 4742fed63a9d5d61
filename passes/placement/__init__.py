"""How `place-weights` decides what is in fast memory: what can be streamed, what is needed first, and two solvers."""
