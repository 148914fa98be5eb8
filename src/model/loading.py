"""Load the base model and tokenizer that `--model_name_or_path` leads to.

The folder's content, not its name, decides what is loaded: an adapter folder leads to the base model that it names; an
encoder-decoder (T5, BART, ...) gets its own class, a decoder-only model its own with a cheaper loss (`answer_loss.py`).
Weights are read from safetensors only, after all other checks, and no code that comes with a model is run.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging
from transformers.utils.hub import extract_commit_hash

from errors import InputError, first_line
from files import json_kind, read_object
from model.answer_loss import causal_class, check_loss

FLAG = "--model_name_or_path"
COMMIT = re.compile("[0-9a-f]{40}")
# Keys of a generation config that are not settings of the base: token ids come from the tokenizer, or from training.
NO_SETTINGS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "_from_model_config",
               "transformers_version")
SAME_LOSS = {"llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3", "granite",
             "phi3", "mixtral", "qwen3_moe"}  # fmt: skip
"""Decoder-only types for which tests/test_models.py compares the loss; others are compared when they are loaded."""

os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # weights from a stranger's pull request are not loaded
logger = logging.getLogger("gorp")


@dataclass(frozen=True)
class LoadedModel:
    """A base model, ready for a method to attach to.

    Attributes:
        model, tokenizer: their special tokens agree; a decoder-only model's tokenizer pads on the left.
        decoder_only: whether prompts and answers share one sequence.
        previous: the given adapter folder, which the method loads; None for a base model.
        base_name: folder or hub id of the base model, as written.
        origin: `revision`, of a base model on the hub, and `config_name`, where the config is if not with the model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    decoder_only: bool
    previous: Path | None
    base_name: str
    origin: Mapping[str, str | None] = field(default_factory=dict)


def load_model_and_tokenizer(
    model_name_or_path: str,
    *,
    config_name: str | None = None,
    tokenizer_name: str | None = None,
    resize_position_embeddings: bool | None = None,
    max_source_length: int = 512,
    max_target_length: int = 0,
    family: str | None = None,
    dtype: torch.dtype = torch.float32,
    weights: bool = True,
    not_in_4bit: Sequence[str] | None = None,
    **hub: str | bool | None,
) -> LoadedModel:
    """Load the named base model, or the one that the named adapter folder was trained on.

    Args:
        model_name_or_path: a folder or a hub id; `hub` are `cache_dir`, `revision` and `token` of from_pretrained.
        config_name, tokenizer_name: where the config and the tokenizer are, if not with the model.
        resize_position_embeddings: whether learned positions may grow to `max_source_length`, with a decoder-only model
            plus `max_target_length`; None: yes, with a warning. Only some models can (Pegasus can, BART and LLaMA
            cannot).
        family: "encoder-decoder" or "decoder-only", if the model must be of that family.
        not_in_4bit: None, or regular expressions for layers that keep `dtype`; all others but the head are in 4 bits.
        weights: False leaves the model on the meta device: files and shapes are checked, no values are read.

    Raises:
        InputError: the model is missing, a pickle, incomplete, of an unsupported kind or another family, or has too few
            positions; the hub cannot be reached.
    """
    previous, base_name = _find_base(model_name_or_path)
    hub["trust_remote_code"] = False
    stored = read_object(previous / ADAPTER_CONFIG) if previous is not None else {}
    config_name = config_name or stored.get("config_name")
    elsewhere = dict(hub)  # for a config or tokenizer of another repository
    kept = stored.get("revision")
    if kept and (COMMIT.fullmatch(kept) or not hub.get("revision")):  # not a branch that may have moved on since
        hub["revision"] = kept
    config = _load_config(config_name or base_name, elsewhere if config_name else hub)
    if not Path(base_name).is_dir():
        hub["revision"] = _commit(base_name, hub)
    revision = None if Path(base_name).is_dir() else hub["revision"]
    own_class, decoder_only = model_class(config, base_name), not config.is_encoder_decoder
    kind, other = ("decoder-only", "scripts_llama/") if decoder_only else ("encoder-decoder", "scripts/")
    if family not in (None, kind):
        raise InputError(f"{FLAG}: {base_name} is {kind} ({config.model_type}), and this command is for {family} "
                         f"models; use {other}")
    if Path(base_name).is_dir():  # of a hub repository, from_pretrained reads nothing but safetensors
        _require_safetensors(Path(base_name), "AutoModelForCausalLM" if decoder_only else "AutoModelForSeq2SeqLM")
    with _loading("tokenizer", tokenizer_name or base_name):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name or base_name, **(elsewhere if tokenizer_name else hub))
    _complete_tokenizer(tokenizer, config, base_name)
    place = {} if weights else {"device_map": "meta"}
    if not_in_4bit is not None and weights:
        place["quantization_config"] = _four_bits(dtype, not_in_4bit)
    model = _load_weights(own_class, base_name, config=config, dtype=dtype, **place, **hub)
    length = max_source_length + (max_target_length if decoder_only else 0)
    _grow_positions(model, length, resize_position_embeddings)
    _drop_generation_settings(model, base_name)
    _set_special_tokens(model, tokenizer)
    _grow_embeddings(model, tokenizer)
    if decoder_only and weights and config.model_type not in SAME_LOSS:
        check_loss(model, base_name)
    origin = {"revision": revision, "config_name": config_name}
    return LoadedModel(model, tokenizer, decoder_only, previous, base_name, origin)


