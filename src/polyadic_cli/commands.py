"""The commands of ``polyadic``: their arguments and what they print."""

from polyadic_cli.app import app, polyadic
from polyadic_cli.compress import compress
from polyadic_cli.plan import plan
from polyadic_cli.verify import verify

__all__ = ["app", "compress", "plan", "polyadic", "verify"]
