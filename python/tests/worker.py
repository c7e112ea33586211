"""What processes that are not forked from a test run."""

import sys

from conftest import layout

import kvkeep


def matches(endpoint: str, namespace: str, keys: bytes) -> int:
    """How many positions of a chain are here, asked by a namespace of its own."""
    with kvkeep.Client(endpoint, patience=5.0).namespace(namespace, layout(), "weights") as ns:
        assert ns.ready(30), ns.describe()["text"]
        return ns.match(keys, key_len=32).boundary_positions


if __name__ == "__main__":
    print(matches(sys.argv[1], sys.argv[2], bytes.fromhex(sys.argv[3])))
