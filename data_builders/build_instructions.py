"""Writes instruction tuples, plain or four-step CoT; the same as `recllm build instructions`.

python data_builders/build_instructions.py DATASET --split loo --form cot
python data_builders/build_instructions.py config.yaml --parts test --candidates 1+20-uniform-seed42
"""

import sys

from recllm.cli import main

if __name__ == "__main__":
    main(["build", "instructions", *sys.argv[1:]])
