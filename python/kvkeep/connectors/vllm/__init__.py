"""vLLM's KV connector: KV blocks go between the engine's own memory and the store.

    --kv-transfer-config '{"kv_connector": "KVKeepConnector", "kv_connector_module_path": "kvkeep.connectors.vllm",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"endpoint": "local:/var/lib/kvkeep?dram=16GiB&nvme=200GiB"}}'

vLLM makes one `KVKeepConnector` in its scheduler's process and one in each worker. They share nothing but what `messages` has:

    scheduler   on_new_request -> match, with a lease      get_num_new_matched_tokens: what the answer allows
                build_connector_meta -> Step ------------> worker  start_load_kv: gets into KV memory
                update_connector_output <- WorkerReport -          wait_for_save: puts out of it
                                                                   handle_preemptions: takes puts back whose blocks are given away

* `connector`: vLLM's interface, handed on; nothing raises on the engine's threads.
* `options`: what `kv_connector_extra_config` may say.
* `layout`: how the KV looks to the store (format), where it lies (geometry), memory shared with the server.
* `contact`: the namespace, and the thread that registers its revision.
* `scheduler`, `worker`: the two sides. `matches`: questions on their way to the store, and their answers.
* `saves`: which blocks are being saved, and who must not get them yet.
* `conversations`: finished requests appended to sessions. `metrics`: what is counted.

docs/engines/vllm.md has the options, the table of keys, and what was tested.
"""

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from .connector import KVKeepConnector

try:
    # MultiConnector looks its children's classes up by name.
    KVConnectorFactory.register_connector("KVKeepConnector", __name__, "KVKeepConnector")
except ValueError:
    pass  # registered already

__all__ = ["KVKeepConnector"]
