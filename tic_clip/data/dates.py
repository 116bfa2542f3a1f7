"""Parse the dates of tables, in UTC: ISO 8601, seconds or milliseconds since 1970, years, a strptime format."""

import datetime
import math
import re
from collections import Counter
from itertools import accumulate, pairwise

from tic_clip import TicError
from tic_clip.timeline import DAY, name_span, span

FORMATS = ("auto", "year", "s", "ms")  # anything else is a format of strftime
MILLISECONDS = 1e11  # from this number on, which is the year 5138 in seconds and 1973 in milliseconds
FIRST, LAST = -30_610_224_000, 253_370_764_799  # seconds of the years 1000 to 9998: 0001 and 9999 stand for no date
SMALLEST = 1e6  # a smaller number is hardly a time in seconds, but a year, a month or a row's number
CALENDAR = (1800, 2200)  # years of digits that are read as a date (2020, 202003, 20200331), not as seconds
EPOCH = datetime.date(1970, 1, 1).toordinal()


def read_date(value: object, form: str = "auto") -> int | None:
    """Return a date as seconds since 1970 (UTC), or None if it can't be parsed."""
    try:
        seconds = math.floor(_parse(value.strip() if isinstance(value, str) else value, form))
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if FIRST <= seconds <= LAST else None


def _parse(value: object, form: str) -> float:
    if isinstance(value, datetime.date):  # a datetime, too
        return to_seconds(value)
    if form == "year":
        return to_seconds(datetime.date(int(value), 1, 1))
    if form in ("s", "ms"):
        return float(value) / (1000 if form == "ms" else 1)
    if form != "auto":
        return to_seconds(datetime.datetime.strptime(str(value), form))
    text = str(value).removesuffix(".0")  # 2020.0 is how pandas writes a year in a column with a gap
    if re.fullmatch(r"\d{4}-\d{2}", text):
        text = text.replace("-", "")
    if re.fullmatch(r"\d{4}|\d{6}|\d{8}", text) and CALENDAR[0] <= int(text[:4]) < CALENDAR[1] and (days := span(text)):
        return to_seconds(days[0])
    try:
        number = float(value)
    except (TypeError, ValueError):
        return to_seconds(datetime.datetime.fromisoformat(text))
    if isinstance(value, bool) or abs(number) < SMALLEST:
        raise ValueError("not a time")
    return number / 1000 if abs(number) > MILLISECONDS else number


def to_seconds(date: datetime.date) -> float:
    """Return seconds since 1970; a day is its first second, a time without a zone is UTC."""
    if not isinstance(date, datetime.datetime):
        date = datetime.datetime(date.year, date.month, date.day)
    return (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()


def check_format(form: str) -> None:
    """Raise a TicError if a date format is not valid."""
    if form in FORMATS:
        return
    problem = f"--date-format {form!r} is not {', '.join(FORMATS)} or a format such as %d.%m.%Y"
    if "%" not in form:
        raise TicError(problem)
    try:
        datetime.datetime.strptime(datetime.datetime(2020, 2, 3, 4, 5, 6).strftime(form), form)
    except (ValueError, re.error) as error:
        raise TicError(f"{problem}: {error}") from None


def count_months(days: Counter[int]) -> Counter[datetime.date]:
    """Return first day of a month -> rows, of day counted from 1970 -> rows; a TicError if there are none."""
    months = Counter()
    for day, count in days.items():
        months[datetime.date.fromordinal(EPOCH + day).replace(day=1)] += count
    if not months:
        raise TicError("the input has no row with a date")
    return months


def suggest_steps(months: Counter[datetime.date], steps: int) -> list[tuple[str, int]]:
    """Return (name, samples) of near-equal steps, which begin where a month does; a TicError if there are too few."""
    names = sorted(months)
    if not 1 <= steps <= len(names):
        raise TicError(f"--suggest {steps}: the rows are in {len(names)} months, so give 1 to {len(names)}")
    totals, cuts = list(accumulate((months[name] for name in names), initial=0)), [0]
    for step in range(1, steps):
        choices = range(cuts[-1] + 1, len(names) - (steps - step) + 1)
        cuts.append(min(choices, key=lambda i: abs(totals[i] * steps - totals[-1] * step)))
    starts = [*names, (names[-1] + 31 * DAY).replace(day=1)]
    return [(name_span(starts[a], starts[b]), totals[b] - totals[a]) for a, b in pairwise([*cuts, len(names)])]
