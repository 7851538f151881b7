"""Writes texts about items with a multimodal LLM; the same as `recllm build items`.

python data_builders/summarize_items.py DATASET --model Qwen/Qwen2-VL-7B-Instruct --dry-run
python data_builders/summarize_items.py config.yaml
accelerate launch data_builders/summarize_items.py DATASET --model Qwen/Qwen2-VL-7B-Instruct
"""

import sys

from recllm.cli import main

if __name__ == "__main__":
    main(["build", "items", *sys.argv[1:]])
