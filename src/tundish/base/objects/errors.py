"""What is wrong with a store and what to do, in a sentence, from what its client raised."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tundish.base.objects.contract import scheme_of
from tundish.base.text import printable, redacted
from tundish.errors import StoreError, TundishError

_LOGIN = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS to a key file, or run `gcloud auth application-default login`.",
    "azure": "Set AZURE_ACCOUNT_ACCESS_KEY, or run `az login`.",
    "oci": "Run `oci setup config`, or set OCI_CONFIG_FILE and OCI_CONFIG_PROFILE.",
    "hf": "Set HF_TOKEN, or run `huggingface-cli login`.",
}
_REACH = "Check the network, and S3_ENDPOINT_URL if the store is your own."
_SENTENCES = (
    # Signs in what an error and its causes say; what is wrong; what to do. `{login}` is from _LOGIN.
    (r"ConfigFileNotFound|ProfileNotFound|InvalidConfig", "there are no usable credentials", "{login}"),
    (r"NoSuchBucket|BucketNotFound|bucket does not exist|ContainerNotFound|container does not exist|RepositoryNotFound",
     "the bucket does not exist", "Create it, or correct its name."),
    (r"InvalidAccessKeyId", "the access key does not exist there",
     "Check AWS_ACCESS_KEY_ID, AWS_PROFILE and S3_ENDPOINT_URL."),
    (r"SignatureDoesNotMatch|AuthenticationFailed|InvalidAuthenticationInfo", "the secret key is wrong",
     "Check the credentials. {login}"),
    (r"ExpiredToken|TokenRefreshRequired|InvalidToken", "the credentials have expired", "Log in again. {login}"),
    (r"RequestTimeTooSkewed", "the clock of this machine is wrong", "Set it."),
    (r"redirect without LOCATION|PermanentRedirect|AuthorizationHeaderMalformed",
     "the bucket is in another region", "Set AWS_REGION to the bucket's."),
    (r"status'?: 401|Unauthenticated|401 Unauthorized|NotAuthenticated",
     "the credentials are not accepted (401)", "{login}"),
    (r"status'?: 403|PermissionDenied|403 Forbidden|GatedRepo", "access denied (403)",
     "Check that these credentials may read and write there. {login}"),
    (r"status'?: 404|404 Not Found|EntryNotFound|No such file", "it does not exist", "Check the address."),
    (r"status: 412|Precondition", "it was replaced while it was read", "Try again."),
    (r"[Pp]arsing Path \"([^\"\n]{,200})", r"the key '\1' cannot be read",
     "No part of a key may be empty, '.', '..' or unprintable. Rename the object."),
    (r"dns error|failed to lookup|Name or service not known|NameResolution", "the host name cannot be resolved",
     _REACH),
    (r"Connection refused", "connection refused", _REACH),
    (r"[Cc]ertificate|InvalidContentType|received corrupt message|tls handshake",
     "no secure connection (TLS) is possible",
     "Check that the endpoint speaks https, and set AWS_CA_BUNDLE for a certificate authority of your own."),
    (r"[Tt]imed ?[Oo]ut|operation timed out", "no answer in time", _REACH),
    (r"status'?: (5\d\d)", r"the server failed (\1)", "Try again later."),
    (r"Network is unreachable|No route to host|Connection reset|error sending request|ConnectionError",
     "cannot be reached", _REACH),
)  # fmt: skip


@contextmanager
def explained(address: str, *, anonymous: bool = False) -> Iterator[None]:
    """Turn what a client raises into a StoreError: the address, what is wrong, what to do."""
    try:
        yield
    except TundishError:
        raise
    except Exception as error:  # each client has its own errors, Rust's among them
        wrong, advice = explain(error, scheme_of(address), anonymous=anonymous)
        raise StoreError(f"{address}: {wrong}", advice) from error


@contextmanager
def store_errors_as(kind: type[TundishError]) -> Iterator[None]:
    """Turn a StoreError into an error of another kind with the same message."""
    try:
        yield
    except StoreError as error:
        raise kind(error.message) from error


def explain(error: Exception, scheme: str, *, anonymous: bool = False) -> tuple[str, str]:
    """What is wrong with a store, and what to do, from what its client raised."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return (
            f"{error.filename or 'this machine'}: {error.strerror}",
            "Make room or the file accessible, and try again.",
        )
    text = f"{type(error).__name__}: {error}"
    kind = {"r2": "s3", "abfss": "azure", "wasbs": "azure", "azure-dl": "azure"}.get(scheme, scheme)
    login = _LOGIN.get(kind, "")
    for sign, wrong, advice in _SENTENCES:
        if match := re.search(sign, text):
            wrong, advice = printable(match.expand(wrong)), advice.format(login=login).strip()
            if anonymous and re.search(r"40[13]", wrong):
                return f"{wrong}, and there are no credentials", login
            return wrong, advice
    first = printable(redacted(text).partition("\n")[0])[:300]
    return first.rstrip("."), "Check the address, the credentials, and that the store can be reached from here."
