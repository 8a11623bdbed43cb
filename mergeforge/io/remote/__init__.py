"""Inputs that lie elsewhere: on the Hub, behind any URL, in an object store. A merge fetches the rows that it needs.

Each answer is compared with what the file was when its header was read (size, etag, commit), so a file that changes is
an error and never a mixture. Bytes go straight into the worker's staging buffer. Read-ahead is more workers than
processors: while some wait for the network, others compute. Small ranges, which many tiles need, are kept in a bounded
part of the memory given.
"""

from mergeforge.io.remote.ranged_file import RemoteFile
from mergeforge.io.remote.session import RemoteSession

__all__ = ["RemoteFile", "RemoteSession"]