def model_class(config: PreTrainedConfig, name: str) -> type[PreTrainedModel]:
    """The class with which the model in `name` trains here; InputError unless it maps text to text."""
    if type(config) in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise InputError(f"{name}/config.json: found model_type {config.model_type!r}, a vision-language model; "
                         "allowed: a model of text alone")
    encoder_decoders = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder and type(config) in encoder_decoders:
        return encoder_decoders[type(config)]
    return causal_class(config, name)


def model_files(model_name_or_path: str) -> dict[str, Path]:
    """The files that decide what is loaded, by name: the base model's and, if given, the adapter folder's.

    A base model on the hub has none; its id and revision are part of the command line.
    """
    previous, base_name = _find_base(model_name_or_path)
    folders = {"adapter": previous, "base": Path(base_name)}
    return {
        f"{kind}/{path.name}": path
        for kind, folder in folders.items()
        if folder is not None and folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.suffix in (".json", ".safetensors", ".model") and not path.name.startswith(".")
    }


# Finding the model


def _find_base(name: str) -> tuple[Path | None, str]:
    """The adapter folder, if `name` is one, and the base model's folder or hub id."""
    folder = Path(name)
    if (folder / ADAPTER_CONFIG).is_file():
        return folder, _base_of_adapter(folder / ADAPTER_CONFIG)
    if folder.is_dir() and not (folder / "config.json").is_file():
        # Only its name tells what an incomplete folder was meant to be.
        wanted = ADAPTER_CONFIG if "adapter" in folder.name else "config.json"
        raise InputError(f"{FLAG}: {name} has no {wanted}")
    if _is_missing_folder(name):
        raise InputError(f"{FLAG}: {name} does not exist; put a model (config.json, model.safetensors, tokenizer "
                         "files) into that folder, or give a hub id such as google-t5/t5-large")
    return None, name


def _base_of_adapter(path: Path) -> str:
    base = read_object(path).get("base_model_name_or_path")
    where = f"{path}: base_model_name_or_path is {base}"
    if not isinstance(base, str) or not base:
        raise InputError(f"{where}; allowed: the base model's folder or hub id")
    if (Path(base) / ADAPTER_CONFIG).is_file():
        raise InputError(f"{where}, itself an adapter; allowed: a base model")
    if _is_missing_folder(base) or (Path(base).is_dir() and not (Path(base) / "config.json").is_file()):
        raise InputError(f"{where}, where there is no model (seen from {Path.cwd()}); put the model or a link to it "
                         "there, or, if no order is to be resumed, correct the path in the file")
    return base


def _is_missing_folder(name: str) -> bool:
    """Return whether `name` is neither a folder nor a possible hub id (`name` or `owner/name`)."""
    path = Path(name)
    if path.is_dir():
        return False
    no_hub_id = path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or len(path.parts) > 2
    beside_a_folder = len(path.parts) == 2 and (path.parts[0] == "initial_model" or path.parent.is_dir())
    return path.exists() or no_hub_id or beside_a_folder


# Loading the model


@contextlib.contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """Run third-party loading without progress bars and warnings; a failure is reported in one line."""
    bars, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # the tokenizers library raises nothing more specific
        reason = first_line(error)
        if "use_safetensors" in reason:  # Transformers' advice would load a pickle
            reason = ("the hub has it without safetensors; `hf download` it into a folder, and MODEL=FOLDER says how "
                      "to convert it")
        raise InputError(f"{name}: the {what} cannot be loaded: {reason}") from error
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _commit(name: str, hub: dict) -> str | None:
    """The commit of a hub repository that a branch, a tag or no revision stands for, so that all parts of a model, and
    all tasks of an order, have the same one."""
    with _loading("config", name):
        return extract_commit_hash(cached_file(name, "config.json", **hub), None)


