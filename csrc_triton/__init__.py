"""Triton kernels, one file per step of the pipeline, each with the launcher that calls it."""
