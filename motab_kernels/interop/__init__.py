"""Other libraries' losses on our ops: their signatures, and their own callers switched over in one line.

`from motab_kernels import interop`, then `interop.<peer>.<its function>` in place of the peer's, or
`interop.<peer>.patch()` where the peer calls its function itself. Importing this imports no peer.
"""

from motab_kernels.interop import fla, liger, speculators, trl, verl

__all__ = ["fla", "liger", "speculators", "trl", "verl"]
