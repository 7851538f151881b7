"""REVEAL (arXiv 2606.09082): prompts that learn from feedback (FVE), image gradients in balance (AVL)."""
