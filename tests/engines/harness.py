"""What the engine tests stand on: a `kvkeepd` (Server) and a vLLM (Engine) that can be killed, stopped and started again."""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENT = Path(sys.prefix).parent
MODELS = ENVIRONMENT / "models"
KVKEEPD = os.environ.get("KVKEEP_KVKEEPD") or shutil.which("kvkeepd")
KVKEEPCTL = os.environ.get("KVKEEP_KVKEEPCTL") or (KVKEEPD and str(Path(KVKEEPD).with_name("kvkeepctl")))
BLOCK = 32
"""Tokens of a block."""
VOCABULARY = 8192


def prompt(seed: int, tokens: int) -> list[int]:
    """The same for the same seed, also where one is the beginning of another."""
    rng = random.Random(seed)
    return [rng.randrange(16, VOCABULARY - 16) for _ in range(tokens)]


def wait_until(true, seconds: float, what: str, every: float = 0.05):
    """Waits for something to become true, and says what it was that did not."""
    until = time.monotonic() + seconds
    while not (value := true()):
        if time.monotonic() > until:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(every)
    return value


class Server:
    """A `kvkeepd` over a folder, on its Unix socket alone, or on two ports of 127.0.0.1 alone."""

    def __init__(
        self,
        folder: Path,
        *,
        dram: str = "2GiB",
        nvme: str = "8GiB",
        preload: str | None = None,
        ports: list[int] | None = None,
        **environment: str,
    ):
        """`ports`: for gRPC and for the block protocol."""
        self.folder, self.dram, self.nvme = Path(folder), dram, nvme
        self.environment, self.preload, self.ports = environment, preload, ports
        self.arena = Path(tempfile.mkdtemp(prefix="kvkeep-engines-", dir="/dev/shm"))
        self.process: subprocess.Popen | None = None
        self.endpoint = f"127.0.0.1:{ports[0]}" if ports else f"unix:{self.folder}/kvkeepd.sock"
        self._metrics_at: str | None = None

    def start(self) -> Server:
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KVKEEP_")}
        environment |= {"KVKEEP_NVME_BYTES": self.nvme} if self.nvme != "off" else {"KVKEEP_NO_NVME": "true"}
        if self.ports:
            grpc, block = (f"127.0.0.1:{port}" for port in self.ports)
            environment |= {"KVKEEP_LISTEN": grpc, "KVKEEP_BLOCK_LISTEN": block, "KVKEEP_UNIX_SOCKET": "off"}
        else:
            environment["KVKEEP_LISTEN"] = "off"
        environment |= self.environment
        if self.preload:
            environment["LD_PRELOAD"] = self.preload
        log = open(self.folder.with_suffix(".log"), "ab")
        self._metrics_at = f"127.0.0.1:{free_port()}"
        self.process = subprocess.Popen(
            [
                KVKEEPD,
                "--data-dir",
                self.folder,
                "--arena-bytes",
                self.dram,
                "--arena-dir",
                self.arena,
                "--metrics-listen",
                self._metrics_at,
            ],
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
        )
        line = self.process.stdout.readline().decode()
        assert "ready" in line, f"kvkeepd did not start: {self.folder.with_suffix('.log')}"
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def lose_power(self) -> None:
        """SIGKILL, and what was in DRAM is gone."""
        self.kill()
        for arena in self.arena.iterdir():
            shutil.rmtree(arena)

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(90)

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.arena, ignore_errors=True)

    def ctl(self, *words: str) -> dict:
        out = subprocess.run(
            [KVKEEPCTL, "--endpoint", self.endpoint, "--json", *words], capture_output=True, check=True, timeout=60
        )
        return json.loads(out.stdout)

    def status(self) -> dict:
        return self.ctl("status")

    def metrics(self) -> dict[str, float]:
        """Series, as `name{labels}`, to value."""
        with urllib.request.urlopen(f"http://{self._metrics_at}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        out = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                out[name] = float(value)
        return out

    def total(self, name: str) -> float:
        """Sum over the labels of a metric."""
        return sum(v for k, v in self.metrics().items() if k == name or k.startswith(name + "{"))

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def disk_bytes_written(self) -> int:
        return disk_bytes_written(self.process.pid)

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.process.pid)

    def wait_quiet(self, seconds: float = 30) -> None:
        """Until nobody puts any more, and nothing waits for NVMe."""
        seen: list[list[float]] = []

        def quiet() -> bool:
            status = self.status()
            counters = status["counters"]
            puts = [counters[f"kvkeep_put_{what}_total"] for what in ("parts", "present_parts", "refused_parts")]
            seen.append([*puts, counters["kvkeep_dirty_bytes"], status["reservations"]])
            return len(seen) > 3 and seen[-1] == seen[-2] == seen[-3] and seen[-1][3:] == [0, 0]

        try:
            wait_until(quiet, seconds, "the server is quiet", every=0.1)
        except AssertionError as e:
            raise AssertionError(f"{e}; parts put, present, refused, dirty bytes, reservations: {seen[-1]}") from None


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Engine:
    """A vLLM in a process of its own."""

    def __init__(
        self,
        model: str | Path,
        connector: dict | None = None,
        *,
        log: Path,
        kv_gib: float = 1,
        environment=None,
        **settings,
    ):
        self.model = MODELS / model if isinstance(model, str) else Path(model)
        self.log = Path(log)
        self.settings = {
            "model": str(self.model),
            "dtype": "bfloat16",
            "enforce_eager": True,
            "max_model_len": 12288,
            "max_num_batched_tokens": 8192,
            "max_num_seqs": 8,
            "block_size": BLOCK,
            "enable_prefix_caching": True,
            "disable_log_stats": False,
            "seed": 0,
        } | settings
        if connector:
            self.settings["kv_transfer_config"] = connector
        self.environment = {
            "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "PYTHONHASHSEED": "0",
            # All of them: left to itself vLLM takes fewer threads without a connector than with one, or more, and another number of
            # threads adds in another order: other last bits, other speed.
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0))),
        } | (environment or {})
        self._pids: list[int] = []

    def start(self, wait: bool = True) -> Engine:
        theirs, ours = os.pipe()
        os.set_inheritable(ours, True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KVKEEP_ENDPOINT")} | self.environment
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE), environment.get("PYTHONPATH", "")])
        environment["KVKEEP_TEST_ANSWERS"] = str(ours)
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "engine_process.py"), json.dumps(self.settings)],
            stdin=subprocess.PIPE,
            stdout=open(self.log, "ab"),
            stderr=subprocess.STDOUT,
            pass_fds=[ours],
            env=environment,
            start_new_session=True,
        )
        os.close(ours)
        self._answers = os.fdopen(theirs)
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        self.start_seconds = self._answer(600)["start_seconds"]
        self._pids = self._do("processes")["pids"]

    def generate(self, prompts, max_tokens: int | list[int] = 1, **more) -> dict:
        """All prompts at once (a list of lists of token ids), or one."""
        single = isinstance(prompts[0], int)
        answer = self._do("generate", prompts=[prompts] if single else prompts, max_tokens=max_tokens, **more)
        return answer["outputs"][0] | {"seconds": answer["seconds"]} if single else answer

    def replay(self, requests: list[dict], at_once: int) -> dict:
        """Requests (`prompt`, `max_tokens`, `session`) in their order, so many at once."""
        return self._do("replay", seconds=1800, requests=requests, at_once=at_once)

    def warm_up(self) -> None:
        """Until what it computes is found again: it starts without waiting for the store."""

        def is_found() -> bool:
            self.reset()
            return self.generate(prompt(900, 2 * BLOCK), 1)["cached"] > 0

        wait_until(is_found, 60, "the engine restores", every=0.2)

    def reset(self, connector: bool = False) -> None:
        assert self._do("reset", connector=connector)["done"]

    def metrics(self) -> dict:
        # The front end hears of what was counted with the next request that it answers; this one is too short to be stored.
        self.generate(list(range(16, 24)), 1)
        return self._do("metrics")

    def kvkeep(self, name: str) -> float:
        """One of the connector's counters."""
        value = self.metrics().get(f"vllm:kvkeep_{name}", 0)
        return value["count"] if isinstance(value, dict) else value

    def kill(self) -> None:
        """SIGKILL to all of its processes at once, as an out-of-memory killer would."""
        left = {path for pid in self._pids for path in shared_memory(pid)}
        for pid in self._pids or [self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()
        wait_until(
            lambda: not any(os.path.exists(f"/proc/{pid}") and not is_zombie(pid) for pid in self._pids),
            30,
            "it is dead",
        )
        # vLLM's own, a quarter of a gigabyte: nobody is left to remove it.
        for path in left:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()

    def disk_bytes_written(self) -> int:
        return sum(disk_bytes_written(pid) for pid in self._pids)

    def cpu_seconds(self) -> float:
        return sum(cpu_seconds(pid) for pid in self._pids)

    def _do(self, what: str, seconds: float = 600, **arguments) -> dict:
        self.process.stdin.write(json.dumps({"do": what} | arguments).encode() + b"\n")
        self.process.stdin.flush()
        return self._answer(seconds)

    def _answer(self, seconds: float) -> dict:
        until = time.monotonic() + seconds
        while not select.select([self._answers], [], [], 0.5)[0]:
            if self.process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"the engine does not answer; its log is {self.log}")
        line = self._answers.readline()
        assert line, f"the engine is gone; its log is {self.log}"
        answer = json.loads(line)
        assert "error" not in answer, f"{answer['error']}; the engine's log is {self.log}"
        return answer


def disk_bytes_written(pid: int) -> int:
    """What a process has sent to disks so far (not tmpfs), less what was deleted before it got there."""
    said = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(said["write_bytes"]) - int(said["cancelled_write_bytes"])


def cpu_seconds(pid: int) -> float:
    """That a process has used so far, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def shared_memory(pid: int) -> set[Path]:
    """The files right under /dev/shm that a process has mapped."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    paths = (Path(line.split(maxsplit=5)[-1]) for line in maps if "/dev/shm/" in line)
    return {path for path in paths if path.parent == Path("/dev/shm")}


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def connector(endpoint: str, **options) -> dict:
    """How vLLM is told to use ours."""
    return {
        "kv_connector": "KVKeepConnector",
        "kv_connector_module_path": "kvkeep.connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"endpoint": endpoint} | options,
    }
