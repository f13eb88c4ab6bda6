"""
Who is compared: one entry for each way to get a model, and the commands they are.
"""

from __future__ import annotations

import base64
import importlib.util
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from listings import AZURE_ACCOUNT

if TYPE_CHECKING:
    from identity import IdentityServices

_CLIENTS = Path(__file__).with_name("clients.py")


@dataclass(frozen=True, kw_only=True)
class Job:
    """
    One download or listing: from where, and to where.

    Attributes:
        destination: An empty directory. `home` is another, for what a client keeps beside it.
        ca: The certificate that signed the endpoint's, if that speaks TLS.
        files: How many there are.
        google: The file of a service account that may read the origin, if that has such.
    """

    uri: str
    endpoint: str
    destination: Path
    home: Path
    ca: Path | None
    files: int
    google: Path | None = None

    @property
    def environ(self) -> dict[str, str]:
        """The same for every client: only what is needed, and nothing of the user's."""
        trust = (
            {}
            if self.ca is None
            else dict.fromkeys(("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), str(self.ca))
        )
        return {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "AWS_ACCESS_KEY_ID": "testkey",
            "AWS_SECRET_ACCESS_KEY": "testsecret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
            **trust,
        }


@dataclass(frozen=True, kw_only=True)
class Peer:
    """
    One way to do a job.

    Attributes:
        missing: Why it cannot take part, or None.
        prints_directory: Whether the last line of its output says where the files are; else they are in the
            destination.
        extra: What it needs in its environment beside the job's.
        copies: How often the model may lie in the destination at once, at worst.
        needs_hub: Whether it speaks to another service than S3.
        wants_archive: Whether it is given the archive of the model, and `unpacks` whether it leaves the files of the
            model.
    """

    name: str
    command: Callable[[Job], list[str]]
    missing: Callable[[], str | None]
    prints_directory: bool = False
    extra: Callable[[Job], Mapping[str, str]] = field(default=lambda job: {})
    copies: int = 1
    needs_hub: bool = False
    wants_archive: bool = False
    unpacks: bool = False


def _python(
    name: str, client: str, *modules: str, uri: Callable[[Job], str] = lambda job: job.uri, **more: object
) -> Peer:
    def command(job: Job) -> list[str]:
        # -P: what lies beside the script is no module of the client's.
        return [
            sys.executable,
            "-P",
            str(_CLIENTS),
            client,
            uri(job),
            *([] if client.endswith(_LISTING) else [str(job.destination)]),
        ]

    def missing() -> str | None:
        absent = [f"`{module}`" for module in modules if not _is_installed(module)]
        return f"without {', '.join(absent)}, which is not installed" if absent else None

    return Peer(name=name, command=command, missing=missing, **more)  # type: ignore[arg-type]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


_LISTING = ("_list", "_resolve", "_plan")


def _binary(program: str) -> str | None:
    """The program itself, not the Python script that a package may have put before it."""
    if spec := importlib.util.find_spec(program):
        inside = Path(str(spec.origin)).with_name("bin") / program
        if inside.exists():
            return str(inside)
    beside = Path(sys.executable).with_name(program)
    return str(beside) if beside.exists() else shutil.which(program)


def _native(
    name: str, program: str, arguments: Callable[[Job], list[str]], *, then_hash: str | None = None, **more: object
) -> Peer:
    def command(job: Job) -> list[str]:
        download = [str(_binary(program)), *arguments(job)]
        return ["sh", "-c", f"{shlex.join(download)} && {_hash_all(job, then_hash)}"] if then_hash else download

    def missing() -> str | None:
        if then_hash and shutil.which(then_hash.split()[0]) is None:
            return f"there is no `{then_hash}` to hash with"
        return None if _binary(program) else f"there is no `{program}`"

    return Peer(name=name, command=command, missing=missing, **more)  # type: ignore[arg-type]


def _hash_all(job: Job, program: str) -> str:
    """
    Hash every file, two at a time.

    The fair comparison is with `openssl`: it uses the processor's instructions for SHA-256, and the `sha256sum` of many
    systems does not. That takes up to six times as long, and flatters whoever hashes on the way.
    """
    batch = max(1, job.files // 16)
    place = shlex.quote(str(job.destination))
    return f"find {place} -type f -print0 | xargs -0 -P 2 -n {batch} {program} > /dev/null"


def _s5cmd(job: Job) -> list[str]:
    return ["--endpoint-url", job.endpoint, "--log", "error", "cp", f"{job.uri}/*", f"{job.destination}/"]


def _rclone(job: Job) -> list[str]:
    return ["copy", f"origin:{job.uri.removeprefix('s3://')}", str(job.destination)]


def _rclone_environ(job: Job) -> Mapping[str, str]:
    settings = {
        "TYPE": "s3",
        "PROVIDER": "Other",
        "ENV_AUTH": "true",
        "ENDPOINT": job.endpoint,
        "FORCE_PATH_STYLE": "true",
    }
    return {f"RCLONE_CONFIG_ORIGIN_{name}": value for name, value in settings.items()}


def _hugging_face_environ(job: Job) -> Mapping[str, str]:
    return {
        "HF_ENDPOINT": job.endpoint,
        "HF_HOME": str(job.home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def _by(scheme: str) -> Callable[[Job], str]:
    """The same bucket and prefix at another service."""
    return lambda job: f"{scheme}://{job.uri.removeprefix('s3://')}"


def _by_http(job: Job) -> str:
    return f"{job.endpoint}/{job.uri.removeprefix('s3://')}"


def _google_environ(job: Job) -> Mapping[str, str]:
    return {
        "STORAGE_EMULATOR_HOST": job.endpoint,
        "GOOGLE_APPLICATION_CREDENTIALS": str(job.google),
        "GOOGLE_CLOUD_PROJECT": "bench",
    }


def _azure_environ(credential: str) -> Callable[[Job], Mapping[str, str]]:
    def environ(job: Job) -> Mapping[str, str]:
        account = f"AccountName={AZURE_ACCOUNT};BlobEndpoint={job.endpoint}/{AZURE_ACCOUNT}"
        return {"AZURE_STORAGE_CONNECTION_STRING": f"{account};{credential}"}

    return environ


def _http_environ(job: Job) -> Mapping[str, str]:
    return {"KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES": "1"}


def _source(name: str, client: str, *modules: str, **more: object) -> Peer:
    return _python(name, client, "kserve_pvc", *modules, prints_directory=True, needs_hub="uri" in more, **more)  # type: ignore[arg-type]


def _together(name: str, peer: Peer, count: int, **more: object) -> Peer:
    """So many of a peer, started at once for one destination; over when the last of them is."""
    script = 'p=; for i in $(seq "$0"); do "$@" & p="$p $!"; done; for i in $p; do wait "$i" || exit 1; done'
    return replace(peer, name=name, command=lambda job: ["sh", "-c", script, str(count), *peer.command(job)], **more)  # type: ignore[arg-type]


def _limited(name: str, peer: Peer, size_bytes: int) -> Peer:
    """A peer that may use so much address space, which is more than it may touch: stacks and mapped libraries count."""
    script = f'ulimit -v {size_bytes // 1024} && exec "$0" "$@"'
    return replace(peer, name=name, command=lambda job: ["sh", "-c", script, *peer.command(job)])


OURS = "ours"
OPENSSL = "openssl dgst -sha256 -r"
DOWNLOADERS = [
    _python(OURS, "ours", "kserve_pvc", prints_directory=True),
    _python("ours, hashing off", "ours_unverified", "kserve_pvc", prints_directory=True),
    _python("kserve-storage", "kserve", "kserve_storage"),
    _python("s3fs get", "s3fs", "s3fs"),
    _python("boto3", "boto3", "boto3"),
    _python("huggingface_hub", "huggingface", "huggingface_hub", extra=_hugging_face_environ, needs_hub=True),
    _python("obstore", "obstore", "obstore"),
    _native("s5cmd", "s5cmd", _s5cmd),
    _native("rclone", "rclone", _rclone, extra=_rclone_environ),
    _native("s5cmd, then openssl", "s5cmd", _s5cmd, then_hash=OPENSSL),
    _native("rclone, then openssl", "rclone", _rclone, then_hash=OPENSSL, extra=_rclone_environ),
    _native("s5cmd, then sha256sum", "s5cmd", _s5cmd, then_hash="sha256sum"),
    _native("rclone, then sha256sum", "rclone", _rclone, then_hash="sha256sum", extra=_rclone_environ),
]
LISTERS = [
    _python("ours", "ours_resolve", "kserve_pvc"),
    _python("ours, plan", "ours_plan", "kserve_pvc"),
    _python("boto3", "boto3_list", "boto3"),
    _python("obstore", "obstore_list", "obstore"),
]

_BY_NAME = {peer.name: peer for peer in DOWNLOADERS}
ONE_REPLICA, EIGHT_REPLICAS = "ours, 1 replica", "ours, 8 replicas"
REPLICAS = [
    _together(ONE_REPLICA, _BY_NAME[OURS], 1),
    _together(EIGHT_REPLICAS, _BY_NAME[OURS], 8),
    # This one writes under temporary names, so that eight of them need eight times the room.
    _together("kserve-storage, 8 replicas", _BY_NAME["kserve-storage"], 8, copies=8),
    _together("huggingface_hub, 8 replicas", _BY_NAME["huggingface_hub"], 8, copies=2),
    _together("s5cmd, 8 replicas", _BY_NAME["s5cmd"], 8),
]
BY_S3, BY_S3_ONE_FILE, BY_HTTP_ONE_FILE = "ours, s3", "ours, s3, one file", "ours, http, one file"
BY_GOOGLE, BY_AZURE_KEY, BY_AZURE_SIGNATURE = "ours, gs", "ours, az, key", "ours, az, signature"
_KEY = "AccountKey=" + base64.b64encode(bytes(64)).decode()
_SIGNATURE = "SharedAccessSignature=sv=2021-12-02&sr=c&sp=rl&se=2099-01-01T00%3A00%3A00Z&sig=bench"
# HTTP lists nothing, so one file comes by it: the archive of the model, which S3 gives as well.
SOURCES = [
    _source(BY_S3, "ours"),
    _source(
        BY_GOOGLE, "ours_google", "google.auth", "google_crc32c", "cryptography", uri=_by("gs"), extra=_google_environ
    ),
    _source(BY_AZURE_KEY, "ours", uri=_by("az"), extra=_azure_environ(_KEY)),
    _source(BY_AZURE_SIGNATURE, "ours", uri=_by("az"), extra=_azure_environ(_SIGNATURE)),
    _source("ours, hf", "ours", uri=_by("hf"), extra=_hugging_face_environ),
    _source(BY_S3_ONE_FILE, "ours", wants_archive=True),
    _source(BY_HTTP_ONE_FILE, "ours_packed", uri=_by_http, extra=_http_environ, wants_archive=True),
    _source(
        "ours, http, unpacked", "ours", uri=_by_http, extra=_http_environ, wants_archive=True, unpacks=True, copies=2
    ),
]
IN_A_GIGABYTE = "ours, in 1 GiB"
# Where the credentials of ours come from; `plain` are variables.
CREDENTIALS = ("plain", "profile", "web-identity", "metadata")
PEERS = {
    **dict.fromkeys(("w1", "w2", "w3"), DOWNLOADERS),
    "w4": LISTERS,
    "w6": REPLICAS,
    "w8-1": [_BY_NAME[OURS]],
    "w8-4": [_BY_NAME[OURS], _limited(IN_A_GIGABYTE, _BY_NAME[OURS], 1 << 30)],
    "w8-16": [_BY_NAME[OURS]],
    "w9": SOURCES,
}


def with_credentials(workload: str, kinds: Iterable[str], services: IdentityServices) -> list[Peer]:
    """
    Ours of a workload again, once for each other source of the same credentials.
    """
    plain = next((peer for peer in PEERS[workload] if peer.name == OURS), None)
    if plain is None:
        return []
    return [
        replace(plain, name=f"{OURS}, {kind}", extra=_credentials_environ(kind, services))
        for kind in kinds
        if kind != "plain"
    ]


def _credentials_environ(kind: str, services: IdentityServices) -> Callable[[Job], Mapping[str, str]]:
    """Instead of the keys in variables. The role and its token are found by the services; a profile says all itself."""

    def environ(job: Job) -> Mapping[str, str]:
        without_keys = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
        if kind != "profile":
            return {**without_keys, **services.environ(kind, job.home)}
        config = job.home / "config"
        config.write_text(
            f"[profile bench]\naws_access_key_id = {services.key}\naws_secret_access_key = {services.secret}\n"
            f"region = us-east-1\nendpoint_url = {job.endpoint}\n"
        )
        return {**without_keys, "AWS_PROFILE": "bench", "AWS_CONFIG_FILE": str(config)}

    return environ


def ours(names: Iterable[str]) -> list[str]:
    """
    Those of the names that are ours; where all are, those that the others are compared with.
    """
    names = list(names)
    return [name for name in names if name.startswith(OURS if BY_S3 not in names else BY_S3)]
