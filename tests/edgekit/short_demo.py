"""``edgekit demo`` with a small network and a short training: the same road in seconds."""

from __future__ import annotations

from edgekit import cli
from edgekit.demo import digits, road

digits.PIXELS = 8
digits.WIDTHS = (64, 128)
digits.BLOCKS_PER_WIDTH = 1
digits.EPOCHS = 3
road.REQUESTS = 60

if __name__ == "__main__":
    cli.main()
