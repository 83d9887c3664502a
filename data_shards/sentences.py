"""Where sentences start, by rule and for most languages that end them with a mark.

Good enough to cut passages at natural places; nothing depends on a sentence being one.
"""

import re

# Words before a full stop that do not end a sentence, in lower case, without the last full stop.
ABBREVIATIONS = frozenset(
    """
    mr mrs ms dr prof rev hon st sr jr gen col lt capt sgt gov sen rep pres
    no nos vol vols fig figs eq eqs sec secs ch chap pp p ed eds al ca cf approx dept est inc ltd co corp
    e.g i.e viz vs resp incl ex op cit ibid
    jan feb mar apr jun jul aug sep sept oct nov dec
    z.b d.h bzw nr bd abb usw mme mlle m
    """.split()  # noqa: SIM905 (a table is read more easily than a list of quotes)
)
# A full stop needs white space and something that can open a sentence; the marks of CJK, Arabic and Indic scripts
# need neither. A blank line always ends a sentence.
BOUNDARY = re.compile(
    r"""
      (?P<stop> [.!?…]+ [\"'”’»)\]]* ) (?P<gap>\s+) (?= [\"'“‘«(\[¿¡]* [^\W_a-zß-öø-ÿ] | [\"“‘«¿¡•*-] )
    | [。！？｡]+ [」』”’）]* \s*
    | [؟۔।॥]+ \s+
    | \n \s* \n \s*
    """,
    re.VERBOSE,
)
LAST_WORD = re.compile(r"[^\s(\[\"'“‘]*$")


def sentence_starts(text: str) -> list[int]:
    """Index of the first character of every sentence, in order; the first is 0. [] for an empty text.

    The white space between two sentences belongs to the first.
    """
    if not text:
        return []
    starts = [0]
    for match in BOUNDARY.finditer(text):
        if match.end() >= len(text):
            break
        if match["stop"] == "." and _is_abbreviation(text, match.start()):
            continue
        starts.append(match.end())
    return starts


def _is_abbreviation(text: str, stop: int) -> bool:
    """Whether the full stop at `stop` follows an abbreviation or an initial ("J. Smith", "U.S. Army")."""
    word = LAST_WORD.search(text, max(0, stop - 12), stop)[0]
    return word.lower() in ABBREVIATIONS or re.fullmatch(r"(?:[^\W\d_]\.)*[^\W\d_]", word) is not None
