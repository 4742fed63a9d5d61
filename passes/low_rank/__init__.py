"""Weights as products of thin matrices: how they are made, how large they may be, and where they stand in a graph."""
