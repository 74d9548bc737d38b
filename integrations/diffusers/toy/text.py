"""The toy's two tokenizers and two text encoders: the classes of HunyuanVideo, small.

`HunyuanVideoPipeline` wraps each prompt into a system template and drops the first 95 tokens, the length of that
template under Llama 3's tokenizer. The toy's byte-pair vocabulary spends fewer tokens on it, so its post-processor puts
as many begin-of-text tokens in front as are missing.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaModel, LlamaTokenizerFast

CROP_START: int = DEFAULT_PROMPT_TEMPLATE["crop_start"]
TEMPLATE: str = DEFAULT_PROMPT_TEMPLATE["template"]
_LLAMA_SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
_LONGER_THAN_ANY_PROMPT = 1000


def build_llama_tokenizer(corpus: list[str], folder: Path) -> LlamaTokenizerFast:
    """Train the Llama-style tokenizer on `corpus` plus the prompt template and save it into `folder`."""
    prefix = TEMPLATE.split("{}")[0]
    lines = [f"{text}\n\n{text}" for text in corpus] + [prefix] * 50
    trainer_tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    # Words, numerals and punctuation apart; a word keeps the mark of the blank before it.
    trainer_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always", split=True),
            pre_tokenizers.Split(Regex(r"▁?[A-Za-z]+|▁?[0-9]|▁|[^A-Za-z0-9▁]"), behavior="isolated"),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=4000, min_frequency=1, special_tokens=[*_LLAMA_SPECIALS, *byte_tokens], show_progress=False
    )
    trainer_tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(trainer_tokenizer.to_str())["model"]
    tokenizer = LlamaTokenizerFast(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        pad_token="<pad>",
        extra_special_tokens=list(_LLAMA_SPECIALS[4:]),
        padding_side="right",
        model_max_length=_LONGER_THAN_ANY_PROMPT,
    )
    _lead_in(tokenizer, 0)
    missing = CROP_START - len(tokenizer(prefix).input_ids)
    if missing < 0:
        raise ValueError(f"the vocabulary spends {CROP_START - missing} tokens on the template; at most {CROP_START}")
    _lead_in(tokenizer, missing)
    tokenizer.save_pretrained(folder)
    return LlamaTokenizerFast.from_pretrained(folder)


def _lead_in(tokenizer: LlamaTokenizerFast, count: int) -> None:
    """Make the tokenizer put `count` begin-of-text tokens in front of every text."""
    template = ["<s>"] * count + ["$A"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=[*template, "$B"], special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    )


def build_clip_tokenizer(corpus: list[str], folder: Path) -> CLIPTokenizer:
    """Train the CLIP-style tokenizer on `corpus` and save it into `folder`."""
    blank = CLIPTokenizer()
    backend = blank.backend_tokenizer
    trainer_tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    trainer_tokenizer.normalizer = backend.normalizer
    trainer_tokenizer.pre_tokenizer = backend.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        special_tokens=list(_CLIP_SPECIALS),
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trainer_tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(trainer_tokenizer.to_str())["model"]
    vocab = model["vocab"]
    for letter in alphabet:
        vocab.setdefault(f"{letter}</w>", len(vocab))
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]], model_max_length=77)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_llama(tokenizer: LlamaTokenizerFast, width: int = 64) -> LlamaModel:
    """A Llama of three layers. The pipeline reads the output of the first (`hidden_states[-3]`)."""
    model = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            dtype="float32",
        )
    )
    # Llama's usual 0.02 would drown words in the biases of the layers that read them.
    nn.init.normal_(model.embed_tokens.weight, std=1.0)
    return model


def build_clip(tokenizer: CLIPTokenizer, width: int = 64) -> CLIPTextModel:
    """A CLIP text encoder of two layers; its pooled output (at the end-of-text token) modulates every block."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=width,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            dtype="float32",
        )
    )


def tokenize(
    prompts: list[str], llama_tokenizer: LlamaTokenizerFast, clip_tokenizer: CLIPTokenizer, text_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids of `prompts` as the pipeline makes them, with room for `text_tokens` after the template.

    Returns Llama ids (N, 95 + text_tokens), their attention mask of the same shape, and CLIP ids (N, 77), all int64.
    Raises ValueError if a prompt does not fit: it would be cut in training.
    """
    wrapped = [TEMPLATE.format(prompt) for prompt in prompts]
    length = CROP_START + text_tokens
    longest = max(len(ids) for ids in llama_tokenizer(wrapped).input_ids)
    if longest > length:
        raise ValueError(f"text_tokens is {text_tokens}, the longest prompt needs {longest - CROP_START}")
    llama = llama_tokenizer(wrapped, max_length=length, padding="max_length", return_tensors="pt")
    clip = clip_tokenizer(prompts, max_length=77, padding="max_length", truncation=True, return_tensors="pt")
    return llama.input_ids, llama.attention_mask, clip.input_ids
