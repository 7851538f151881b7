"""Packed groups of prompts that share a prefix: training and scoring both use them."""
