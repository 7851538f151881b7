"""Embeds images under prompts, on several processes where a launcher starts them; as `recllm embed images`.

accelerate launch --config_file recipes/launch/ddp.yaml data_builders/embed_images.py DATASET \
    --model Qwen/Qwen2-VL-7B-Instruct --prompts texts/reveal-prompts.parquet
"""

import sys

from recllm.cli import main

if __name__ == "__main__":
    main(["embed", "images", *sys.argv[1:]])