def _load_config(name: str, hub: dict) -> PreTrainedConfig:
    """The config of a model that Transformers has code for, and whose weights are not quantised."""
    with _loading("config", name):
        raw, _ = PreTrainedConfig.get_config_dict(name, **hub)
    found = f"{name}/config.json: found"
    if not isinstance(raw, dict):
        raise InputError(f"{found} {json_kind(raw)}; allowed: an object")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own = " (the code that comes with the model is not run)" if "auto_map" in raw else ""
        raise InputError(f"{found} model_type {kind!r}; allowed: the types of this Transformers version{own}")
    if quantised := raw.get("quantization_config"):
        how = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise InputError(f"{found} weights quantised by {how}; allowed: weights in 16 or 32 bits")
    with _loading("config", name):
        config = AutoConfig.from_pretrained(name, **hub)
    attention = config._attn_implementation
    if attention is not None and "/" in str(attention):  # compiled kernels that would be fetched from the hub and run
        raise InputError(f"{found} attention code from {attention!r}; allowed: eager, sdpa")
    return config


def _require_safetensors(folder: Path, auto_class: str) -> None:
    """Reject a folder without safetensors, and an index that leads to other files, which Transformers would open."""
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        if not pickles:
            raise InputError(f"{folder}: holds no weights; allowed: a folder with model.safetensors")
        raise InputError(
            f"{folder / pickles[0]}: a pickle, which is not loaded; convert it once, if you trust its source: "
            f'python -c "from transformers import {auto_class} as M; '
            f"M.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}')\""
        )
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    pieces = read_object(index).get("weight_map")
    if not isinstance(pieces, dict) or not pieces:
        raise InputError(f"{index}: found no weight_map; allowed: an object of weight -> safetensors file")
    for weight, piece in pieces.items():
        where = f"{index}, weight_map, {weight}:"
        if not isinstance(piece, str) or Path(piece).name != piece or not piece.endswith(".safetensors"):
            raise InputError(f"{where} found {piece!r}; allowed: a safetensors file beside it")
        if not (folder / piece).is_file():
            raise InputError(f"{where} there is no {piece} beside it")


def _four_bits(dtype: torch.dtype, kept: Sequence[str]) -> BitsAndBytesConfig:
    """NF4 with doubly quantised scales, as in QLoRA (Dettmers et al., NeurIPS 2023)."""
    if find_spec("bitsandbytes") is None:
        raise InputError("--load_in_4bit: package bitsandbytes is not installed; pip install bitsandbytes")
    layers = f"; {', '.join(kept)} stay in {str(dtype).removeprefix('torch.')}" if kept else ""
    logger.info("the frozen linear layers are held in 4 bits (NF4)%s", layers)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=[*kept, "lm_head"])  # fmt: skip


def _load_weights(model_class: type, name: str, **options) -> PreTrainedModel:
    """Load a model; InputError unless every weight comes from its checkpoint."""
    with _loading("model", name):
        model, report = model_class.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    for key, found, needed in sorted(report["mismatched_keys"]):
        raise InputError(f"{name}: {key} is {tuple(found)}; {tuple(needed)} is needed by its config.json")
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{name}: {len(missing)} weights are missing from the checkpoint, such as {missing[0]}")
    if unused := sorted(report["unexpected_keys"]):
        logger.warning("%s: the model does not use %d weights, such as %s", name, len(unused), unused[0])
    return model


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters of a model, in place. Its buffers stay: rotary frequencies in 16 bits would move tokens."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


# Making model, tokenizer and settings agree


def _drop_generation_settings(model: PreTrainedModel, base_name: str) -> None:
    """Drop the base's own generation settings, which `generate` would apply to every answer, and log them.

    An answer begins with the same token as in training; see `_set_special_tokens` for its end.
    """
    found = model.generation_config.to_diff_dict()
    model.generation_config = GenerationConfig(
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        eos_token_id=model.generation_config.eos_token_id,
    )
    usual = GenerationConfig._get_default_generation_params() | {name: found.get(name) for name in NO_SETTINGS}
    if dropped := [f"{name} {value}" for name, value in found.items() if value != usual.get(name, False)]:
        logger.info("%s: its generation settings are ignored: %s", base_name, ", ".join(dropped))


