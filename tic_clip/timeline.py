"""Names of time spans (2020, 2020Q1, 202003, 20200331, 2017-2018) and the days they cover."""

import datetime
import re

DAY = datetime.timedelta(days=1)


def span(name: str) -> tuple[datetime.date, datetime.date] | None:
    """Return the first day of ``name`` and the day after its last, or None if it is not a date.

    Dates are a year, quarter, month or day (2020, 2020Q1, 202003, 20200331), or a range of two (2017-2018).
    """
    parts = [_read_date(part) for part in name.split("-")]
    if len(parts) > 2 or None in parts or parts[0][0] > parts[-1][0]:
        return None
    return parts[0][0], parts[-1][1]


def _read_date(text: str) -> tuple[datetime.date, datetime.date] | None:
    found = re.fullmatch(r"(\d{4})(?:Q([1-4])|(\d\d)(\d\d)?)?", text)
    if not found:
        return None
    year, quarter, month, day = (int(part) if part else None for part in found.groups())
    try:
        if day is not None:
            date = datetime.date(year, month, day)
            return date, date + DAY
        first = month if month is not None else 3 * (quarter or 1) - 2
        after = 12 * year + first - 1 + (1 if month is not None else 3 if quarter else 12)
        return datetime.date(year, first, 1), datetime.date(after // 12, after % 12 + 1, 1)
    except ValueError:
        return None


def name_span(start: datetime.date, end: datetime.date) -> str:
    """Return the shortest name of the days from ``start`` to before ``end``: 2014-2016, 201401-201606, 20140101."""
    last = end - DAY
    for form in ("%Y", "%Y%m", "%Y%m%d"):
        ends = dict.fromkeys((f"{start:{form}}", f"{last:{form}}"))
        if span(name := "-".join(ends)) == (start, end):
            return name
    raise ValueError(f"{start} is not before {end}")


def cut_spans(every: str, start: datetime.date, end: datetime.date) -> list[str]:
    """Return the names of all years, quarters or months that overlap ``start`` to before ``end``."""
    months = {"year": 12, "quarter": 3, "month": 1}[every]
    first, last = (12 * date.year + date.month - 1 for date in (start, end - DAY))
    form = {"year": "{0}", "quarter": "{0}Q{1}", "month": "{0}{2:02d}"}[every]
    firsts = range(first // months * months, last + 1, months)
    return [form.format(month // 12, month % 12 // 3 + 1, month % 12 + 1) for month in firsts]


def cutoff(name: str) -> int | None:
    """Return the last month of ``name`` (2020, 201603, 2017-2018) as YYYYMM, or None if it is not a date."""
    days = span(name)
    return int(f"{days[1] - DAY:%Y%m}") if days else None
