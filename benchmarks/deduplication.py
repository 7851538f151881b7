"""How often an answer serves again: requests of different content against those of a naive loop.

    python benchmarks/deduplication.py PATH/TO/ml-latest-small-posters

On MovieLens with posters (5-core, leave-one-out): a loop over interactions describes an item each time that
somebody touched it, and once more for each candidate of a 1+20 list; a loop over parts (train, valid, test)
summarizes the same windows of a history again. The store asks for each content once. No model runs.
"""

import sys
import tempfile
from pathlib import Path

from recllm.builders.catalog import Catalog
from recllm.builders.drift import latest_windows
from recllm.builders.histories import Histories
from recllm.builders.items import image_requests
from recllm.cli import main as recllm
from recllm.data.dataset import Dataset
from recllm.data.image_hashes import ImageHashes
from recllm.data.splits import Split
from recllm.files import write_json
from recllm.mllm.chat import Decoding
from recllm.mllm.store import request_key
from recllm.prompts.mllm_srec import VIU
from recllm.runs.provenance import describe_machine, describe_run

RESULTS = Path(__file__).parent.parent / "results" / "deduplication.json"
CANDIDATES = 21


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        raw, whole, core = sys.argv[1], f"{folder}/ml", f"{folder}/ml5"
        recllm(["data", "import", "movielens", raw, whole])
        recllm(["data", "filter", whole, core, "--user-core", "5", "--item-core", "5", "--require-image"])
        recllm(["data", "split", core, "loo"])
        figures = measure(Path(core))
    content = {
        "benchmark": "deduplication",
        "machine": describe_machine(),
        "run": {**describe_run(), "command": ["deduplication.py", Path(sys.argv[1]).name]},
        "setting": {"dataset": "MovieLens with posters, 5-core", "candidates": CANDIDATES, "window": 3},
        "figures": figures,
    }
    write_json(RESULTS, content)
    print(figures)


def measure(folder: Path) -> dict:
    """Returns the number of requests, naive and different, for images and for windows."""
    dataset = Dataset.open(folder)
    split = Split.open(folder / "splits" / "loo", dataset=dataset)
    hashes, identity = ImageHashes(), {"model": "any"}
    requests = image_requests(Catalog(dataset), range(len(dataset.items)), lambda code: VIU.text)
    different = len({request_key(identity, Decoding(), request, hashes) for request in requests})
    touched = len(dataset.user_codes)
    lists = len(split.rows("test", targets=True))
    windows, all_windows = set(), 0
    for part in ("train", "valid", "test"):
        histories = Histories(split, part)
        for user in histories.users():
            items = histories.history(user).items
            cuts = {cut for end in histories.cuts(user) for cut in latest_windows(end, 3, 3, 0)}
            all_windows += len(cuts)
            windows |= {items[:end].tobytes() for _, end in cuts}
    return {
        "images": {
            "per_interaction": touched,
            "per_candidate": lists * CANDIDATES,
            "different": different,
            "factor": (touched + lists * CANDIDATES) / different,
        },
        "windows": {"per_part": all_windows, "different": len(windows), "factor": all_windows / len(windows)},
    }


if __name__ == "__main__":
    main()
