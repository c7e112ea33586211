"""`python -m kvkeep doctor [ENDPOINT]`: is everything there? Exits with 1 where no server answers."""

import argparse
import sys

from . import doctor


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m kvkeep", description="KVKeep for Python.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    look = verbs.add_parser("doctor", help="what is there, what is not, and what to do")
    look.add_argument("endpoint", nargs="?", help="default: KVKEEP_ENDPOINT, else http://127.0.0.1:7070")
    look.add_argument("--timeout", type=float, default=5.0, help="seconds to wait for a server (default: 5)")
    said = parser.parse_args()
    return 0 if doctor(said.endpoint, timeout=said.timeout) else 1


if __name__ == "__main__":
    sys.exit(main())
