"""Golden traces: every number of a training step under its name, and where another implementation first departs from them.

`record` writes a trace, `compare` finds the first wrong number. `Trace` reads a file, `TraceWriter` writes one, and
`TorchRecorder` one of a PyTorch model.
"""

from oxidizr_ref.trace.compare import Comparison, compare
from oxidizr_ref.trace.file import Record, Trace
from oxidizr_ref.trace.record import record
from oxidizr_ref.trace.report import report
from oxidizr_ref.trace.torch_recorder import TorchRecorder
from oxidizr_ref.trace.writer import TraceWriter

__all__ = ["Comparison", "Record", "TorchRecorder", "Trace", "TraceWriter", "compare", "record", "report"]
