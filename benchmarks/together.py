"""Many targets in one read beside a run for each: time, and bytes that a source far away sends; ratios only.

    python -m benchmarks.together [--layers 1] [--rows 4096] [--runs 3] [--types Q8_0,Q6_K,Q4_K_M,IQ4_XS] [--folder DIR]

Layers of 20B widths become all types, together and one after another, in turns. Each way is run once beforehand, which
compiles the kernels and fills the page cache. For the bytes a small model lies on a web server of this process.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from neoxconv import Recipe, make_plan, open_checkpoint, run, run_all
from neoxconv.core.model import Checkpoint
from neoxconv.synthetic import Synthetic, write_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rows", type=int, default=4096, help="of the vocabulary")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--types", type=lambda text: text.split(","), default=["Q8_0", "Q6_K", "Q4_K_M", "IQ4_XS"])
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="neoxconv-bench-", dir=given.folder))
    try:
        model = Synthetic(layers=given.layers, hidden=6144, heads=64, rows=given.rows, tp=2, pp=1, context=2048)
        source = write_checkpoint(folder / "source", model)
        compare(source, given.types, folder / "out", given.runs)
        small = write_checkpoint(folder / "small", Synthetic(layers=4, hidden=1024, heads=16, rows=4096, tp=1)).parent
        count(small, given.types, folder / "out")
    finally:
        shutil.rmtree(folder)


def compare(source: Path, types: list[str], out: Path, runs: int) -> None:
    """Print the time of all together over that of one after another."""
    found = []
    for _ in range(1 + runs):
        alone, together = (
            seconds(functools.partial(way, open_checkpoint(source), types, out)) for way in (one_by_one, at_once)
        )
        found.append([a / b for a, b in zip(together, alone, strict=True)])
    wall, processor = (statistics.median(column) for column in zip(*found[1:], strict=True))
    told = f"{wall:.2f} of the time, {processor:.2f} of the processor's"
    print(f"{len(types)} types together over one after another: {told}")


def plans(checkpoint: Checkpoint, types: list[str], out: Path) -> dict[Path, Any]:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return {out / f"{kind}.gguf": make_plan(checkpoint, Recipe("gguf", type=kind)) for kind in types}


def one_by_one(checkpoint: Checkpoint, types: list[str], out: Path) -> None:
    for target, plan in plans(checkpoint, types, out).items():
        run(plan, target)


def at_once(checkpoint: Checkpoint, types: list[str], out: Path) -> None:
    run_all(plans(checkpoint, types, out))


def seconds(task: Callable[[], None]) -> tuple[float, float]:
    """The time of one call, and the processor's."""
    begin = time.perf_counter(), time.process_time()
    task()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def count(source: Path, types: list[str], out: Path) -> None:
    """Print the bytes that a web server sends for all together over those for one after another."""
    sent = [0]

    class Handler(RangeHandler):
        counted = sent

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(source)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, found = f"http://127.0.0.1:{server.server_port}", []
    for way in (one_by_one, at_once):
        checkpoint = open_checkpoint(url)
        sent[0] = 0
        way(checkpoint, types, out)
        found.append(sent[0])
    server.shutdown()
    print(f"{len(types)} types together over one after another: {found[1] / found[0]:.2f} of the bytes sent")


class RangeHandler(SimpleHTTPRequestHandler):
    """Files by ranges, whose bytes are counted."""

    protocol_version = "HTTP/1.1"
    counted: list[int]

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        asked = self.headers.get("Range")
        if not path.is_file() or not asked:
            super().do_GET()
            return
        first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
        with path.open("rb") as stream:
            stream.seek(first)
            data = stream.read(last + 1 - first)
        self.counted[0] += len(data)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{path.stat().st_size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: Any) -> None:
        pass


if __name__ == "__main__":
    main()
