"""jettison: a pass compiler that fits language models into the memory you have."""
