"""Where models come from: folders and names on the Hub, looked at before anything is loaded.

Imports neither torch nor transformers, so that a mistyped path or a trio that cannot work is reported at
once. Every error is one sentence that names the argument.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from .errors import IncompatibleModelsError, UnavailableModelsError, first_line

VOCABULARY_PADDING = 1024
"""Output heads may differ by this many rows: some sizes of a family are padded further than others."""

RECURRENT = frozenset({
    "bamba", "deepseek_v4", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2",
    "lfm2_moe", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe",
    "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
})  # fmt: skip
"""Values of `model_type` whose models carry a state from token to token that is not keys and values."""

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Values of init_lora_weights that leave the base's weights as they are; the others move a part of them.
_LEAVES_BASE = (True, False, None, "gaussian", "eva", "mica", "orthogonal")
_SECONDS_TO_ANSWER = 2.0


@dataclass(frozen=True)
class Source:
    """One model as it was asked for."""

    argument: str
    """`large_base`, `small_tuned`, `small_tuned[1]`, `small_base`, ..."""
    name: str
    """The folder or Hub name as given."""
    folder: Path | None
    """Where the files are, None if the Hub has them."""
    is_adapter: bool = False
    """Whether this is an adapter of peft, without the weights of its base."""
    base: Source | None = None
    """The model that an adapter is put over."""

    @property
    def location(self) -> str:
        """What transformers' `from_pretrained` should be given."""
        return self.name if self.folder is None else str(self.folder)

    def find(self, filename: str) -> Path | None:
        """The file `filename` of the model, fetched from the Hub if need be; None if it has no such file."""
        if self.folder is not None:
            path = self.folder / filename
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, filename))
        except LocalEntryNotFoundError as error:
            # Of the other's kind, but raised where the Hub cannot be reached and the cache lacks the file.
            raise UnavailableModelsError(
                f"{self.argument}: {filename} of {self.name!r} is not to be had, since the Hugging Face Hub "
                "cannot be reached."
            ) from error
        except EntryNotFoundError:
            return None

    def read(self, filename: str) -> Any:
        """The contents of the JSON file `filename`, an object; None if there is no such file."""
        path = self.find(filename)
        if path is None:
            return None
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self.unreadable(filename, error) from error
        if not isinstance(contents, dict):
            raise self.unreadable(filename, f"it holds no object but a {type(contents).__name__}")
        return contents

    def unreadable(self, filename: str, reason: object) -> UnavailableModelsError:
        """The error for a file `filename` whose contents are not what they should be."""
        return UnavailableModelsError(f"{self.argument}: cannot read {self.find(filename)} ({reason}).")

    @property
    def config(self) -> dict[str, Any]:
        """The contents of config.json, which an adapter leaves to its base; empty if there is none."""
        return (self.base or self).read("config.json") or {}

    @property
    def tokenizer_source(self) -> Source:
        """Where its tokenizer would be: an adapter without one has its base's."""
        own = self.base is None or any(self.find(name) for name in _TOKENIZER_FILES)
        return self if own or self.base is None else self.base

    @property
    def has_tokenizer(self) -> bool:
        """Whether the model comes with a tokenizer."""
        return any(self.tokenizer_source.find(name) for name in _TOKENIZER_FILES)

    @property
    def has_chat_template(self) -> bool:
        """Whether its tokenizer knows how to write a conversation."""
        source = self.tokenizer_source
        settings = source.read("tokenizer_config.json") or {}
        return bool(settings.get("chat_template")) or source.find("chat_template.jinja") is not None


