"""Writes REVEAL's initial prompts; the same as `recllm build image-prompts`.

python data_builders/write_image_prompts.py DATASET --split loo
"""

import sys

from recllm.cli import main

if __name__ == "__main__":
    main(["build", "image-prompts", *sys.argv[1:]])
