"""Rewrites image prompts by feedback, on several processes where a launcher starts them; the same as
`recllm build image-rewrites`.

accelerate launch --config_file recipes/launch/ddp.yaml data_builders/rewrite_image_prompts.py DATASET \
    --model Qwen/Qwen2-VL-7B-Instruct --prompts texts/reveal-prompts.parquet --feedback feedback.parquet \
    --out prompts-1.parquet
"""

import sys

from recllm.cli import main

if __name__ == "__main__":
    main(["build", "image-rewrites", *sys.argv[1:]])
