"""Fine-tuning: what the recipes call, step by step; see `recllm.training.sft`."""
