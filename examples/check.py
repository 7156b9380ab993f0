"""Prove a conversion: its bytes are those that were written, and its weights are the checkpoint's.

    python examples/check.py CHECKPOINT TARGET [NORMS]

NORMS says how the target's norms were merged: mean (the default), fold or rank0. The exit code is 3 where it differs.
"""

import sys

from neoxconv import open_checkpoint, verify_bytes, verify_weights


def main(source: str, target: str, norms: str = "mean") -> int:
    """Print what each level checked and found."""
    weights = verify_weights(open_checkpoint(source, norms=norms), open_checkpoint(target))
    reports = (verify_bytes(target), weights)
    for report in reports:
        print(f"{report.level}: {report.checked}: {'ok' if report.passed else 'differs'}")
        for finding in report.findings:
            print(f"  {finding}")
    print(f"largest relative error of a tensor: {weights.relative:.3g}")
    return 0 if all(report.passed for report in reports) else 3


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
