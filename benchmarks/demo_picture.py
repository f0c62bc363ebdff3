"""Draw what `make demo` prints as docs/demo.svg.

python benchmarks/demo_picture.py
"""

import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 110


def main() -> None:
    """Run the demo in colour and draw its output."""
    command = [str(Path(sys.executable).parent / "ibke"), "demo"]
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode not in (0, 1):
        sys.exit(done.stderr)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(done.stdout))
    console.save_svg("docs/demo.svg", title="ibke demo")


if __name__ == "__main__":
    main()
