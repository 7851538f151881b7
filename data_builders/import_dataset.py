"""Imports raw files as a recllm dataset; the same as `recllm data import`.

python data_builders/import_dataset.py movielens PATH/TO/ml-latest-small OUT
python data_builders/import_dataset.py table log.csv OUT --user user --item item --timestamp time --images
photos
"""

import sys

from recllm.cli import main

if __name__ == "__main__":
    main(["data", "import", *sys.argv[1:]])
