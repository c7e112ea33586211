"""Weights that are replaced in their folder, while an engine goes on with the old ones: neither engine is given KV of the other."""

import shutil
import subprocess
import sys

from conftest import NEW_TOKENS
from harness import HERE, MODELS, Engine, connector, prompt, wait_until

LENGTH = 512
RESTORED = (LENGTH - 1) // 32 * 32


def said(engine, seed):
    engine.reset()
    return engine.generate(prompt(seed, LENGTH), NEW_TOKENS)


def test_weights_are_swapped_in_place_with_two_engines(server, folder):
    model = folder / "model"
    shutil.copytree(MODELS / "small", model)
    old = Engine(model, connector(server.endpoint), log=folder / "old.log").start()
    try:
        old.warm_up()
        expected_old = said(old, 1)["tokens"]
        server.wait_quiet()
        assert said(old, 1)["cached"] == RESTORED
        # As a copy of a fine-tuned model: same names, same shapes, same sizes.
        subprocess.run([sys.executable, HERE / "models.py", model, "--weights", "small", "77"], check=True)
        new = Engine(model, connector(server.endpoint), log=folder / "new.log").start()
        try:
            first = said(new, 1)
            assert first["cached"] == 0, "KV of the old weights was served to the new ones"
            assert first["tokens"] != expected_old, "the weights are the same: the test shows nothing"

            def saves_arrive():
                found = said(new, 1)
                assert found["tokens"] == first["tokens"]
                server.wait_quiet()
                return found["cached"] == RESTORED

            wait_until(saves_arrive, 30, "the new engine's own KV is restored")
            again = said(old, 1)
            assert (again["cached"], again["tokens"]) == (0, expected_old), (
                "the old engine was served KV of the new weights"
            )
            server.wait_quiet()
            assert said(new, 1)["tokens"] == first["tokens"]
            assert said(old, 1)["tokens"] == expected_old
        finally:
            new.close()
    finally:
        old.close()
