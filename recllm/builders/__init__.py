"""Builders of training data: texts about items and users, instruction tuples, image prompts."""
