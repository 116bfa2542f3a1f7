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


def plain_caption(texts: tuple[str, ...]) -> str:
    """Return the caption of a sample that has one as it should be (RedCaps), on one line."""
    return " ".join(texts[0].split())


def yfcc_caption(texts: tuple[str, ...]) -> str:
    """Return the first 500 characters of "title. description. usertags", cleaned, without those that are empty."""
    return ". ".join(filter(None, map(clean_field, texts)))[:MAX_LENGTH]


def clean_field(text: str) -> str:
    """Return a field of YFCC100M's metadata as people read it: decoded, mended, without HTML tags, on one line."""
    return " ".join(remove_tags(mend(decode(text))).split())


def decode(text: str) -> str:
    """Undo the URL encoding of a field; in one with no white space + is a space.

    YFCC100M's own fields are form-encoded, tag by tag, with commas between tags, ``canon,canon+powershot+hs+310``
    (https://lbsn.vgiscience.org/tutorial/yfcc-introduction/), and the 15 M subset keeps them so
    (https://huggingface.co/datasets/dalle-mini/YFCC100M_OpenAI_subset). In a decoded copy of the table + is a plus.
    """
    text = text.strip()
    return unquote(text) if len(text.split(maxsplit=1)) > 1 else unquote_plus(text)


def mend(text: str) -> str:
    """Remove mojibake, control characters and HTML entities, as ftfy does it."""
    return text if _PLAIN.fullmatch(text) else ftfy.fix_text(text, _MENDING)


def remove_tags(text: str) -> str:
    """Remove HTML tags and comments, a space for those that break a line; "1 < 2", "<3" and "<me@home>" stay."""
    return _TAG.sub("", _BREAK.sub(" ", text)) if "<" in text else text
