"""What the connector counts: vLLM's periodic log line, and Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "matches": "Prompts that were looked up in the store.",
    "match_lost": "Lookups that were not answered in time, or by nobody.",
    "match_tokens": "Tokens of these prompts that the store has, beyond what the engine has itself.",
    "recomputed_by_advice": "Prompts that were computed although the store has them, because that is faster.",
    "loads": "Requests whose KV was loaded.",
    "load_blocks": "Blocks loaded.",
    "load_bytes": "Bytes loaded.",
    "load_failures": "Loads that failed; the request was computed.",
    "save_blocks": "Blocks that the store has after they were saved.",
    "save_bytes": "Bytes of these.",
    "save_refused_blocks": "Blocks that the store did not take, or not in time.",
    "save_abandoned_blocks": "Blocks whose save was taken back, because the engine needed them.",
    "save_busy_blocks": "Blocks that were not saved because too many saves were under way.",
    "slow_steps": "Steps in which the connector took more than 5 ms of the scheduler's thread.",
    "errors": "Errors caught on the engine's threads; each is a bug, and logged.",
    "sessions_appended": "Finished requests appended to their session.",
    "sessions_failed": "Finished requests that were not.",
}
"""Name to what it counts. In Prometheus: `vllm:kvkeep_<name>_total`."""
HISTOGRAMS = {
    "match_seconds": (
        "From a prompt's lookup to its answer.",
        (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1),
    ),
    "load_seconds": ("Of one request's load.", (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)),
    "save_seconds": (
        "From a save's start until its blocks are free of it.",
        (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
    ),
    "hold_seconds": (
        "How long a step that needed a block of a save under way waited for it.",
        (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.11, 0.2, 0.5, 1),
    ),
    "scheduler_seconds": (
        "Of the connector in one step of the scheduler.",
        (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.1),
    ),
}
"""Name to what it measures, and buckets in seconds. In Prometheus: `vllm:kvkeep_<name>`."""
_SAMPLES_MAX = 4096
"""Samples of a histogram that are kept between two collections."""


class Stats(KVConnectorStats):
    """Counts and samples since the last collection."""

    def count(self, name: str, n: float = 1) -> None:
        if n:
            self.data[name] = self.data.get(name, 0) + n

    def observe(self, name: str, seconds: float) -> None:
        samples = self.data.setdefault(name, [])
        if len(samples) < _SAMPLES_MAX:
            samples.append(seconds)

    def take(self) -> Stats | None:
        """What there is, and begin anew."""
        if not self.data:
            return None
        taken, self.data = Stats(data=self.data), {}
        return taken

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.data[name] = self.data[name] + value if name in self.data else value
        return self

    def reduce(self) -> dict[str, int | float]:
        out: dict[str, int | float] = {}
        for name, value in self.data.items():
            if isinstance(value, list):
                ordered = sorted(value)
                out[f"{name} p50"] = round(ordered[len(ordered) // 2], 6)
                out[f"{name} max"] = round(ordered[-1], 6)
            else:
                out[name] = value
        return out

    def is_empty(self) -> bool:
        return not self.data


class PromMetrics(KVConnectorPromMetrics):
    """The same for Prometheus, per engine."""

    def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics: dict[str, dict[int, Any]] = {}
        for name, text in COUNTERS.items():
            metric = metric_types[Counter](name=f"vllm:kvkeep_{name}", documentation=text, labelnames=labelnames)
            self._metrics[name] = self._per_engine(metric)
        for name, (text, buckets) in HISTOGRAMS.items():
            metric = metric_types[Histogram](
                name=f"vllm:kvkeep_{name}", documentation=text, labelnames=labelnames, buckets=buckets
            )
            self._metrics[name] = self._per_engine(metric)

    def _per_engine(self, metric) -> dict[int, Any]:
        return {engine: metric.labels(*values) for engine, values in self.per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            metric = self._metrics.get(name, {}).get(engine_idx)
            if metric is None:
                continue
            if isinstance(value, list):
                for sample in value:
                    metric.observe(sample)
            else:
                metric.inc(value)
