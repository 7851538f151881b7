"""One ranker a file; `recllm.rankers.RANKERS` lists them."""
