"""The layout of a sentence-transformers folder, read and written as plain files, without that library.

modules.json lists the modules: Transformer, Pooling and perhaps Normalize, or a Router with the routes query and
document (router_config.json), each of which lists the same. retriever.json is ours: {"max_query_tokens",
"max_passage_tokens"}.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quincunx.data_shards.errors import SettingsError

if TYPE_CHECKING:
    from quincunx.engine.retrieval.dual_encoder import Retriever

KINDS = ("query", "passage")
OWN_FILE = "retriever.json"
SETTINGS_FILE = "config_sentence_transformers.json"
MODULE_CLASS = "sentence_transformers.models.{}"  # the name that every version of the library knows
PASSAGE_PROMPTS = ("document", "passage", "corpus")  # in the order in which the library looks for them
POOLINGS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}


@dataclass(frozen=True)
class Tower:
    """One Transformer with its pooling."""

    folder: Path
    pooling: str = "cls"
    normalise: bool = True
    lower_case: bool = False
    max_tokens: int | None = None
    """None if nothing in the folder says."""


@dataclass(frozen=True)
class SentenceFolder:
    """What a folder says about a retriever; dictionaries are by kind, "query" and "passage"."""

    towers: dict[str, Tower]
    """The passages', and the queries' unless one encoder reads both."""
    max_tokens: dict[str, int | None]
    """None if nothing in the folder says."""
    prompts: dict[str, str]


def read_sentence_folder(folder: Path) -> SentenceFolder:
    """The layout of `folder`; without modules.json it is a plain encoder.

    A folder that scores by cosine counts as normalised even without the module Normalize: the ranking is the same.

    Raises:
        SettingsError: a module that is not supported (Dense, another pooling), or files that contradict each other.
    """
    if not (folder / "modules.json").is_file():
        return SentenceFolder({"passage": Tower(folder)}, dict.fromkeys(KINDS), dict.fromkeys(KINDS, ""))
    settings, own = _read(folder / SETTINGS_FILE), _read(folder / OWN_FILE)
    modules = [(_kind(module["type"]), folder / module["path"]) for module in _read(folder / "modules.json", list)]
    cosine = settings.get("similarity_fn_name") == "cosine"
    if modules and modules[0][0] == "Router":
        towers = _read_router(folder, modules[0][1], modules[1:], cosine)
    else:
        towers = {"passage": _read_tower(folder, modules, cosine)}
    limits = {kind: towers.get(kind, towers["passage"]).max_tokens for kind in KINDS}
    prompts = settings.get("prompts") or {}
    default = prompts.get(settings.get("default_prompt_name"), "")
    return SentenceFolder(
        towers,
        {kind: own.get(f"max_{kind}_tokens") or limit for kind, limit in limits.items()},
        {
            "query": prompts.get("query", default),
            "passage": next((prompts[name] for name in PASSAGE_PROMPTS if name in prompts), default),
        },
    )


def _read_router(folder: Path, place: Path, rest: list[tuple[str, Path]], cosine: bool) -> dict[str, Tower]:
    """The towers of a Router's routes document and query; `rest` are the modules after it."""
    config = _read(place / "router_config.json")
    routes, types = config.get("structure", {}), config.get("types", {})
    if not {"query", "document"} <= set(routes):
        raise SettingsError(
            f"the Router of {place} has the routes {', '.join(routes) or 'none'}; give a model with the routes query "
            "and document"
        )
    towers = {}
    for kind, route in (("passage", "document"), ("query", "query")):
        modules = [(_kind(types[name]), place / name) for name in routes[route]]
        towers[kind] = _read_tower(folder, [*modules, *rest], cosine)
    for what in ("pooling", "normalise", "lower_case"):
        query, passage = (getattr(towers[kind], what) for kind in KINDS)
        if query != passage:
            raise SettingsError(
                f"{folder} has {what} {query} for queries and {passage} for documents; give a model whose two towers "
                "agree in it"
            )
    return towers


def _read(path: Path, kind: type = dict) -> Any:
    """The JSON of `path`, an empty one if there is no such file."""
    if not path.is_file():
        return kind()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"{path} is not JSON ({error}); restore it from the model's source") from error
    if not isinstance(content, kind):
        raise SettingsError(f"{path} must hold a JSON {kind.__name__}; restore it from where the model came from")
    return content


def _kind(type_name: str) -> str:
    return type_name.rpartition(".")[2]


