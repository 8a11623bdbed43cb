"""Remote inputs: on the Hub, behind a URL, in an object store. A merge fetches only the rows that it needs.

Each response is compared with the state of the file when its header was read (size, etag, commit), so a file that
changes is an error and never a mixture. Bytes go directly into the worker's staging buffer. Instead of read-ahead there
are more workers than CPU cores: while some wait for the network, others compute. Small ranges, which many tiles need,
are cached in a bounded part of the memory budget.
"""

from mergeforge.io.remote.ranged_file import RemoteFile
from mergeforge.io.remote.session import RemoteSession

__all__ = ["RemoteFile", "RemoteSession"]
