"""The generated types of kvkeep/v1, made from the .proto files when this module is imported, and nothing else.

`blocks_pb2`, `types_pb2` and `blocks_pb2_grpc` are what `protoc` makes of proto/kvkeep/v1.
"""

import importlib
import pathlib
import sys
import tempfile

from grpc_tools import protoc

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"

_folder = tempfile.TemporaryDirectory(prefix="kvkeep-stubs-")
_files = [str(path) for path in sorted((PROTO / "kvkeep" / "v1").glob("*.proto"))]
if protoc.main(["protoc", f"-I{PROTO}", f"--python_out={_folder.name}", f"--grpc_python_out={_folder.name}", *_files]):
    raise SystemExit("protoc failed on proto/kvkeep/v1")
sys.path.insert(0, _folder.name)

types_pb2 = importlib.import_module("kvkeep.v1.types_pb2")
blocks_pb2 = importlib.import_module("kvkeep.v1.blocks_pb2")
blocks_pb2_grpc = importlib.import_module("kvkeep.v1.blocks_pb2_grpc")
