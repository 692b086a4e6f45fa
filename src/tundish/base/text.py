"""Text for people and other machines: without secrets, and without control characters of terminals."""

import os
import re
from collections.abc import Iterator, Mapping
from urllib.parse import quote

MASK = "***"
INSTEAD_OF_SECRETS = (
    "Set a variable of the environment instead, which a run's processes get: HF_TOKEN, WANDB_API_KEY, "
    "MLFLOW_TRACKING_TOKEN or MLFLOW_TRACKING_PASSWORD, AWS_SECRET_ACCESS_KEY …"
)
SHORTEST_SECRET = 6
"""Shortest value of a variable that is masked wherever it occurs, in characters."""
SHORTEST_QUOTED = 3
"""Shortest one that is masked where it is quoted; elsewhere, words such as `true` would be masked."""

PLAIN_WORDS = frozenset(
    "anonymous changeme default disabled example nothing password placeholder secret testing token training undefined "
    "unknown unused".split()
)
"""Placeholders that people set as passwords; they are masked only where they are quoted, too."""

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_SECRET_NAME = re.compile(
    r"passw|passphrase|secret|credential|connection_?string|(access|account|api|private|shared)[_-]?key"
    r"|token$|pwd$|sshpass$|(?-i:[a-z]Key)$|(^|[_.-])(token|key|pwd|pass|pat|sas|sig|signature|auth|jwt|cookie)([_.-]|$)",
    re.IGNORECASE,
)
_NO_SECRET = re.compile(
    r"(old)?pwd|.*[_.-](file|path|dir|folder|sock|host|url|uri)|.*(bos|cls|eos|eot|image|mask|pad|sep|unk)_token(_\w+)?",
    re.IGNORECASE,
)
"""Names that look secret but are not: of files and folders that hold a secret, or of a tokenizer's tokens."""
_SAID_WITH_A_COLON = re.compile(r"passw|passphrase|secret|(access|api|private)[_-]?key", re.IGNORECASE)
"""Names that mask what follows their colon even in a sentence; `token: …` is often about tokens of text."""

_USER_AND_PASSWORD = re.compile(r"(?<=://)[^\s/:@]*:\S{0,1000}@")
"""Up to the last `@`: a password may hold `/` and `@`."""
_TOKEN_OF_A_SERVER = re.compile(r"(https?://)[^\s/]*@", re.IGNORECASE)
_NAME = re.compile(
    r"(?:(?P<in_address>[?&;]|%3F|%26|%3B)|(?<![\w%./-]))(?P<name>[a-z_][\w.-]*)"
    r"(?P<sign>(?P<quote>[\"']?)(?:\s?:\s?|\s?=\s?|%3D))",
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"(?P<quote>[\"'])(?P<quoted>[^\n]{1,2000}?)(?P=quote)"
    r"|[\"']?(?P<plain>\{[^}\n]{0,1000}\}|%7B.{0,1000}?%7D|(?:(?!%26|%3B)[^\s;&\"'])+)",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"(authorization[\"']?\s*[:=]\s*[\"']?)(?:(?:basic|bearer|digest|negotiate|token)\s+)?[^\s\"']+", re.IGNORECASE
)
_BEARER = re.compile(r"\b(bearer|basic)\s+(?=[\w.~+/-]*\d)[\w.~+/-]{8,}=*", re.IGNORECASE)
_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\bhf_[A-Za-z0-9]{20,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bdapi[0-9a-f]{32}(?:-\d)?|\bsk-[\w-]{20,}"
    r"|\bgh[opsu]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bglpat-[\w-]{20}|\bxox[abp]-[\w-]{10,}|\bAIza[\w-]{35}"
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+",
    re.DOTALL,
)
"""Secrets that are recognized anywhere by their prefix."""


def counted(number: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_text(size: float) -> str:
    """A number of bytes for people: `812 bytes`, `1.6 MB`, `141 GB`, in powers of 1,000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def printable(text: str) -> str:
    """`text` of others, for a terminal: what would command it is written out."""
    return text.translate(_CONTROLS).encode(errors="backslashreplace").decode()


def names_secret(name: str) -> bool:
    """Whether a variable, a key or a query's part of that name holds a secret."""
    return _SECRET_NAME.search(name) is not None and _NO_SECRET.fullmatch(name) is None


def redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` with `***` for every secret that is recognized in it, or that the environment holds.

    Masked are passwords in addresses, values of names that say what they are, authorization headers, and tokens with a
    known prefix. Masking twice changes nothing.
    """
    for secret in sorted(_secrets_of(environment), key=len, reverse=True):
        if len(secret) >= SHORTEST_SECRET and secret.lower() not in PLAIN_WORDS:
            text = text.replace(secret, MASK)
        else:
            text = re.sub(rf"""(?<=(["'`])){re.escape(secret)}(?=\1)|(?<=:){re.escape(secret)}(?=@)""", MASK, text)
    text = _SHAPES.sub(MASK, text)
    text = _HEADER.sub(rf"\1{MASK}", text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    text = _USER_AND_PASSWORD.sub(f"{MASK}@", text)
    text = _TOKEN_OF_A_SERVER.sub(rf"\1{MASK}@", text)
    return _without_values(text)


def holds_secret(address: str) -> bool:
    """Whether a password or a token stands in an address itself."""
    return redacted(address, {}) != address


def _secrets_of(environment: Mapping[str, str]) -> Iterator[str]:
    for name, value in environment.items():
        secrets = {value} if names_secret(name) and not os.path.exists(value) else set[str]()
        # An address's password may hold blanks, where it would end in a text.
        if address := re.search(r"://([^/:@]*:(.*))@", value):
            secrets |= {address[1], address[2]}
        for secret in secrets | {quote(secret, safe="") for secret in secrets}:
            if len(secret) >= SHORTEST_QUOTED:
                yield secret


def _without_values(text: str) -> str:
    """The values masked of all names that hold secrets; other values are looked into, too: an address may be one."""
    parts, end = list[str](), 0
    for name in _NAME.finditer(text):
        if name.start() < end or not _may_hold(name):
            continue
        value = _VALUE.match(text, name.end())
        if value is not None and not _is_harmless(name["name"], value["quoted"] or value["plain"]):
            around = value["quote"] or ""
            parts += [text[end : name.end()], around, MASK, around]
            end = value.end()
    return "".join([*parts, text[end:]])


def _may_hold(match: re.Match[str]) -> bool:
    name = match["name"]
    if name.lower() == "pwd" or match["in_address"] is not None:
        return name.lower() == "pwd" or names_secret(name)
    if name == "key":
        return False  # `key=value` is how help texts describe options
    assigns = ":" not in match["sign"] or bool(match["quote"]) or _SAID_WITH_A_COLON.search(name) is not None
    return assigns and names_secret(name)


def _is_harmless(name: str, value: str) -> bool:
    """A folder, and how far a run of so many tokens is."""
    return value.startswith("/") if name.lower() == "pwd" else name == "token" and bool(re.match(r"[\d,]+/\d", value))
