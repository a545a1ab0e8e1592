"""The commands of ``polyadic``: their arguments and what they print."""

from polyadic.cli.app import app, polyadic
from polyadic.cli.compress import compress
from polyadic.cli.plan import plan
from polyadic.cli.verify import verify

__all__ = ["app", "compress", "plan", "polyadic", "verify"]
