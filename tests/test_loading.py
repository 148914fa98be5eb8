"""Which model `--model_name_or_path` leads to, and what is refused."""

import functools
import logging
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    BartConfig,
    BartForConditionalGeneration,
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    WhisperConfig,
    xLSTMConfig,
)

from errors import InputError
from helpers import LLAMA, edit, put
from loranew import LoraNewConfig, add_loranew, fold_loranew, load_loranew
from methods.base_modules import choose_modules
from model.answer_loss import AnswerLoss, check_loss
from model.loading import _set_special_tokens, cast_parameters, load_model_and_tokenizer
from module_matching import match_linear, match_names
from plan_memory import build_on_meta
from task_setup import check_layer_drop

TEXT = ["the quick brown fox jumps over the lazy dog", "Option: Good, Bad", "Answer: Good"]
ROWS = 128  # more than the tokenizers need, as in published checkpoints


def make_tokenizer(specials: list[str], *, after: str = "", **names) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer trained on TEXT; `after` is the template of special tokens around a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if "<unk>" in specials else None))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=96, special_tokens=specials))
    if after:
        ids = [(token, tokenizer.token_to_id(token)) for token in specials if token in after]
        tokenizer.post_processor = processors.TemplateProcessing(single=after, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def seq2seq_tokenizer() -> PreTrainedTokenizerFast:
    specials = ["<pad>", "</s>", "<unk>"]
    return make_tokenizer(specials, after="$A </s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def llama_tokenizer(**names) -> PreTrainedTokenizerFast:
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return make_tokenizer(["<unk>", "<s>", "</s>"], after="<s> $A", **defaults | names)


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_llama(folder, tokenizer=None, **options):
    defaults = {
        "vocab_size": ROWS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    return save(folder, LlamaForCausalLM(LlamaConfig(**defaults | options)), tokenizer or llama_tokenizer())


def make_t5(folder, **options):
    defaults = {
        "vocab_size": ROWS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
        "decoder_start_token_id": 0,
    }  # fmt: skip
    return save(folder, T5ForConditionalGeneration(T5Config(**defaults | options)), seq2seq_tokenizer())


def make_bart(folder, config_class=BartConfig, model_class=BartForConditionalGeneration):
    config = config_class(
        vocab_size=ROWS, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, decoder_start_token_id=1, forced_eos_token_id=1,
    )  # fmt: skip
    return save(folder, model_class(config), seq2seq_tokenizer())


def refusal(name, **options) -> str:
    with pytest.raises(InputError) as error:
        load_model_and_tokenizer(str(name), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test waits for a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# Routes


def test_t5_is_loaded_whole_and_keeps_its_rows(tmp_path):
    folder = make_t5(tmp_path / "small-llama-in-name-only")
    loaded = load_model_and_tokenizer(str(folder))
    assert type(loaded.model) is T5ForConditionalGeneration
    assert (loaded.decoder_only, loaded.previous, loaded.base_name) == (False, None, str(folder))
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(loaded.model.state_dict()[name], tensor) for name, tensor in stored.items())
    assert loaded.model.get_input_embeddings().num_embeddings == ROWS > len(loaded.tokenizer)
    assert loaded.tokenizer("the fox").input_ids[-1] == loaded.tokenizer.eos_token_id == 1


def test_bart_is_an_encoder_decoder(tmp_path):
    loaded = load_model_and_tokenizer(str(make_bart(tmp_path / "bart")), max_source_length=64)
    assert type(loaded.model) is BartForConditionalGeneration and not loaded.decoder_only


def test_a_decoder_only_model_gets_its_stock_class_with_the_cheaper_loss(tmp_path):
    loaded = load_model_and_tokenizer(str(make_llama(tmp_path / "decoder")), dtype=torch.bfloat16)
    assert type(loaded.model).__mro__[1:3] == (AnswerLoss, LlamaForCausalLM) and loaded.decoder_only
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


def test_adapter_folder_leads_to_its_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_t5("initial_model/t5-tiny")
    loaded = load_model_and_tokenizer("initial_model/t5-tiny")
    config = LoraNewConfig(r=2, target_modules=r".*SelfAttention.(q|v)", task_type="SEQ_2_SEQ_LM")
    model = add_loranew(loaded.model, config)
    fold_loranew(model)
    model.save_pretrained("outputs/1-dbpedia/t5_adapter")
    again = load_model_and_tokenizer("outputs/1-dbpedia/t5_adapter")
    assert str(again.previous) == "outputs/1-dbpedia/t5_adapter" and again.base_name == "initial_model/t5-tiny"
    assert load_loranew(again.model, again.previous).peft_config["default"].r_sum == 2


def configure(folder, **changes):
    """Change config.json, and leave weights that no one could read."""
    edit(folder / "config.json", lambda config: config | changes)
    put(folder / "model.safetensors", b"unread")
    return folder


@pytest.mark.parametrize("config, said", [
    (WhisperConfig().to_dict(), "found model_type 'whisper'; allowed: decoder-only"),
    (xLSTMConfig().to_dict(), "found model_type 'xlstm', whose xLSTMForCausalLM cannot compute the logits of some"),
    ({"model_type": None}, "found model_type None"),
], ids=["whisper", "xlstm", "no type"])  # fmt: skip
def test_other_architectures_are_refused_before_weights_are_read(tmp_path, config, said):
    assert said in refusal(configure(make_t5(tmp_path / "model"), **config))


@pytest.mark.parametrize("make, family, other", [(make_t5, "decoder-only", "use scripts/"),
                                                 (make_llama, "encoder-decoder", "use scripts_llama/")])
def test_the_wrong_family_of_scripts_names_the_right_one(tmp_path, make, family, other):
    assert refusal(configure(make(tmp_path / "model")), family=family).endswith(other)
    right = {"decoder-only": make_llama, "encoder-decoder": make_t5}[family]
    load_model_and_tokenizer(str(right(tmp_path / "right")), family=family)


TINY = {"vocab_size": ROWS, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}


def test_a_type_that_no_test_compares_is_compared_when_it_is_loaded(tmp_path):
    """Cohere scales its logits, which the stock head does; GPT-2 counts padding, unless it is given positions."""
    folder = tmp_path / "cohere"
    save(folder, CohereForCausalLM(CohereConfig(intermediate_size=24, logit_scale=0.5, **TINY)), llama_tokenizer())
    loaded = load_model_and_tokenizer(str(folder))
    assert isinstance(loaded.model, CohereForCausalLM) and type(loaded.model) is not CohereForCausalLM
    model = GPT2LMHeadModel(GPT2Config(**TINY))
    model.transformer.wpe.weight.data.mul_(100)
    loaded = load_model_and_tokenizer(str(save(tmp_path / "gpt2", model, llama_tokenizer())))
    type(loaded.model).takes_positions = False
    with pytest.raises(InputError, match="a left-padded batch has a loss of"):
        check_loss(loaded.model, "gpt2")


def chosen(folder, **given) -> tuple:
    options = SimpleNamespace(lora_modules="auto", optim_target_modules=["auto"], proj_lora_modules="auto")
    vars(options).update(given)
    choose_modules(options, load_model_and_tokenizer(str(folder)).model)
    return options.lora_modules, options.optim_target_modules, options.proj_lora_modules


def test_modules_are_chosen_by_type_and_flags_win(tmp_path, caplog):
    folder, ordinary = make_llama(tmp_path / "llama"), (".*self_attn.(q_proj|v_proj).*", [".*mlp.gate_proj.*"])
    with caplog.at_level(logging.INFO, "gorp"):
        assert chosen(folder) == (*ordinary, ".*loranew_A.*")
    assert "model_type llama: --lora_modules .*self_attn.(q_proj|v_proj).*, --optim_target_modules .*mlp" in caplog.text
    assert chosen(folder, optim_target_modules=[".*up_proj"]) == (ordinary[0], [".*up_proj"], ".*loranew_A.*")
    assert chosen(folder, lora_modules=".*k_proj", proj_lora_modules=None)[::2] == (".*k_proj", None)


def test_an_unknown_type_lists_its_linear_layers(tmp_path):
    folder = tmp_path / "cohere"
    save(folder, CohereForCausalLM(CohereConfig(intermediate_size=24, **TINY)), llama_tokenizer())
    with pytest.raises(InputError, match="found auto, which does not know model_type 'cohere'.* such as '.*ENDING'; .*"
                                         "1 x self_attn.q_proj, .*1 x mlp.gate_proj"):
        chosen(folder)
    given = {"lora_modules": ".*q_proj", "optim_target_modules": [".*up_proj"]}
    assert chosen(folder, **given) == (".*q_proj", [".*up_proj"], ".*loranew_A.*")


@pytest.mark.parametrize("world_size, refused", [(1, False), (2, True)])
def test_ranks_must_train_the_same_layers(world_size, refused):
    given = SimpleNamespace(encoder_layerdrop=0.05), SimpleNamespace(world_size=world_size, do_train=True)
    with pytest.raises(InputError, match="a model with encoder_layerdrop above") if refused else nullcontext():
        check_layer_drop(*given)


# Places


@pytest.mark.parametrize("name", ["initial_model/t5-large", "./t5", "../t5/", "/models/t5", "a/b/c", "outputs/t5"])
def test_a_path_that_does_not_exist_says_both_ways_on(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    message = refusal(name)
    assert f"{name} does not exist" in message and "into that folder" in message and "hub id" in message


@pytest.mark.parametrize("name", ["gpt2", "google-t5/t5-large"])
def test_a_hub_id_out_of_reach_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert refusal(name, cache_dir=str(tmp_path)).startswith(f"{name}: the config cannot be loaded")


@pytest.mark.parametrize("base", ["initial_model/gone", None, 3, "empty"])
def test_an_adapter_without_its_base_model_is_refused(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    put(tmp_path / "adapter/adapter_config.json", {"base_model_name_or_path": base})
    message = refusal("adapter")
    assert message.startswith(f"adapter/adapter_config.json: base_model_name_or_path is {base}")


# Weights


def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path):
    folder = make_llama(tmp_path / "llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    message = refusal(folder)
    assert "pytorch_model.bin: a pickle" in message and "AutoModelForCausalLM" in message
    (folder / "pytorch_model.bin").unlink()
    assert "allowed: a folder with model.safetensors" in refusal(folder)


def test_weights_without_a_place_are_said(tmp_path, caplog):
    folder = make_t5(tmp_path / "t5")
    tensors = load_file(folder / "model.safetensors") | {"classifier.weight": torch.zeros(2, 16)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "gorp"):
        load_model_and_tokenizer(str(folder))
    assert "does not use 1 weights, such as classifier.weight" in caplog.text


# Special tokens, rows, positions


def special_ids(holder) -> tuple:
    return holder.bos_token_id, holder.eos_token_id, holder.pad_token_id


@pytest.mark.parametrize(
    "tokenizer, ids",
    [
        (llama_tokenizer(), (1, 2, 0)),
        (llama_tokenizer(pad_token="</s>"), (1, 2, 2)),
        (llama_tokenizer(unk_token=None), (1, 2, 2)),
        (llama_tokenizer(bos_token=None, eos_token=None), (1, 2, 0)),
    ],
    ids=["unk pads", "own pad", "eos pads", "from the config"],
)
def test_llama_special_tokens_agree_everywhere(tmp_path, tokenizer, ids):
    wrong = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 7}
    loaded = load_model_and_tokenizer(str(make_llama(tmp_path / "llama", tokenizer, **wrong)))
    for holder in (loaded.tokenizer, loaded.model.config, loaded.model.generation_config):
        assert special_ids(holder) == ids
    assert loaded.tokenizer.padding_side == "left"


def test_a_default_bos_that_is_an_ordinary_piece_is_none(tmp_path):
    tokenizer = llama_tokenizer(bos_token=None)
    piece = tokenizer.convert_tokens_to_ids("Good")
    loaded = load_model_and_tokenizer(str(make_llama(tmp_path / "llama", tokenizer, bos_token_id=piece)))
    assert loaded.tokenizer.bos_token is None and loaded.model.config.bos_token_id is None


def test_a_language_whose_code_is_not_its_token():
    """M2M100's: answers begin with `__en__`, and `en` is unknown."""
    class Tokenizer(SimpleNamespace):
        def __call__(self, text_target):
            return SimpleNamespace(input_ids=[9, 5, 2])

    tokenizer = Tokenizer(tgt_lang="en", lang_code_to_token={"en": "__en__"}, added_tokens_decoder={}, eos_token_id=2,
                          pad_token_id=1, convert_tokens_to_ids={"__en__": 9, "en": 3}.get)
    config = SimpleNamespace(is_encoder_decoder=True, decoder_start_token_id=2)
    model = SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=2))
    _set_special_tokens(model, tokenizer)
    assert model.generation_config.forced_bos_token_id == 9


def test_buffers_keep_their_precision():
    """Rotary frequencies in 16 bits would move tokens."""
    model = load_model_and_tokenizer(str(LLAMA)).model
    cast_parameters(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_a_special_token_that_no_text_contains_needs_no_row(tmp_path):
    tokenizer = llama_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    folder = make_llama(tmp_path / "llama", tokenizer, vocab_size=len(tokenizer) - 1)
    assert load_model_and_tokenizer(str(folder)).model.get_input_embeddings().num_embeddings == len(tokenizer) - 1


def test_missing_eos_is_refused(tmp_path):
    folder = make_llama(tmp_path / "llama", llama_tokenizer(eos_token=None), eos_token_id=None)
    assert "defines eos_token" in refusal(folder)


def test_every_special_eos_of_the_generation_config_ends_an_answer_and_no_other_piece(tmp_path):
    folder = make_llama(tmp_path / "llama", eos_token_id=[0, 2])
    put(folder / "generation_config.json", {"eos_token_id": [0, 2, 9], "temperature": 0.6})
    loaded = load_model_and_tokenizer(str(folder))
    assert loaded.tokenizer.eos_token_id == 2  # with which answers are trained to end
    assert loaded.model.generation_config.eos_token_id == loaded.model.config.eos_token_id == [2, 0]
    loaded.model.save_pretrained(tmp_path / "saved")  # raises if the generation config contradicts itself


def test_missing_decoder_start_is_refused(tmp_path):
    folder = make_t5(tmp_path / "t5")
    edit(folder / "config.json", lambda config: config | {"decoder_start_token_id": None})
    assert "has no decoder_start_token_id" in refusal(folder)
    edit(folder / "config.json", lambda config: config.pop("decoder_start_token_id") or config)
    assert "has no decoder_start_token_id" in refusal(folder)


def test_t5gemma_starts_with_its_decoders_bos(tmp_path):
    tokenizer = llama_tokenizer()
    stack = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1}
    model = T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=stack, decoder=stack, vocab_size=len(tokenizer)))
    tokenizer.pad_token = tokenizer.eos_token
    loaded = load_model_and_tokenizer(str(save(tmp_path / "t5gemma", model, tokenizer))).model.eval()
    ids = loaded.generate(**tokenizer("the fox", return_tensors="pt"), max_new_tokens=1)
    assert ids[0, 0] == loaded.config.decoder.bos_token_id == 1 and ids.shape == (1, 2)
    tokenizer.add_tokens([f"<tag_{number}>" for number in range(5)])
    tokenizer.save_pretrained(tmp_path / "more")
    grown = load_model_and_tokenizer(str(tmp_path / "t5gemma"), tokenizer_name=str(tmp_path / "more")).model
    assert grown.get_decoder().embed_tokens.weight is grown.get_output_embeddings().weight
    assert len(grown.get_output_embeddings().weight) == len(grown.get_encoder().embed_tokens.weight) == len(tokenizer)


