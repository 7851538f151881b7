"""Images for a multimodal LLM: reading, token budgets, the vision tower, and a store of its outputs."""
