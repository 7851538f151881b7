"""Writes what users prefer, window by window; the same as `recllm build users`.

python data_builders/summarize_users.py DATASET --model Qwen/Qwen2-VL-7B-Instruct --split loo
python data_builders/summarize_users.py config.yaml --parts test
accelerate launch data_builders/summarize_users.py DATASET --model Qwen/Qwen2-VL-7B-Instruct
"""

import sys

from recllm.cli import main

if __name__ == "__main__":
    main(["build", "users", *sys.argv[1:]])