def find_sources(
    large_base: str | os.PathLike[str],
    small_tuned: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    small_base: str | os.PathLike[str],
) -> list[Source]:
    """Find the models, large base first and small base last, and check what can be checked without loading.

    A tuned model may be a LoRA adapter of the small base: a folder with `adapter_config.json`.

    Raises UnavailableModelsError, an IncompatibleModelsError, within about three seconds, also without a
    network: for a folder that is missing or holds no weights, and a name that the Hub does not answer for.
    Raises IncompatibleModelsError itself for what is no name, such as a loaded model, an architecture that
    cannot be run, an adapter that cannot share the small base's weights (`adapter_problem`) or stands for a
    base, tokenizers that differ, and vocabularies whose sizes differ by more than `VOCABULARY_PADDING`.
    """
    if isinstance(small_tuned, Iterable) and not isinstance(small_tuned, str | bytes | os.PathLike):
        tuned = list(small_tuned)
    else:
        tuned = [small_tuned]
    if not tuned:
        raise IncompatibleModelsError("small_tuned must name at least one model.")
    asked = [("large_base", large_base), *zip(tuned_arguments(len(tuned)), tuned, strict=True)]
    asked.append(("small_base", small_base))
    for argument, name in asked:
        if not isinstance(name, str | os.PathLike):
            given = None if name is None else type(name).__name__
            raise IncompatibleModelsError(
                f"{argument} must be a folder or a name on the Hugging Face Hub, not {given}; "
                "loaded models go to EFTModels(...)."
            )
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda one: _find(one[0], os.fspath(one[1])), asked))
    sources = [replace(source, base=found[-1]) if source.is_adapter else source for source in found]
    for source in sources:
        if source.is_adapter:
            _check_adapter(source)
        check_architecture(source.argument, source.config)
    problems = [*tokenizer_problems(sources), *size_problems(vocabulary_sizes(sources))]
    if problems:
        raise IncompatibleModelsError(problems[0])
    return sources


def find_configuration(argument: str, name: str) -> Path:
    """The config.json of a model whose weights need not be there, found as by `find_sources`.

    Raises UnavailableModelsError, within about three seconds also without a network.
    """
    source = _find(argument, name, with_weights=False)
    try:
        path = source.find("config.json")
    except OSError as error:  # the Hub's, of a model that may not be read
        raise UnavailableModelsError(
            f"{argument}: config.json of {name!r} is not to be had ({first_line(error)})."
        ) from error
    if path is None:
        raise UnavailableModelsError(f"{argument}: {name} has no config.json.")
    return path


def tuned_arguments(count: int) -> list[str]:
    """What errors and tables call the tuned models."""
    return ["small_tuned"] if count == 1 else [f"small_tuned[{i}]" for i in range(count)]


def adapter_problem(settings: dict[str, Any], shares_base: bool) -> str | None:
    """Why an adapter with these `settings`, of an adapter_config.json, cannot be a tuned model, if it cannot.

    With `shares_base` the small base is the adapter's own with the adapter off, which then has to be the base
    that the adapter was made from.
    """
    kind = getattr(settings.get("peft_type"), "value", settings.get("peft_type"))
    if kind != "LORA":
        return f"is of type {kind}; only LoRA adapters can be run, which leave the prompt as it is"
    if settings.get("alora_invocation_tokens"):
        return "is an activated LoRA, which depends on where the prompt invokes it; give a plain LoRA"
    if not shares_base:
        return None
    initial = settings.get("init_lora_weights")
    changes = {
        f"bias={settings.get('bias')!r}": settings.get("bias") not in ("none", None),
        f"init_lora_weights={initial!r}": initial not in _LEAVES_BASE,
        "layer_replication": settings.get("layer_replication"),
        "kasa_config": settings.get("kasa_config"),
    }
    for name, changed in changes.items():
        if changed:
            return f"changes the base itself ({name}); merge it into a model of its own (merge_and_unload)"
    return None


def _check_adapter(source: Source) -> None:
    if not source.argument.startswith("small_tuned"):
        raise IncompatibleModelsError(
            f"{source.argument}: {source.name} is an adapter; give the model that it was trained on."
        )
    if problem := adapter_problem(source.read("adapter_config.json"), shares_base=True):
        raise IncompatibleModelsError(f"{source.argument}: {source.name} {problem}.")