def _read_tower(folder: Path, modules: list[tuple[str, Path]], cosine: bool) -> Tower:
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise SettingsError(
            f"{folder} is made of {', '.join(kinds) or 'no modules'}; only Transformer, Pooling and then perhaps "
            "Normalize are supported: give such a model, or its plain encoder folder with pooling and normalise set"
        )
    transformer, pooling = modules[0][1], _read(modules[1][1] / "config.json")
    mode = pooling.get("pooling_mode")
    if mode is None:  # as older versions write it
        chosen = [name for name, value in pooling.items() if name.startswith("pooling_mode_") and value]
        mode = POOLINGS.get(chosen[0], chosen[0]) if len(chosen) == 1 else " and ".join(chosen) or "mean"
    if mode not in POOLINGS.values():
        raise SettingsError(f"{folder} pools by {mode}; give a model that pools by cls or mean")
    if not pooling.get("include_prompt", True):
        raise SettingsError(f"{folder} keeps its prompt out of the pooling, which is not supported; give another model")
    # sentence_bert_config.json, or named for another family in old folders (sentence_roberta_config.json)
    config = next((_read(path) for path in sorted(transformer.glob("sentence_*_config.json"))), {})
    limits = (config.get("max_seq_length"), _read(transformer / "tokenizer_config.json").get("model_max_length"))
    return Tower(
        folder=transformer,
        pooling=mode,
        normalise="Normalize" in kinds or cosine,
        lower_case=bool(config.get("do_lower_case")),
        max_tokens=next((int(limit) for limit in limits if limit), None),
    )


def write_sentence_folder(folder: Path, retriever: "Retriever") -> dict[str, tuple[Path, int]]:
    """Writes every file of the layout but the encoders' own.

    Returns {"passage": (folder of the encoder and tokenizer, longest text in tokens)}, and "query" if the towers are
    separate.
    """
    model, limits = retriever.model, retriever.max_tokens
    if model.shared:
        modules, places, poolings = ["Transformer", "Pooling"], {"passage": folder}, [folder / "1_Pooling"]
        limits = {"passage": max(limits.values())}
    else:
        routes = {"query": "query", "passage": "document"}
        structure = {route: [f"{route}_0_Transformer", f"{route}_1_Pooling"] for route in routes.values()}
        types = {name: MODULE_CLASS.format(name.rpartition("_")[2]) for names in structure.values() for name in names}
        parameters = {"default_route": "document", "allow_empty_key": True}
        _write(folder / "router_config.json", {"types": types, "structure": structure, "parameters": parameters})
        modules, places = ["Router"], {kind: folder / structure[route][0] for kind, route in routes.items()}
        poolings = [folder / pooling for _, pooling in structure.values()]
    for kind, place in places.items():
        _write(place / "sentence_bert_config.json", {"max_seq_length": limits[kind], "do_lower_case": False})
    for place in poolings:
        modes = {name: mode == model.pooling for name, mode in POOLINGS.items()}
        _write(place / "config.json", {"word_embedding_dimension": model.width, **modes})
    if model.normalise:
        modules.append("Normalize")
        (folder / f"{len(modules) - 1}_Normalize").mkdir()
    listed = [
        {"idx": n, "name": str(n), "path": f"{n}_{kind}" if n else "", "type": MODULE_CLASS.format(kind)}
        for n, kind in enumerate(modules)
    ]
    _write(folder / "modules.json", listed)
    prompts = {"query": retriever.prompts["query"], "document": retriever.prompts["passage"]}
    prompts = {name: prompt for name, prompt in prompts.items() if prompt}
    similarity = "cosine" if model.normalise else "dot"
    _write(folder / SETTINGS_FILE, {"similarity_fn_name": similarity, "prompts": prompts})
    _write(folder / OWN_FILE, {f"max_{kind}_tokens": retriever.max_tokens[kind] for kind in KINDS})
    return {kind: (place, limits[kind]) for kind, place in places.items()}


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `folder` when the block ends well.

    A kill between the two renames leaves the old one beside it, as .NAME.replaced. Raises SettingsError if nothing can
    be written there.
    """
    staging, replaced = folder.with_name(f".{folder.name}.writing"), folder.with_name(f".{folder.name}.replaced")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as error:
        raise SettingsError(f"{folder} cannot be written: {error.strerror}") from None
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(staging, folder)
    shutil.rmtree(replaced, ignore_errors=True)
