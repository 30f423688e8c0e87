"""S3 connections configured by the environment, and messages for their errors; used only inside `vilseg.storage`."""

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pyarrow.fs import AwsStandardS3RetryStrategy, FileType, S3FileSystem

from vilseg.errors import StorageError, StoreUnavailable

# A connection to an address that does not answer fails after ATTEMPTS * CONNECT_TIMEOUT_S and the pauses between, 8 s in total.
ATTEMPTS = 3
CONNECT_TIMEOUT_S = 2.0
# Maximum time without data on an open connection; a busy store may need seconds to assemble a large object.
REQUEST_TIMEOUT_S = 20.0
# The same for the small requests through boto3 at the start of a job, for which a user waits.
ANSWER_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of an S3 connection; equal settings share one connection."""

    access_key: str | None
    secret_key: str | None = field(repr=False)
    session_token: str | None = field(repr=False)
    region: str | None
    endpoint: str | None
    ca_file: str | None


def read_settings() -> Settings:
    """Read the settings from the current environment; an empty variable counts as not set.

    Raises:
        StorageError: only one of ``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY`` is set; or the endpoint is not an http or
            https URL with a host, or has a path, a user name or a password.
    """

    def first(*names: str) -> str | None:
        return next((os.environ[key] for key in names if os.environ.get(key)), None)

    settings = Settings(
        access_key=first("AWS_ACCESS_KEY_ID"),
        secret_key=first("AWS_SECRET_ACCESS_KEY"),
        session_token=first("AWS_SESSION_TOKEN"),
        region=first("AWS_REGION", "AWS_DEFAULT_REGION"),
        endpoint=first("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        ca_file=first("AWS_CA_BUNDLE"),
    )
    if (settings.access_key is None) != (settings.secret_key is None):
        raise StorageError("of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY only one is set: set both or neither")
    if settings.endpoint is not None:
        parts = urlsplit(settings.endpoint)
        if "@" in parts.netloc:
            raise StorageError("AWS_ENDPOINT_URL holds a user name or password: set AWS_ACCESS_KEY_ID and its secret")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            raise StorageError(
                f"AWS_ENDPOINT_URL is {settings.endpoint!r}: give http://host:port or https://host:port and no path"
            )
    return settings


@functools.lru_cache(maxsize=8)  # keyed by the settings, so that a change of the environment takes effect
def connect(settings: Settings, *, for_upload: bool = False) -> S3FileSystem:
    """Return the pyarrow filesystem for ``settings``.

    Args:
        settings: settings of the connection.
        for_upload: optimize for output streams that get a whole file in one write and are closed explicitly. A small object then
            takes one request instead of three, and a large one is not copied to memory for sending in the background. A missing
            bucket is only reported by an error when the stream is closed, and `pyarrow.fs.copy_files` ignores that error.
    """
    options: dict[str, Any] = {}
    if settings.access_key is not None:
        options.update(
            access_key=settings.access_key, secret_key=settings.secret_key, session_token=settings.session_token
        )
    if settings.endpoint is not None:
        parts = urlsplit(settings.endpoint)
        options.update(scheme=parts.scheme, endpoint_override=parts.netloc)
    # A self-hosted store has no region, but signatures must name one; for Amazon, the profile may define it.
    region = settings.region or ("us-east-1" if settings.endpoint else None)
    if region is not None:
        options.update(region=region)
    if settings.ca_file is not None:
        options.update(tls_ca_file_path=settings.ca_file)
    return S3FileSystem(
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        allow_delayed_open=for_upload,
        background_writes=not for_upload,
        **options,
    )


@functools.lru_cache(maxsize=8)
def boto_client(settings: Settings, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
    """Return a boto3 client, for requests that pyarrow does not offer: the reason why a bucket is refused, and paged listings."""
    import boto3  # here, because the import takes a third of a second, which local runs and most workers can save
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=settings.endpoint,
        aws_access_key_id=settings.access_key,
        aws_secret_access_key=settings.secret_key,
        aws_session_token=settings.session_token,
        region_name=settings.region or ("us-east-1" if settings.endpoint else None),
        verify=settings.ca_file,
        config=Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=timeout_s,
            retries={"total_max_attempts": 2, "mode": "standard"},
            proxies={},  # as pyarrow, which ignores proxies of the environment, so that checks use the same route
            s3={"addressing_style": "path" if settings.endpoint else "auto"},
        ),
    )


def list_keys(uri: str, path: str, after: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield (key relative to the folder ``path``, size in bytes) of every object, in the order of the store, by pages of 1,000.

    Args:
        uri: URI of the folder, for error messages.
        path: the folder as "bucket" or "bucket/folder".
        after: relative key after which the listing starts; "" lists all.
        prefix: prefix of the relative keys to list; "" lists all.

    Raises:
        StorageError: the store does not answer or refuses.
    """
    from botocore.exceptions import BotoCoreError, ClientError  # here, because the import is slow and seldom needed

    bucket, _, folder = path.partition("/")
    base = f"{folder}/" if folder else ""
    request = {"Bucket": bucket, "Prefix": base + prefix, **({"StartAfter": base + after} if after else {})}
    while True:
        try:
            # boto3 requests percent-encoded keys and decodes them, because XML cannot represent every character.
            page = boto_client(read_settings(), timeout_s=REQUEST_TIMEOUT_S).list_objects_v2(**request)
        except (BotoCoreError, ClientError) as error:
            raise failure(uri, path, "list", error) from error
        for found in page.get("Contents", ()):
            if not found["Key"].endswith("/"):  # not the marker of a folder
                yield found["Key"][len(base) :], found["Size"]
        if not page["IsTruncated"]:
            return
        request = {"Bucket": bucket, "Prefix": request["Prefix"], "ContinuationToken": page["NextContinuationToken"]}


