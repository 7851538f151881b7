"""REVEAL (arXiv 2606.09082): prompts that learn from feedback (FVE), gradients that look after images (AVL)."""
