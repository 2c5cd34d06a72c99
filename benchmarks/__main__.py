"""``python -m benchmarks``: the benchmark of the codecs."""

from __future__ import annotations

from benchmarks.codec import main

if __name__ == "__main__":
    main()
