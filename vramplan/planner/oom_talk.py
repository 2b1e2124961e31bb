"""How to tell a report of a failure from talk about failures: prose, documentation, comments and source code."""

from __future__ import annotations

import re

from .oom_fields import without_prefix

TALK = re.compile(
    r"\b(?:if|when|whenever|avoid\w*|prevent\w*|unless|fix\w*|solv\w+|handl\w+|how|may|might|could|can|would|should|"
    r"in case|such as|e\.g|like|except|catch\w*|instead|causes?|leads?|without|risk\w*|likely|about|get|see|"
    r"common|typical\w*|raises?|throws?|means?|for|no|not|never|whether|as|you(?:'re)?)\b",
    re.IGNORECASE,
)
"""Words before a phrase that make it talk about failures."""
TALK_AFTER = re.compile(
    r"(?:[`'\"*]{1,3}\s+(?:errors?|exceptions?)\b|:\s+(?:if|when|raised|thrown)\b|\s+(?:errors?|issues?|problems?"
    r"|exceptions?|is|are|was|can|may|might|will|when(?! calling)|if|because|for|with|by|and|or|crash\w*|situations?"
    r"|conditions?|handling|killer|means|indicates|usually|typically)\b)",
    re.IGNORECASE,
)
"""Words after it that do."""
_REPORTS = re.compile(
    r"\b(?:\w*(?:Error|Exception)|error|warning|warn|fatal|critical|exception|fail|failed|failure|crashed|caught"
    r"|terminated|aborted)\b|what\(\)|\[[EF]\d{0,6} ",
    re.IGNORECASE,
)
CODE = re.compile(
    r"\s*(?:raise|except|if|elif|while|assert|return|def|class|import|from|print|with|case|log(?:ger|ging)?\.\w+)\b"
    r"|\s*[\w.]+ [+|]?= |\s*[\w.]+: [\w.\[\], |]{1,60} = |.*\bin str\(|.*isinstance\(|.*\.lower\(\)|\s*(?:#|//|@\w)"
    r"|\s*[(\[]{0,2}[rf]?[\"'].*[\"'][)\],]+\s*$|\s*(?![\w.]*(?:Error|Exception)\()[\w.]+\(.*\)\s*$"
)
"""Lines of source code, as tracebacks quote them and as people paste them."""

_QUOTED_IN_CODE = re.compile(
    r"\s*(?:raise|return|yield|assert)\b[^\"'\n]{0,80}[\"']|\s*[\w.]+(?:: [\w.\[\], |]{1,60})? \+?= [\w.(]{0,60}[\"']"
)
"""A message as a literal of source code, with whatever figures."""
_STATEMENT = re.compile(
    r"\s*(?:import \w|from [\w.]+ import|def \w+\(|class \w+[^\n]*:\s*$|[\w.]+\([^\n]*\)\s*$|[\w.\[\]]+ [-+|*/]?= "
    r"|(?:if|for|while|with|try|except|else|elif)\b[^\n]*:\s*$|return\b|@\w)"
)
_COMMENT = re.compile(r"[ \t]*(?:#|//)")
_HEADING = re.compile(
    r"#{1,6} +[\"'`*\[]{0,3}(?:[\w.]{0,80}(?:Error|Exception)\b|(?i:cuda|hip) (?:\w+ )?(?i:error)\b"
    r"|(?i:cuda|hip) out of memory\.? +Tried|Error out of memory at line)"
)
"""A question's title: an error's name follows the marks of a Markdown heading."""

_LISTED = re.compile(r"\s*(?:[*+-]|\d+\.)\s")
_SPAN_ENDS = re.compile(r"[^`\n]{0,200}`\W*\w")
"""An item of a list that quotes an error and goes on to speak of it."""

_PERSONAL = re.compile(
    r"(?i)\b(?:I|we)(?:'m|'ve| am| are)?\b[^.\n]{0,60}\b(?:get|got|getting|have|had|see|saw|hit|fac(?:e|ed|ing)"
    r"|encounter\w*|receiv\w*|r[ua]n(?:ning)? into|met)\b|\b(?:my|our)\b"
)
_HEDGED = re.compile(
    r"(?i)\b(?:if|avoid\w*|prevent\w*|unless|handl\w+|catch\w*|caught|except|may|might|could|would|should|without|never"
    r"|not|no|fix(?:ed|es)|like|such as|observed)\b"
)
_NAMED = re.compile(r"\w(?:Error|Exception): ?$")
"""A full error quoted by somebody who had it."""

