"""Engines on KVKeep: each module is loaded by the engine itself and needs that engine's package, nothing else does.

* `vllm` (a package): vLLM's KV connector. The engine's own KV memory is filled and read.
* `vllm_tier`: a secondary tier below vLLM's OffloadingConnector, which brings GPU blocks to host memory itself.
* `sglang`, `lmcache`, `transformers`: see there.
* `revision`: which weights an engine serves; shared by all of them.
* `versions`: which releases of the engines these modules were tested with.

docs/engines/ has a page for each.
"""
