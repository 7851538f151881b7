"""Retrieval: mean-profile ranking by text embeddings, and two-stage ranking of a first stage's top K."""
