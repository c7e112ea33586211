"""Which releases of the engines the connectors were tested with. Interfaces of engines move between releases, and a connector that
half fits would serve the wrong thing: another release is refused, unless the operator says that he has tried it."""

from __future__ import annotations

TESTED: dict[str, tuple[str, ...]] = {
    "vllm": ("0.32.0",),
    "sglang": ("0.5.23",),
    "lmcache": ("0.5.6",),
    "transformers": ("5.19.0",),
}
"""Engine to the releases that `make test-engines` ran with. Any release of the same series (`0.32.*`) is accepted."""


class UnknownVersion(RuntimeError):
    """This release of an engine was not tested with this connector."""


def check(engine: str, version: str, *, any_version: bool = False) -> None:
    """Refuses a release that nobody has tried. `any_version`: the operator has.

    Raises UnknownVersion, with the range that is supported and the option that overrides it.
    """
    series = sorted({_series(tested) for tested in TESTED[engine]})
    if any_version or _series(version) in series:
        return
    supported = ", ".join(f"{s}.*" for s in series)
    raise UnknownVersion(
        f"kvkeep's connector supports {engine} {supported}, this is {version}. "
        f'If you have tried it: set "any_version": true in the connector\'s options'
    )


def _series(version: str) -> str:
    """What counts of a version: its first two numbers."""
    return ".".join(version.split("+")[0].split(".")[:2])
