"""Golden traces: every number of a training step under its name, and where another implementation first departs from them.

`record` writes a trace, `compare` finds the first wrong number, `Trace` and `TraceWriter` read and write the files.
"""

from oxidizr_ref.trace.file import Record, Trace, TraceWriter
from oxidizr_ref.trace.record import record

__all__ = ["Record", "Trace", "TraceWriter", "record"]
