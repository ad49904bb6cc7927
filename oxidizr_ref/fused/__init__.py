"""The fast operations, each beside the plain composition it must agree with.

A file here reads top to bottom: the equation and its source, the reference of a few lines composed from `ops`, the fused
forward pass in numbered steps, and the backward pass in reverse, each step quoting the forward line it differentiates.
"""
