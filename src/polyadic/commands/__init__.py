"""The commands of ``polyadic``: their arguments and what they print."""

from polyadic.commands.app import app, polyadic
from polyadic.commands.bench import bench
from polyadic.commands.compress import compress
from polyadic.commands.demo import demo
from polyadic.commands.plan import plan
from polyadic.commands.verify import verify

__all__ = ["app", "bench", "compress", "demo", "plan", "polyadic", "verify"]
