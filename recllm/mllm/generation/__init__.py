"""Three backends behind one interface (`recllm.mllm.chat.Backend`), and the loop that runs them.

`in_process.InProcessBackend` runs transformers here, `vllm_offline.VllmBackend` vLLM's offline engine,
`server.ServerBackend` asks any OpenAI-compatible server. `run.generate` asks a backend for what the store
(`recllm.mllm.store`) does not have.
"""
