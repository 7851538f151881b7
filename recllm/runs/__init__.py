"""Provenance of what recllm writes, logs of training, and reading the folders of runs."""
