"""Reading and writing the tokenizer files of a model folder, in the layout of transformers.

tokenizer.json            the whole tokenizer (or vocab.json + merges.txt, GPT-2's older pair)
tokenizer_config.json     which tokens are BOS, EOS, padding; the chat template; special tokens missing in tokenizer.json
special_tokens_map.json   the same names once more; used where the config is silent
chat_template.jinja       the chat template, newer place: wins over the config's
generation_config.json, config.json   more end tokens: chat models stop at several
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from lilliput.base import records
from lilliput.base.errors import UserError
from lilliput.data import vocabulary
from lilliput.data.vocabulary import Parts

SUMMARY_KEY = "eos_token_ids"  # our own key in tokenizer_config.json: all end tokens; transformers keeps only one


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no file; UserError for anything else."""
    content = records.read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{path} is not valid", f"it holds a {type(content).__name__}, not an object", "download the model again")
    return content


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json file, checked."""
    if not path.is_file():
        raise UserError(f"there is no tokenizer file {path}", fix="give the path of a tokenizer.json")
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for whatever it cannot read
        raise UserError(f"{path} is not a tokenizer.json", str(error), "download the model again") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_folder(folder: Path) -> Parts:
    """The tokenizer of a model folder; UserError when it has none that can be read."""
    config, names = read_object(folder / "tokenizer_config.json"), read_object(folder / "special_tokens_map.json")

    def name(key: str) -> str | None:
        value = config.get(key) or names.get(key)
        return value["content"] if isinstance(value, dict) else value

    standard: int | None = None  # GPT-2's own files name no special token
    if (folder / "tokenizer.json").is_file():
        backend = read_tokenizer(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _gpt2_files(folder, [token for token in map(name, ("bos_token", "eos_token", "pad_token", "unk_token")) if token])
        standard = backend.token_to_id(vocabulary.END)
        bos_id = backend.token_to_id(str(name("bos_token")))
        if config.get("add_bos_token") and bos_id is not None:  # OPT
            vocabulary.add_bos(backend, bos_id)
    else:
        raise _no_tokenizer(folder)
    _add_tokens(backend, config.get("added_tokens_decoder", {}), folder)

    def token_id(key: str) -> int | None:
        return None if name(key) is None else backend.token_to_id(str(name(key)))

    ends = [token_id("eos_token"), *config.get(SUMMARY_KEY, [])]
    for file in ("generation_config.json", "config.json"):
        value = read_object(folder / file).get("eos_token_id")
        ends += value if isinstance(value, list) else [value]
    eos_ids = tuple(dict.fromkeys(int(end) for end in ends if end is not None)) or (() if standard is None else (standard,))
    bos_id = token_id("bos_token") if name("bos_token") else standard
    return Parts(backend, bos_id, eos_ids, token_id("pad_token"), _template(folder, config))


def _no_tokenizer(folder: Path) -> UserError:
    if not folder.is_dir():
        return UserError(f"there is no folder {folder}", "its tokenizer was to be read", "check the path")
    what, found = f"{folder} has no tokenizer", sorted(file.name for file in folder.iterdir())[:12]
    if "tokenizer.model" in found:
        fix = f"""python -c "from transformers import AutoTokenizer as A; A.from_pretrained('{folder}').save_pretrained('{folder}')\""""
        return UserError(what, "it has only SentencePiece's tokenizer.model; tokenizer.json is needed", fix)
    fix = "copy tokenizer.json and tokenizer_config.json of the model there"
    return UserError(what, f"neither tokenizer.json nor vocab.json + merges.txt among: {', '.join(found) or 'no files'}", fix)


def _gpt2_files(folder: Path, special: list[str]) -> Tokenizer:
    vocab = read_object(folder / "vocab.json")
    lines = vocabulary.read_text(folder / "merges.txt").split("\n")
    backend = vocabulary.byte_level(vocab, [line for line in lines if line and not line.startswith("#version")])
    known = [token for token in dict.fromkeys([*special, vocabulary.END]) if token in vocab]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in known])
    return backend


def _add_tokens(backend: Tokenizer, added: dict[str, Any], folder: Path) -> None:
    """Tokens that only tokenizer_config.json knows; ids must come out as it says."""
    present = backend.get_added_tokens_decoder()
    for number, spec in sorted((int(number), spec) for number, spec in added.items()):
        if number in present:
            continue
        flags = {key: spec[key] for key in ("lstrip", "rstrip", "single_word", "normalized") if key in spec}
        token = AddedToken(spec["content"], special=bool(spec.get("special")), **flags)
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(spec["content"]) != number:
            why = f"added token {spec['content']!r} is {backend.token_to_id(spec['content'])} by tokenizer.json and {number} by tokenizer_config.json"
            raise UserError(f"{folder}: the tokenizer files contradict each other", why, "download the model again")


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return vocabulary.read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def write_folder(folder: Path, parts: Parts) -> None:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json; AutoTokenizer of transformers loads them."""
    backend = parts.backend
    eos_id = parts.eos_ids[0] if parts.eos_ids else None
    ids = {"bos_token": parts.bos_id, "eos_token": eos_id, "pad_token": parts.pad_id, "unk_token": None}
    unknown = getattr(backend.model, "unk_token", None)
    names = {key: backend.id_to_token(number) for key, number in ids.items() if number is not None} | ({"unk_token": unknown} if unknown else {})
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    if parts.eos_ids:
        config[SUMMARY_KEY] = list(parts.eos_ids)
    if parts.chat_template is not None:
        config["chat_template"] = parts.chat_template
    for file, content in (("tokenizer_config.json", config), ("special_tokens_map.json", names)):
        records.write_json(folder / file, content)
    records.atomic_write(folder / "tokenizer.json", backend.to_str(pretty=True))
