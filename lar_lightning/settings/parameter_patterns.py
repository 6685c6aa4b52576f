"""How parameters look: regular expressions for values that a task brings with it.

They are held against the text of each action. Light to import, for the settings.
"""

_EXTENSIONS = (
    "bash|cfg|conf|cpp|css|csv|db|docx?|exe|git|gradle|gz|html?|ini|ipynb|jar|java|jpe?g|js|jsonl?|"
    "jsx|kt|log|md|pdf|php|png|properties|py|rb|rs|scala|sh|sql|sqlite|svg|tar|toml|ts|tsv|tsx|txt|"
    "xlsx?|xml|ya?ml|zip"
)

PARAMETER_PATTERNS = (
    # UUID
    r"\b[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b",
    # e-mail address; it begins where a word does, or it would be looked for from every letter
    r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
    # URL
    r"\b(?:https?|ftp)://[^\s\"'<>`\\\]})]+|\bwww\.[\w-]+(?:\.[\w-]+)+",
    # absolute path, but no closing tag, fraction or comment
    r"(?<![\w<./:])~?/[\w.@+-]+(?:/[\w.@+-]+)*/?",
    # relative path of three or more parts, or beginning with a dot
    r"(?<![\w./])(?:\.{1,2}|[\w.@+-]+/[\w.@+-]+)/[\w.@+-]+(?:/[\w.@+-]+)*",
    # name of a file
    rf"(?<![\w.])[\w-]+(?:\.[\w-]+)*\.(?:{_EXTENSIONS})\b",
    # id: behind a number sign, of capitals and digits, or a longer word with digits inside
    r"#\w*\d\w*",
    r"\b(?=[A-Z]*\d)(?=\d*[A-Z])[A-Z0-9]{5,}\b",
    r"\b(?=\w*\d)(?=\w*[^\W\d_])\w{8,}\b",
    # ISO date, with or without a time
    r"\b\d{4}-\d{2}-\d{2}(?:[T ]\d{2}:\d{2}(?::\d{2})?)?\b",
)
"""UUIDs, e-mail addresses, URLs, paths and file names, ids, ISO dates."""
