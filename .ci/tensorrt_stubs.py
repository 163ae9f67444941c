"""Give mypy the types of TensorRT: ``python .ci/tensorrt_stubs.py WHEEL`` with the wheel of tensorrt-stubs.

pip cannot do it. The wheel wants TensorRT itself, and its folder ``tensorrt`` would look like an installed
TensorRT to ``import``. So only its types go into this environment, under the names that PEP 561 gives them.
What of them is not Python or hides Python's own names is mended.
"""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
import zipfile
from pathlib import Path, PurePosixPath

#: What the generator of the stubs wrote -> what it meant.
_MENDED = {
    r"\bin: (?=list\[)": "in_: ",
    r"channel_axis: int\)": "channel_axis: int = ...)",
    r"(?<=def get_error\(self, index: int\) -> )\.\.\.": "ParserError",
    r"(?m)^bool: .*$": "",  # annotations mean Python's
}


def main(wheel: Path, site_packages: Path) -> None:
    """Unpack the stubs of a wheel.

    Raises:
        SyntaxError: a stub is not Python even so.
    """
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            package, *_ = PurePosixPath(name).parts
            if not name.endswith(".pyi") or package not in ("tensorrt", "tensorrt_bindings"):
                continue
            text = archive.read(name).decode()
            for wrong, right in _MENDED.items():
                text = re.sub(wrong, right, text)
            ast.parse(text, name)
            path = site_packages / f"{package}-stubs" / PurePosixPath(name).name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sysconfig.get_path("purelib")))
