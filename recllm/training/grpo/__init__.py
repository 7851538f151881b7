"""Group relative policy optimization of what a model writes about items; see `recipes/grpo.py`."""
