"""Templates of Triton kernels, one per file: a frozen description of a kernel, and the source that it becomes."""
