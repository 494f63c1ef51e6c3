"""Kinds of tokens: of text by character, of HashHop by the role of a hash, of MQAR by number."""

import re

FUNCTION_WORDS = set(
    "a about after all also an and any are as at be because been before both but by can could did "
    "do does each for from had has have he her his how i if in into is it its many more most much "
    "not of on one or other she so some than that the their then there they this to was we were "
    "what when where which who will with would you your".split()
)
SYMBOLS = {
    "operator": "+-*/<>^%×÷",
    "equals sign": "=",
    "bracket": "()[]{}",
    "quote": "'\"`",
    "colon": ":",
}


def char_types(text):
    """For each character of a text the kind of token that it belongs to.

    >>> for text in ("7", "+", "(", ".", "Tom", "the", "apples", "USA", "aBc", " "):
    ...     print(repr(text), char_types(text)[0])
    '7' digit
    '+' operator
    '(' bracket
    '.' punctuation
    'Tom' capitalized
    'the' function word
    'apples' content word
    'USA' all caps
    'aBc' mixed letters
    ' ' blank
    """
    types = []
    for token in re.findall(r"\n|[^\S\n]+|\d+|[^\W\d_]+|.", text):
        types += [token_type(token)] * len(token)
    return types


def token_type(token):
    """The kind of a run of blanks, digits or letters, or of another character."""
    first = token[0]
    if first == "\n":
        return "new line"
    if first.isspace():
        return "blank"
    if first.isdigit():
        return "digit"
    if first.isalpha():
        return word_type(token)
    for name, characters in SYMBOLS.items():
        if first in characters:
            return name
    return "punctuation"


def word_type(word):
    if word in FUNCTION_WORDS:
        return "function word"
    if word.isupper() and len(word) > 1:
        return "all caps"
    if word.islower():
        return "content word"
    rest_is_lower = word[1:].islower() or len(word) == 1
    return "capitalized" if word[0].isupper() and rest_is_lower else "mixed letters"


HASHHOP_HEADER = re.compile(r"COMPLETION:\s+Hops=\d+\s+CoT=\w+")


def hashhop_types(text):
    """char_types of a HashHop problem, in which each hash has its role; None for another text.

    >>> text = "ab = cd\\ncd = 'ef'\\n\\nCOMPLETION:\\nHops=2\\n\\nCoT=True\\n\\nab = 'cd = ef'\\n"
    >>> types = hashhop_types(text)
    >>> for i in (0, 5, 14, 19, 49, 55, 60):
    ...     print(text[i : i + 2], types[i])
    ab key
    cd value
    ef value
    CO header
    ab asked hash
    cd hash in between
    ef answer
    """
    header = HASHHOP_HEADER.search(text)
    if header is None:
        return None
    types = char_types(text)
    types[header.start() : header.end()] = ["header"] * len(header[0])
    for match in re.finditer(r"\w+", text):
        start, end = match.span()
        if start < header.start():
            role = "key" if text.startswith(" =", end) else "value"
        elif start < header.end():
            continue
        elif text[start - 1] == "\n":
            role = "asked hash"
        elif text.startswith("'", end):
            role = "answer"
        else:
            role = "hash in between"
        types[start:end] = [role] * (end - start)
    return types


def token_types(run, ids):
    """tokens (T,) -> their kinds, by the first character of each; without text, by number."""
    if not hasattr(run.data, "tokenizer"):
        return [mqar_type(i, run.data.vocab_size) for i in ids]
    texts = [run.data.tokenizer.token_strings[int(i)] for i in ids]
    whole = "".join(texts)
    types_of_chars = hashhop_types(whole) or char_types(whole)
    types, start = [], 0
    for text in texts:
        # The token " the" is a word. Its leading blank does not decide.
        n_blanks = len(text) - len(text.lstrip()) if text.strip() else 0
        types.append(types_of_chars[start + n_blanks] if text else "special")
        start += len(text)
    return types


def mqar_type(token, vocab_size):
    """In MQAR token 0 is blank, and keys come before values."""
    if token == 0:
        return "blank"
    return "key" if token < vocab_size // 2 else "value"
