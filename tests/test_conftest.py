"""The last line of a run counts what was not run and says how it would be."""

from tests.conftest import not_run


def test_the_last_line_says_what_would_run_the_rest() -> None:
    reasons = ["ggml is not installed; run `make oracles`"] * 3 + [
        "x is larger ...: set NEOXCONV_FIXTURES to",
        "no tmpfs",
    ]
    assert not_run(reasons, 7) == (
        "12 tests were not run: 1 need the whole fixtures (NEOXCONV_FIXTURES=FOLDER make test), 3 need `make oracles`, "
        "1 cannot run here (make test PYTEST_ARGS=-rs says why), 7 are slow (make test PYTEST_ARGS='-m slow')"
    )
    assert not_run([], 0) == ""