_TEACHES = re.compile(
    r"(?i)\bif (?:you|one|users?)\b[^.\n]{0,40}\b(?:encounter|see|get|receive|run into|hit|meet|face|experience)s?\b"
    r"|\b(?:like|such as|similar to) (?:the (?:one|following)|this|these)\b|\byou (?:may|might|can|could|will) "
    r"(?:see|get|encounter|receive|hit|run into)\b|\bcommon (?:errors?|symptoms?|problems?)\b"
)
_DEFINES = re.compile(r"\s*exception [\w.]+\s*$")
_EXPLAINS = re.compile(
    r"(?i)(?:this |it )?(?:error )?(?:usually|typically|generally) (?:means|indicates|happens|occurs)"
    r"|(?:this|it|which) (?:error )?(?:means|indicates)\b|(?:exception )?(?:is )?(?:raised|thrown) (?:when|if)\b"
)
_ARTICLE = re.compile(
    r"(?im)^[\W\d]{0,6}(?:why (?:it|this) happens|causes? (?:&|and) (?:fix(?:es)?|solutions?)|how to fix(?: it| this)?"
    r"|(?:the )?meaning of this error(?: message)?(?: is)?|reasons? for (?:the |this )?error|don't try)\b[^\n]{0,6}$"
    r"|^[\W\d]{0,6}reasons? for (?:the |this )?error:"
)
"""Headings of an article about an error, on lines of their own below it."""
_ADVISES = re.compile(
    r"(?i)(?:reduce|lower|decrease|use|set|increase|enable|disable|restart|try|solution|cause|don't)\b"
)
_UNDERLINE = re.compile(r"[=~^]{3,}\s*$")

ARTICLE = 700
"""Characters below an error in which an article has its next heading."""
NEAR_LINES, NEAR = 30, 3000
"""Lines, and characters, around a place that are read to tell what kind of text it stands in."""


def line_of(text: str, first: int, last: int) -> str:
    """``text[first:last]``, where the marks of a heading that names an error are blanked out."""
    line = text[first:last]
    if line.startswith("#") and _HEADING.match(line) and not commented(text, first, last):
        marks = len(line) - len(line.lstrip("#"))
        return " " * marks + line[marks:]
    return line


def mentioned(line: str, start: int) -> bool:
    """Whether words before ``start``, or the line as source code, make it talk about a failure."""
    return bool(CODE.match(line) or TALK.search(without_prefix(line[:start])))


def talks(line: str, start: int, end: int, *, after: bool = True) -> bool:
    """Whether the phrase at ``start`` of a line is spoken of rather than reported."""
    before = line[:start]
    if CODE.match(line) or line.lstrip().startswith("|"):
        return True
    if _PERSONAL.search(before[-300:]) and _NAMED.search(before):
        return bool(_HEDGED.search(before))
    if after and (TALK_AFTER.match(line[end : end + 40]) or (_LISTED.match(line) and _SPAN_ENDS.match(line, end))):
        return True
    bare = without_prefix(before.replace("**", "")).strip("\"'`( \t")
    if not bare:
        if before.lstrip().startswith("**"):  # an error in bold, on a line of its own
            return not ("error" in line[start:end].lower() and line.rstrip().endswith("**"))
        return before.lstrip().startswith(("#", "//", "*"))
    return bool(TALK.search(bare)) or _REPORTS.search(before) is None


def taught(text: str, first: int, last: int) -> bool:
    """Whether what stands around the lines ``text[first:last]`` makes them documentation: an example with a preface, a
    definition, a section's title, an error followed by what it means or by advice. A traceback is none."""
    before = text[max(0, first - NEAR) : first]
    if "Traceback (most recent" in before:
        return False
    line = text[first:last]
    following = text[last : last + 400].lstrip("\n `*>")
    gap = "\n\n" in text[last : last + 8]
    title = following.split("\n", 1)[0]
    if _DEFINES.match(line) or _EXPLAINS.match(following.lstrip()) or (gap and _ADVISES.match(following)):
        return True
    if _ARTICLE.search(text, last, last + ARTICLE):
        return True
    if _UNDERLINE.match(title) and len(title.strip()) <= len(line.strip()) + 2:
        return True
    prefaces = (it for it in reversed(before.splitlines()) if it.strip() and not it.lstrip().startswith("```"))
    return bool(_TEACHES.search(next(prefaces, "")[-400:]) or _TEACHES.search(line[:200]))


def literal(text: str, first: int, last: int) -> bool:
    """Whether a line is a message in source code: raised, assigned, an argument on a line of its own, or a comment."""
    line = text[first:last]
    if _QUOTED_IN_CODE.match(line):
        return True
    if line.lstrip()[:1] in ("'", '"') and text[max(0, first - 200) : first].rstrip().endswith("("):
        return True
    return commented(text, first, last)


def commented(text: str, first: int, last: int) -> bool:
    """Whether a line is a comment with code beside it; a traceback that was pasted as one is none."""
    if not _COMMENT.match(text[first : first + 80]):
        return False
    above = text[max(0, first - NEAR) : first].splitlines()[::-1]
    below = text[last : last + NEAR].splitlines()
    for lines in (above[:NEAR_LINES], below[:NEAR_LINES]):
        for line in lines:
            if "Traceback (most recent" in line:
                return False
            if line.strip() and not _COMMENT.match(line):
                if _STATEMENT.match(line[:400]):
                    return True
                break
    return False
