"""
Who is compared: one entry for each way to get a model, and the commands they are.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

_CLIENTS = Path(__file__).with_name("clients.py")


@dataclass(frozen=True, kw_only=True)
class Job:
    """
    One download or listing: from where, and to where.

    Attributes:
        destination: An empty directory. `home` is another, for what a client keeps beside it.
        ca: The certificate that signed the endpoint's, if that speaks TLS.
        files: How many there are.
    """

    uri: str
    endpoint: str
    destination: Path
    home: Path
    ca: Path | None
    files: int

    @property
    def environ(self) -> dict[str, str]:
        """The same for every client: only what is needed, and nothing of the user's."""
        trust = {} if self.ca is None else dict.fromkeys(("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), str(self.ca))
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
        prints_directory: Whether the last line of its output says where the files are; else they are in the destination.
        extra: What it needs in its environment beside the job's.
        copies: How often the model may lie in the destination at once, at worst.
        needs_hub: Whether it speaks to a Hugging Face hub instead of S3.
    """

    name: str
    command: Callable[[Job], list[str]]
    missing: Callable[[], str | None]
    prints_directory: bool = False
    extra: Callable[[Job], Mapping[str, str]] = field(default=lambda job: {})
    copies: int = 1
    needs_hub: bool = False


def _python(name: str, client: str, module: str, **more: object) -> Peer:
    def command(job: Job) -> list[str]:
        # -P: what lies beside the script is no module of the client's.
        return [sys.executable, "-P", str(_CLIENTS), client, job.uri, *([] if client.endswith(_LISTING) else [str(job.destination)])]

    def missing() -> str | None:
        return None if importlib.util.find_spec(module) else f"`{module}` is not installed"

    return Peer(name=name, command=command, missing=missing, **more)  # type: ignore[arg-type]


_LISTING = ("_list", "_resolve", "_plan")


def _binary(program: str) -> str | None:
    """The program itself, not the Python script that a package may have put before it."""
    if spec := importlib.util.find_spec(program):
        inside = Path(str(spec.origin)).with_name("bin") / program
        if inside.exists():
            return str(inside)
    beside = Path(sys.executable).with_name(program)
    return str(beside) if beside.exists() else shutil.which(program)


def _native(name: str, program: str, arguments: Callable[[Job], list[str]], *, then_hash: str | None = None, **more: object) -> Peer:
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
    settings = {"TYPE": "s3", "PROVIDER": "Other", "ENV_AUTH": "true", "ENDPOINT": job.endpoint, "FORCE_PATH_STYLE": "true"}
    return {f"RCLONE_CONFIG_ORIGIN_{name}": value for name, value in settings.items()}


def _hugging_face_environ(job: Job) -> Mapping[str, str]:
    return {"HF_ENDPOINT": job.endpoint, "HF_HOME": str(job.home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


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
IN_A_GIGABYTE = "ours, in 1 GiB"
PEERS = {
    **dict.fromkeys(("w1", "w2", "w3"), DOWNLOADERS),
    "w4": LISTERS,
    "w6": REPLICAS,
    "w8-1": [_BY_NAME[OURS]],
    "w8-4": [_BY_NAME[OURS], _limited(IN_A_GIGABYTE, _BY_NAME[OURS], 1 << 30)],
    "w8-16": [_BY_NAME[OURS]],
}


def ours(names: Iterable[str]) -> list[str]:
    """
    Those of the names that are ours.
    """
    return [name for name in names if name.startswith(OURS)]