def check_architecture(argument: str, config: dict[str, Any]) -> None:
    """Raise IncompatibleModelsError if `config`, from a config.json, is of a model that cannot be run."""
    kind = config.get("model_type", "unknown")
    kinds = config.get("layer_types") or config.get("text_config", {}).get("layer_types") or ()
    architectures = config.get("architectures") or ()
    if config.get("is_encoder_decoder"):
        raise IncompatibleModelsError(
            f"{argument} is an encoder-decoder model ({kind}); give a decoder-only causal language model."
        )
    if kind in RECURRENT or not set(kinds) <= _ATTENTION_LAYERS:
        raise IncompatibleModelsError(
            f"{argument} is a {kind} model, whose recurrent state cannot be rolled back when a draft is "
            "rejected; give a model that only has attention, such as Llama or Qwen."
        )
    if architectures and not any(name.endswith(_HEADS) for name in architectures):
        raise IncompatibleModelsError(
            f"{argument} is a {architectures[0]}, which has no causal language model head; "
            "give a ...ForCausalLM."
        )


def vocabulary_sizes(sources: Iterable[Source]) -> dict[str, int]:
    """Rows of each model's output head, where its `config.json` says."""
    sizes = {}
    for source in sources:
        config = source.config
        size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
        if size:
            sizes[source.argument] = int(size)
    return sizes


def size_problems(sizes: dict[str, int]) -> list[str]:
    """A sentence if vocabularies of these `sizes` differ by more than padding can explain."""
    if not sizes or max(sizes.values()) - min(sizes.values()) <= VOCABULARY_PADDING:
        return []
    listed = ", ".join(f"{argument} {size}" for argument, size in sizes.items())
    return [
        f"the models must share one vocabulary, but its sizes differ by more than padding ({listed}); "
        "give models of one family."
    ]


def tokenizer_problems(sources: Sequence[Source]) -> list[str]:
    """A sentence for each model whose tokenizer gives an id another meaning than the first tokenizer does.

    Only ids that both have are compared, so a tuned model may have tokens of its own at the end; and a
    special token may have got another name, since ids are all that the models share. A model without
    `tokenizer.json` is left out.
    """
    problems: list[str] = []
    known = [(source, entries) for source in sources if (entries := _token_table(source))]
    for source, entries in known[1:]:
        first, reference = known[0]
        for index in sorted(entries.keys() & reference.keys()):
            (mine, mine_special), (theirs, theirs_special) = entries[index], reference[index]
            if mine != theirs and not (mine_special and theirs_special):
                problems.append(
                    f"{source.argument} has another tokenizer than {first.argument} (id {index} is {mine!r}, "
                    f"not {theirs!r}); the models must share one tokenizer."
                )
                break
    return problems


def token_differences(sources: Sequence[Source]) -> list[str]:
    """Sentences about differences between tokenizers that do no harm."""
    known = [(source, entries) for source in sources if (entries := _token_table(source))]
    found = [f"{source.argument} has no tokenizer.json" for source in sources if not _token_table(source)]
    for source, entries in known[1:]:
        first, reference = known[0]
        extra, missing = len(entries.keys() - reference.keys()), len(reference.keys() - entries.keys())
        renamed = sum(entries[index][0] != reference[index][0] for index in entries.keys() & reference.keys())
        counts = {"more tokens": extra, "fewer tokens": missing, "special tokens of another name": renamed}
        for what, count in counts.items():
            if count:
                found.append(f"{source.argument} has {count} {what} than {first.argument}")
    return found


def _find(argument: str, name: str, with_weights: bool = True) -> Source:
    path = Path(name).expanduser()
    if name and path.is_dir():
        return Source(argument, name, path, with_weights and _check_folder(argument, path))
    if name and path.exists():
        raise UnavailableModelsError(f"{argument}: {name} is a file; give the folder of a saved model.")
    parts = name.split("/")
    if not name or len(parts) > 2 or not all(parts) or name[0] in ".~" or "\\" in name:
        raise UnavailableModelsError(f"{argument}: there is no folder {name!r}.")
    return _find_on_hub(argument, name, with_weights)