def _complete_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str) -> None:
    """Give the tokenizer every special token that training needs, and the language of the answers.

    A decoder-only model's tokenizer without bos or eos takes the config's. Without a padding token it pads with unk, or
    else eos: padding is always masked and needs no embedding of its own. A multilingual model answers in the language
    of the prompt.
    """
    if not config.is_encoder_decoder:
        for kind in ("bos", "eos"):
            ids = _as_list(getattr(config, f"{kind}_token_id", None))
            special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
            # A config class's default for bos may be an ordinary piece of another tokenizer.
            if getattr(tokenizer, f"{kind}_token") is None and ids and (kind == "eos" or ids[0] in special):
                setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(ids[0]))
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
        tokenizer.padding_side = "left"
    elif getattr(tokenizer, "src_lang", None):
        tokenizer.tgt_lang = tokenizer.tgt_lang or tokenizer.src_lang
    for kind in ("eos", "pad"):
        if getattr(tokenizer, f"{kind}_token") is None:
            raise InputError(f"{name}: neither the tokenizer nor config.json defines {kind}_token")
    rows = getattr(config, "vocab_size", None) or tokenizer.vocab_size
    if tokenizer.vocab_size > rows:  # added tokens get new rows
        raise InputError(f"{name}: its tokenizer has a vocabulary of {tokenizer.vocab_size} tokens; config.json says "
                         f"vocab_size {rows}, so they belong to different models")


def _set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer's special tokens to config and generation config.

    Answers are trained to end with the tokenizer's eos. The base's other end tokens (Llama 3 has several) end them too,
    unless one is an ordinary piece of text, which an answer may contain.
    """
    settings = model.generation_config
    if getattr(tokenizer, "tgt_lang", None):  # an answer begins with its language, as the decoder's start or after it
        code = getattr(tokenizer, "lang_code_to_token", {}).get(tokenizer.tgt_lang, tokenizer.tgt_lang)  # M2M100's
        language = tokenizer.convert_tokens_to_ids(code)
        if tokenizer(text_target="a").input_ids[-1] == language:
            model.config.decoder_start_token_id = settings.decoder_start_token_id = language
        else:
            settings.forced_bos_token_id = language
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:  # T5Gemma's answers start with the decoder's bos
        start = getattr(getattr(model.config, "decoder", None), "bos_token_id", None)
    if model.config.is_encoder_decoder and start is None:
        raise InputError(f"{model.name_or_path}/config.json: has no decoder_start_token_id, with which answers start")
    if start is not None:
        settings.decoder_start_token_id = start
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    others = [index for index in _as_list(settings.eos_token_id) if index in special]
    ends = list(dict.fromkeys([tokenizer.eos_token_id, *others]))
    for holder in (model.config, settings):
        holder.eos_token_id = ends if len(ends) > 1 else ends[0]
        holder.pad_token_id = tokenizer.pad_token_id
        if not model.config.is_encoder_decoder:
            holder.bos_token_id = tokenizer.bos_token_id


def _as_list(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _grow_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add embedding rows until every token id that a text can contain has one; remove none, as a checkpoint may round
    their number up."""
    rows = model.get_input_embeddings().num_embeddings
    unused = set()
    if not model.config.is_encoder_decoder:  # special tokens only frame a text: Gemma 3's stands for images
        unused = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        unused -= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    needed = max(set(tokenizer.get_vocab().values()) - unused) + 1
    if needed <= rows:
        return
    logger.warning("embeddings grow from %d to %d rows for the tokenizer; new rows start near the mean", rows, needed)
    head, tied = model.get_output_embeddings(), model.config.tie_word_embeddings
    if not any(head.weight is layer.weight for layer in model.modules() if isinstance(layer, nn.Embedding)):
        model.config.tie_word_embeddings = False  # T5's config class, for one, says true for heads of their own
    # The new rows are drawn narrowly around the mean and not saved, so every load must draw the same ones.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(needed, mean_resizing=model.device.type != "meta")
    model.config.tie_word_embeddings = tied


def _grow_positions(model: PreTrainedModel, length: int, allowed: bool | None) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None or limit >= length:
        return
    whose = "" if model.config.is_encoder_decoder else " with --max_target_length"
    fault = f"--max_source_length: found {length}{whose}; {model.name_or_path} has {limit} positions, which"
    if allowed is False:
        raise InputError(f"{fault} --resize_position_embeddings false keeps; allowed: at most {limit}")
    try:
        model.resize_position_embeddings(length)
    except NotImplementedError:
        raise InputError(f"{fault} --resize_position_embeddings cannot change; allowed: at most {limit}") from None
    if allowed is None:
        logger.warning("position embeddings grow from %d to %d; new ones are untrained", limit, length)