# Error codes: pyarrow's names ("AWS Error NAME"), the S3 protocol's, HTTP status codes of answers without a body, and boto3's
# exception classes.
_UNREACHABLE = {
    *("NETWORK_CONNECTION", "REQUEST_TIMEOUT"),
    *("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError", "SSLError"),
}
_BUSY = {
    *("INTERNAL_FAILURE", "SERVICE_UNAVAILABLE", "SLOW_DOWN", "THROTTLING", "UNKNOWN", "500", "502", "503", "504"),
    *("InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout"),
}
"""Error codes of a store that is starting up or overloaded."""
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}
_REFUSED = {
    *("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_SIGNATURE", "EXPIRED_TOKEN"),
    *("UNRECOGNIZED_CLIENT", "INVALID_CLIENT_TOKEN_ID", "MISSING_AUTHENTICATION_TOKEN", "401", "403"),
    *("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"),
}
_OTHER_REGION = {"301", "PERMANENT_REDIRECT", "PermanentRedirect"}
_BUCKET_MISSING = {"NO_SUCH_BUCKET", "NoSuchBucket", "404"}


def _code(error: Exception) -> str:
    """Return the error code: for pyarrow from the message, for boto3 from the response or the class name."""
    response = getattr(error, "response", None)
    if response is not None:
        return str(response["Error"]["Code"])
    match = re.search(r"AWS Error (?:UNKNOWN \(HTTP status (\d+)\)|(\w+))", str(error))
    return (match.group(1) or match.group(2)) if match else type(error).__name__


def failure(uri: str, path: str, action: str, error: Exception) -> StorageError:
    """Convert an error of pyarrow or boto3 to a `StorageError`.

    Args:
        uri: URI on which the request failed.
        path: location of ``uri`` in the form "bucket/key".
        action: verb for the request: "read", "write", ...
        error: error of pyarrow or boto3.
    """
    code = _code(error)
    kind = StoreUnavailable if code in _UNREACHABLE | _BUSY else StorageError
    return kind(_sentence(uri, path, action, error, code))


def _sentence(uri: str, path: str, action: str, error: Exception, code: str) -> str:
    endpoint = read_settings().endpoint
    store = f"the object store at {endpoint}" if endpoint else "Amazon S3"
    bucket = path.partition("/")[0]
    problem = f"cannot {action} {uri}: "
    if code in _UNREACHABLE:
        why = re.search(r"curlCode: \d+, ([^;]+)", str(error))
        reason = f" ({why.group(1).strip()})" if why else ""
        advice = "is the store running? `vilseg store up` starts the embedded one"
        if endpoint is None:
            advice = "set AWS_ENDPOINT_URL if the bucket is in another store, such as that of `vilseg store up`"
        return problem + f"{store} does not answer{reason}; {advice}"
    if code in _NO_CREDENTIALS:
        return problem + "no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if code in _REFUSED:
        return problem + (
            f"{store} refused access to bucket {bucket!r}; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what "
            "they may do"
        )
    if code in _OTHER_REGION:
        return problem + f"bucket {bucket!r} is in another region; set AWS_REGION to it"
    if code in _BUCKET_MISSING or (isinstance(error, FileNotFoundError) and _lacks_bucket(bucket)):
        return problem + f"{store} has no bucket {bucket!r}; create it or correct the URI"
    if isinstance(error, FileNotFoundError):
        return f"{uri} does not exist"
    return problem + f"{store} failed ({str(error).splitlines()[0]})"


def _lacks_bucket(bucket: str) -> bool:
    try:
        return connect(read_settings()).get_file_info(bucket).type == FileType.NotFound
    except OSError:
        return False  # credentials that may read objects but not query the bucket: then the object is missing
