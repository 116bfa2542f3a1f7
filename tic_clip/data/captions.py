"""Captions as one line of text: what YFCC's title, description and tags become, and what a RedCaps caption becomes."""

import re
from urllib.parse import unquote, unquote_plus

import ftfy

MAX_LENGTH = 500
"""Characters that a caption of YFCC has at most."""

_MENDING = ftfy.TextFixerConfig(unescape_html=True, explain=False)
_PLAIN = re.compile(r"[\t\n -%'-~]*")  # ASCII, no entity: nothing to mend, and mending takes 100 times as long

_BLOCKS = "address|article|blockquote|br|center|dd|div|dl|dt|h[1-6]|hr|li|ol|p|pre|table|td|th|tr|ul"
_NAME = r"[a-z][a-z0-9]*(?::[a-z]+)?(?=[\s/>])"
_QUOTED = r"""(?:[^<>"']|"[^"<]*"|'[^'<]*')*+>"""  # attributes, which may have > in quotes
_BREAK = re.compile(rf"</?(?:{_BLOCKS})\b(?:{_QUOTED}|[^<>]*>)", re.IGNORECASE)
_TAG = re.compile(rf"<!--(?:(?!<!--).)*?-->|</?{_NAME}(?:{_QUOTED}|[^<>]*>)", re.IGNORECASE | re.DOTALL)


def one_line(text: str) -> str:
    """``text`` with each run of white space as one space, and none around it."""
    return " ".join(text.split())


def plain_caption(texts: tuple[str, ...]) -> str:
    """The caption of a sample that has one as it should be (RedCaps), on one line; empty if it has none."""
    return one_line(texts[0])


def yfcc_caption(texts: tuple[str, ...]) -> str:
    """The caption of a sample of YFCC: the first 500 characters of "title. description. usertags", each cleaned.

    A field of which nothing is left is left out; the caption is empty if that is so of all of them.
    """
    return ". ".join(filter(None, map(clean_field, texts)))[:MAX_LENGTH]


def clean_field(text: str) -> str:
    """A field of YFCC100M's metadata as people read it: decoded, mended, without HTML tags, on one line."""
    return one_line(remove_tags(mend(decode(text))))


def decode(text: str) -> str:
    """Undo the URL encoding of a field; one with no white space has + for its spaces.

    YFCC100M's own fields are form-encoded, tag by tag, with commas between tags: ``Canon+PowerShot+ELPH+310+HS``,
    ``canon,canon+powershot+hs+310`` (https://lbsn.vgiscience.org/tutorial/yfcc-introduction/). The 15 M subset keeps
    them so; its card decodes them with ``unquote_plus`` (https://huggingface.co/datasets/dalle-mini/
    YFCC100M_OpenAI_subset). In a copy of the table that has been decoded already a + is a plus.
    """
    text = text.strip()
    return unquote(text) if len(text.split(maxsplit=1)) > 1 else unquote_plus(text)


def mend(text: str) -> str:
    """``text`` without mojibake, control characters and HTML entities, as ftfy does it."""
    return text if _PLAIN.fullmatch(text) else ftfy.fix_text(text, _MENDING)


def remove_tags(text: str) -> str:
    """``text`` without HTML tags and comments, a space for those that break a line; "1 < 2", "<3", "<me@home>" stay."""
    return _TAG.sub("", _BREAK.sub(" ", text)) if "<" in text else text
