# SPDX-License-Identifier: MIT
"""Rebuild the README's result tables from the JSON that evaluate.py wrote.

A table stands between two comments; what is between them is replaced:

  <!-- table: scripts/results/NAME.json SUITE -->
  <!-- end -->

  python scripts/make_tables.py            # rewrite README.md
  python scripts/make_tables.py --check    # exit code 1 where the README differs
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
from data import DataError
from negatives import run_script

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- table: (\S+) (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def make_table(path: Path, suite: str) -> str:
    """The markdown of one suite, without its heading.

    Raises:
        DataError: the file is missing, or holds no results of this suite.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not results:
            raise KeyError
        for result in results.values():
            scores = result["suites"][suite]
            scores.pop("versus", None)  # comparisons of pairs are for results.md
            result["suites"] = {suite: scores}
            result.pop("left_out", None)
        table = evaluate.markdown(results)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{path}: holds no results of {suite}; run evaluate.py --suite {suite} --out again"
        ) from None
    return table.split("\n", 2)[2]


def fill(text: str, base: Path) -> str:
    """Put every table into its place."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{make_table(base / m[2], m[3])}\n{m[5]}", text)


def check_marks(text: str, path: Path) -> None:
    """Refuse a table mark whose end is missing: what stands up to the next end would be lost."""
    opened = 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("<!-- table: "):
            if opened:
                raise DataError(f"{path}:{opened}: this table has no <!-- end -->; add it")
            opened = number
        elif line == "<!-- end -->":
            opened = 0
    if opened:
        raise DataError(f"{path}:{opened}: this table has no <!-- end -->; add it")


def main(argv: list[str] | None = None) -> None:
    """Rewrite the file, or say which tables differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    parser.add_argument("--file", type=Path, default=ROOT / "README.md", help="default README.md")
    args = parser.parse_args(argv)
    try:
        old = args.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--file {args.file}: cannot be read ({error})") from None
    check_marks(old, args.file)
    new = fill(old, ROOT)
    count = len(BLOCK.findall(old))
    if not count:
        raise DataError(f"{args.file}: holds no table between <!-- table: FILE SUITE --> marks")
    if not args.check:
        evaluate.write_text(args.file, new)
        print(f"{count} tables written to {args.file}")
    elif new != old:
        was, now = (set(text.splitlines()) for text in (old, new))
        print(f"{args.file}: tables differ from scripts/results; run scripts/make_tables.py")
        print("\n".join(f"- {line}" for line in sorted(was - now)[:5]))
        print("\n".join(f"+ {line}" for line in sorted(now - was)[:5]))
        sys.exit(1)
    else:
        print(f"{count} tables of {args.file} are as scripts/results has them")


if __name__ == "__main__":
    sys.exit(run_script(main, "make_tables.py"))
