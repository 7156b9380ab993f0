"""Settings that hold for every test: no network, and the same random examples on every machine."""

import os
import signal

from hypothesis import settings

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a processor of its own
    os.environ["OMP_NUM_THREADS"] = "1"

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts us with & has it ignored

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
