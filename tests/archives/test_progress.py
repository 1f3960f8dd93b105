import io

import pytest

from scripts.archives.progress import Progress, format_bytes, format_status


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (999_999, "1.0 MB"), (3.21e9, "3.2 GB"), (5e12, "5.0 TB")],
)
def test_amounts_read_as_people_say_them(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_a_line_tells_share_amount_rate_and_time_left() -> None:
    assert format_status("x", 4 * 10**8, 10**9, 2e6) == "x   40 %  400.0 MB of 1.0 GB  2.0 MB/s  05:00 left"
    assert format_status("x", 0, 10**10, 1e6) == "x    0 %  0 bytes of 10.0 GB  1.0 MB/s  2:46:40 left"
    assert format_status("x", 0, 0, 0) == "x  100 %  0 bytes of 0 bytes"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_line_every_ten_percent_or_thirty_seconds() -> None:
    clock, log = Clock(), io.StringIO()
    progress = Progress("x", 1000, stream=log, clock=clock)
    for _ in range(100):
        clock.now += 1
        progress.add(10)
    progress.close()
    lines = log.getvalue().splitlines()
    assert [line.split("%")[0] for line in lines] == [f"x  {share:3d} " for share in range(10, 101, 10)]
    assert lines[4].endswith("10 bytes/s  00:50 left")
    slow = Progress("x", 1000, stream=(log := io.StringIO()), clock=clock)
    for _ in range(65):
        clock.now += 1
        slow.add(1)
    assert len(log.getvalue().splitlines()) == 2


def test_what_was_there_before_does_not_count_as_speed() -> None:
    clock, log = Clock(), io.StringIO()
    progress = Progress("x", 1000, 500, stream=log, clock=clock)
    clock.now += 10
    progress.add(100)
    assert log.getvalue() == "x   60 %  600 bytes of 1.0 kB  10 bytes/s  00:40 left\n"


def test_a_terminal_gets_one_bar_that_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    clock, terminal = Clock(), io.StringIO()
    progress = Progress("x", 1000, stream=terminal, terminal=True, clock=clock)
    for _ in range(10):
        clock.now += 0.125
        progress.add(100)
    progress.close()
    pictures = terminal.getvalue().split("\r")[1:]
    assert len(pictures) == 5
    assert terminal.getvalue().count("\n") == 1
    assert "[" in pictures[0]
    assert ".]" in pictures[0]
    assert "#]" in pictures[-1]
    assert max(len(picture.strip().removesuffix("\x1b[K")) for picture in pictures) <= 80