def _check_folder(argument: str, folder: Path) -> bool:
    """Whether `folder` holds an adapter; it holds a whole model otherwise."""
    if (folder / "adapter_config.json").is_file():
        if not any((folder / name).is_file() for name in _ADAPTER_WEIGHTS):
            raise UnavailableModelsError(
                f"{argument}: {folder} has an adapter_config.json but no {_ADAPTER_WEIGHTS[0]}."
            )
        return True
    if not (folder / "config.json").is_file():
        raise UnavailableModelsError(f"{argument}: {folder} has no config.json, so it is no saved model.")
    source = Source(argument, str(folder), folder)
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (contents := source.read(index)) is not None:
            shard_of = contents.get("weight_map")
            if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
                raise source.unreadable(index, "it has no weight_map from weights to files")
            shards = set(shard_of.values())
            missing = sorted(shard for shard in shards if not (folder / shard).is_file())
            if missing:
                raise UnavailableModelsError(f"{argument}: {folder} lacks the weight file {missing[0]}.")
            return False
    if not any(chain(folder.glob("*.safetensors"), folder.glob("pytorch_model*.bin"))):
        raise UnavailableModelsError(
            f"{argument}: {folder} has no weights; it should hold model.safetensors or pytorch_model.bin."
        )
    return False


def _find_on_hub(argument: str, name: str, with_weights: bool) -> Source:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        siblings = _in_time(lambda: HfApi().model_info(name, timeout=_SECONDS_TO_ANSWER).siblings or [])
    except HFValidationError as error:
        raise UnavailableModelsError(f"{argument}: there is no folder {name!r}.") from error
    except GatedRepoError as error:
        raise UnavailableModelsError(
            f"{argument}: {name} is gated; accept its terms on the Hub and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise UnavailableModelsError(
            f"{argument}: {name!r} is neither a folder nor a model on the Hugging Face Hub that you may read."
        ) from error
    except Exception as error:  # no network, offline mode, a name that cannot be one: in any case no answer
        for filename in ("config.json", "adapter_config.json"):
            cached = try_to_load_from_cache(name, filename)
            if isinstance(cached, str):
                folder = Path(cached).parent
                return Source(argument, name, folder, with_weights and _check_folder(argument, folder))
        raise UnavailableModelsError(
            f"{argument}: {name!r} is not a folder, and the Hugging Face Hub cannot be reached to look for "
            f"it ({type(error).__name__})."
        ) from error
    if not with_weights:
        return Source(argument, name, None)
    files = [sibling.rfilename for sibling in siblings]
    if "adapter_config.json" in files and any(file in files for file in _ADAPTER_WEIGHTS):
        return Source(argument, name, None, is_adapter=True)
    if "config.json" not in files or not any(file.endswith((".safetensors", ".bin")) for file in files):
        raise UnavailableModelsError(f"{argument}: {name} on the Hub has no config.json or no weights.")
    return Source(argument, name, None)


def _in_time(ask: Callable[[], Any]) -> Any:
    """The result of `ask`, or a TimeoutError; a request's own limit does not cover looking its host up."""
    answers: SimpleQueue[Any] = SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    Thread(target=run, daemon=True).start()
    try:
        answer, error = answers.get(timeout=_SECONDS_TO_ANSWER)
    except Empty:
        raise TimeoutError("no answer") from None
    if error is not None:
        raise error
    return answer


def _token_table(source: Source) -> dict[int, tuple[str, bool]]:
    """Token of each id and whether it is special, from `tokenizer.json`; empty if there is none."""
    data = source.tokenizer_source.read("tokenizer.json")
    if data is None:
        return {}
    try:
        return _tokens_of(data)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"it is not as tokenizers writes it: {type(error).__name__}, {error}"
        raise source.tokenizer_source.unreadable("tokenizer.json", reason) from error


def _tokens_of(data: dict[str, Any]) -> dict[int, tuple[str, bool]]:
    vocabulary = data.get("model", {}).get("vocab") or {}
    if isinstance(vocabulary, dict):
        table = {int(index): (token, False) for token, index in vocabulary.items()}
    else:  # unigram models list [token, score]
        table = {index: (entry[0], False) for index, entry in enumerate(vocabulary)}
    for token in data.get("added_tokens") or ():
        table[int(token["id"])] = (token["content"], bool(token.get("special")))
    return table