def test_a_head_of_its_own_stays_so_when_embeddings_grow(tmp_path):
    """As in T5 v1.1, whose config Transformers calls tied."""
    folder = make_t5(tmp_path / "t5")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["lm_head.weight"] = torch.randn_like(tensors["shared.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", lambda config: config | {"tie_word_embeddings": False})
    planned = sum(parameter.numel() for parameter in build_on_meta(str(folder)).parameters())
    assert planned == sum(tensor.numel() for tensor in tensors.values())
    tokenizer = seq2seq_tokenizer()
    tokenizer.add_tokens([f"<tag_{number}>" for number in range(ROWS - len(tokenizer) + 5)])
    tokenizer.save_pretrained(tmp_path / "more")
    grown = load_model_and_tokenizer(str(folder), tokenizer_name=str(tmp_path / "more")).model
    assert grown.lm_head.out_features == ROWS + 5 and torch.equal(grown.lm_head.weight[:ROWS], head)
    assert torch.equal(grown.get_input_embeddings().weight[:ROWS], tensors["shared.weight"])
    assert grown.encoder.embed_tokens.weight is grown.get_input_embeddings().weight
    assert grown.config.tie_word_embeddings == AutoConfig.from_pretrained(folder).tie_word_embeddings


def test_embeddings_grow_to_the_tokenizer_the_same_way_each_time(tmp_path, caplog):
    tokenizer = llama_tokenizer()
    tokenizer.add_tokens([f"<tag_{number}>" for number in range(5)])
    folder = make_llama(tmp_path / "llama", tokenizer, vocab_size=len(tokenizer) - 5)
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING, "gorp"):
        first = load_model_and_tokenizer(str(folder)).model
    assert f"from {len(tokenizer) - 5} to {len(tokenizer)} rows" in caplog.text
    torch.manual_seed(2)
    second = load_model_and_tokenizer(str(folder)).model
    assert first.get_input_embeddings().num_embeddings == first.lm_head.out_features == len(tokenizer)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    stored = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rows = first.get_input_embeddings().weight
    assert torch.equal(rows[:-5], stored)
    torch.testing.assert_close(rows[-5:], stored.mean(0).expand(5, -1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("allowed", [None, True, False])
def test_too_few_positions_are_refused_where_they_cannot_grow(tmp_path, allowed):
    message = refusal(make_bart(tmp_path / "bart"), max_source_length=65, resize_position_embeddings=allowed)
    assert "--max_source_length: found 65" in message and "--resize_position_embeddings" in message
    assert message.endswith("at most 64")


def test_prompt_and_answer_share_the_positions_of_a_decoder_only_model(tmp_path):
    most = LlamaConfig.from_pretrained(LLAMA).max_position_embeddings
    load_model_and_tokenizer(str(LLAMA), max_source_length=most - 50, max_target_length=50, weights=False)
    message = refusal(LLAMA, max_source_length=most - 49, max_target_length=50)
    assert f"--max_source_length: found {most + 1} with --max_target_length; " in message
    bart = make_bart(tmp_path / "bart")
    load_model_and_tokenizer(str(bart), max_source_length=64, max_target_length=50, weights=False)


def test_a_branch_of_the_hub_is_pinned_to_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place, commit = tmp_path / "models--someone--llama", "a" * 40
    shutil.copytree(LLAMA, place / "snapshots" / commit)
    put(place / "refs" / "main", commit)
    load = functools.partial(load_model_and_tokenizer, "someone/llama", cache_dir=str(tmp_path), weights=False)
    assert load().origin["revision"] == commit
    put(place / "refs" / "main", "b" * 40)
    with pytest.raises(InputError):
        load()
    assert load(revision=commit).origin["revision"] == commit
    adapter = tmp_path / "adapter"
    put(adapter / "adapter_config.json", {"base_model_name_or_path": "someone/llama", "peft_type": "LORA",
                                          "revision": commit})
    again = load_model_and_tokenizer(str(adapter), cache_dir=str(tmp_path), revision="main", weights=False)
    assert again.origin["revision"] == commit, "a next task, with the flag of the first"
    (place / "snapshots" / commit / "model.safetensors").rename(place / "snapshots" / commit / "pytorch_model.bin")
    with pytest.raises(InputError, match="the hub has it without safetensors; `hf download` it into a folder"):
        load(revision=commit)


def test_positions_grow_where_the_model_can(tmp_path, caplog):
    folder = make_bart(tmp_path / "pegasus", PegasusConfig, PegasusForConditionalGeneration)
    with caplog.at_level(logging.WARNING, "gorp"):
        loaded = load_model_and_tokenizer(str(folder), max_source_length=80)
    assert loaded.model.config.max_position_embeddings == 80 and "from 64 to 80" in caplog.text
    assert "at most 64" in refusal(folder, max_source_length=80, resize_position_embeddings=False)


def test_expressions_name_layers_and_factors_completely():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("up", "up_proj", "gate_up")})
    assert match_linear(model, ["up"], "--x").keys() == {"up"}
    names = ["up.loranew_A.weight", "gate_up.loranew_A.weight"]
    assert match_names(names, "up.loranew_A.weight", "--x") == names[:1]
    with pytest.raises(InputError, match="matches no factor"):
        match_names(names, "up.loranew_A", "--x")


def test_config_and_tokenizer_may_come_from_elsewhere(tmp_path):
    folder, other = make_t5(tmp_path / "t5"), make_t5(tmp_path / "other", dropout_rate=0.3)
    seq2seq_tokenizer().save_pretrained(tmp_path / "tokenizer")
    loaded = load_model_and_tokenizer(
        str(folder), config_name=str(other), tokenizer_name=str(tmp_path / "tokenizer")
    )
    assert loaded.model.config.dropout_rate == 0.3
