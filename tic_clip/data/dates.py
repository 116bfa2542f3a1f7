"""Read dates as tables have them: ISO 8601, seconds or milliseconds since 1970, years, a strftime format; in UTC."""

import datetime
import math
import re
from collections import Counter

from tic_clip import TicError
from tic_clip.timeline import DAY, cut_spans, name_span, span

FORMATS = ("auto", "year", "s", "ms")  # anything else is a format of strftime
MILLISECONDS = 1e11  # from this number on, which is the year 5138 in seconds and 1973 in milliseconds
FIRST, LAST = -30_610_224_000, 253_370_764_799  # seconds of the years 1000 to 9998: 0001 and 9999 stand for no date
SMALLEST = 1e6  # a smaller number is hardly a time in seconds, but a year, a month or a row's number
CALENDAR = (1800, 2200)  # years of digits that are read as a date (2020, 202003, 20200331), not as seconds
EPOCH = datetime.date(1970, 1, 1).toordinal()


def parse_date(value: object, form: str = "auto") -> int:
    """Return a date as seconds since 1970 (UTC); raise a ValueError if it is none of that form."""
    if isinstance(value, str):
        value = value.strip()
    try:
        seconds = math.floor(_parse(value, form))
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None
    if not FIRST <= seconds <= LAST:
        raise ValueError("not in the years 1000 to 9998")
    return seconds


def _parse(value: object, form: str) -> float:
    if isinstance(value, datetime.date):  # a datetime, too
        return _seconds(value)
    if form == "year":
        return _seconds(datetime.date(int(value), 1, 1))
    if form in ("s", "ms"):
        return float(value) / (1000 if form == "ms" else 1)
    if form != "auto":
        return _seconds(datetime.datetime.strptime(str(value), form))
    text = str(value).removesuffix(".0")  # 2020.0 is how pandas writes a year in a column with a gap
    if re.fullmatch(r"\d{4}-\d{2}", text):
        text = text.replace("-", "")
    if re.fullmatch(r"\d{4}|\d{6}|\d{8}", text) and CALENDAR[0] <= int(text[:4]) < CALENDAR[1] and (days := span(text)):
        return _seconds(days[0])
    try:
        number = float(value)
    except (TypeError, ValueError):
        return _seconds(datetime.datetime.fromisoformat(text))
    if isinstance(value, bool) or abs(number) < SMALLEST:
        raise ValueError("not a time; --date-format s reads small numbers as seconds")
    return number / 1000 if abs(number) > MILLISECONDS else number


def _seconds(date: datetime.date) -> float:
    """Return the seconds of a date; a day is its first second, a time without a zone is of UTC."""
    if not isinstance(date, datetime.datetime):
        date = datetime.datetime(date.year, date.month, date.day)
    return (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()


def check_format(form: str) -> None:
    """Raise a TicError if a format of dates is not one."""
    if form in FORMATS:
        return
    problem = f"--date-format {form!r} is not {', '.join(FORMATS)} or a format such as %d.%m.%Y"
    if "%" not in form:
        raise TicError(problem)
    try:
        datetime.datetime.strptime(datetime.datetime(2020, 2, 3, 4, 5, 6).strftime(form), form)
    except (ValueError, re.error) as error:
        raise TicError(f"{problem}: {error}") from None


def read_date(value: object, form: str) -> int | None:
    """Return a date as seconds since 1970 (UTC), or None if it is none."""
    try:
        return parse_date(value, form)
    except ValueError:
        return None


def first_second(day: datetime.date) -> int:
    """Return the seconds since 1970 of the beginning of a day."""
    return (day.toordinal() - EPOCH) * 86_400


class Months:
    """Counts the dates of each month, by its first day, and those that can't be read, of which it keeps three."""

    def __init__(self) -> None:
        self.counts: Counter[datetime.date] = Counter()
        self.bad, self.first = 0, []

    def add(self, seconds: int | None, where: str, value: object) -> None:
        """Count a date that ``read_date`` has read, and where it stands."""
        if seconds is None:
            self.bad += 1
            self.first += [f"{where}: {'' if value is None else str(value)[:60]!r}"] * (self.bad <= 3)
        else:
            self.counts[first_of_month(seconds // 86_400)] += 1

    def check(self, skip_bad_rows: bool) -> None:
        """Raise a TicError if dates can't be read, which must not be left out, or if there is none."""
        if self.bad and not skip_bad_rows:
            advice = "--date-format says how they are written, --skip-bad-rows leaves such rows out"
            raise TicError(f"{self.bad:,} dates can't be read ({'; '.join(self.first)}); {advice}")
        if not self.counts:
            raise TicError(f"the input has no row with a date; {self.bad:,} dates can't be read")


def first_of_month(day: int) -> datetime.date:
    """Return the first day of the month of a day, counted from 1970."""
    return datetime.date.fromordinal(EPOCH + day).replace(day=1)


def cut_every(every: str, months: Counter[datetime.date]) -> list[str]:
    """Return the names of all years, quarters or months from the first to the last month that has rows."""
    return cut_spans(every, min(months), _month_after(max(months)))


def _month_after(month: datetime.date) -> datetime.date:
    return (month + 31 * DAY).replace(day=1)


def suggest_steps(months: Counter[datetime.date], steps: int) -> list[tuple[str, int]]:
    """Return (name, samples) of near-equal steps, which begin where a month does; a TicError if there are too few."""
    names = sorted(months)
    if not 1 <= steps <= len(names):
        raise TicError(f"--suggest {steps}: the rows are in {len(names)} months, so give 1 to {len(names)}")
    totals, cuts = [0], [0]
    for name in names:
        totals.append(totals[-1] + months[name])
    for step in range(1, steps):
        choices = range(cuts[-1] + 1, len(names) - (steps - step) + 1)
        cuts.append(min(choices, key=lambda i: abs(totals[i] * steps - totals[-1] * step)))
    cuts.append(len(names))
    starts = [names[i] for i in cuts[:-1]] + [_month_after(names[-1])]
    return [(name_span(starts[i], starts[i + 1]), totals[cuts[i + 1]] - totals[cuts[i]]) for i in range(steps)]
