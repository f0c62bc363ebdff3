"""Models for the tests: the real SmolLM2, and tiny random ones of every architecture in the table."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.commands import Run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from ibke.cli.main import app
from ibke.editors import base
from ibke.fingerprint import fingerprint
from ibke.models import LanguageModel, load_model
from ibke.modules import architecture_of

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

TEXTS = (
    "The capital of France is Paris. The capital of Australia is Canberra.",
    "Question: Who wrote the play? Answer: The author of the play is known.",
)
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT2_SIZES = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {**SIZES, "head_dim": 8},
    "gemma2": {**SIZES, "head_dim": 8},
    "gemma3_text": {**SIZES, "head_dim": 8},
    "gemma3": {
        "text_config": {**SIZES, "head_dim": 8},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "boi_token_index": 5,
        "eoi_token_index": 6,
        "image_token_index": 7,
    },
    "gpt2": GPT2_SIZES,
    "gptj": {**GPT2_SIZES, "rotary_dim": 4},
    "opt": {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4},
    "falcon": {**SIZES, "alibi": False, "bias": True},
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens with a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_tiny(model_type: str, seed: int = 0, **overrides: Any) -> LanguageModel:
    """A random float32 model of hidden size 32 and 4 layers; ``overrides`` go into its configuration."""
    tokenizer = make_tokenizer()
    settings = {**OWN_SIZES.get(model_type, SIZES), **overrides}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if "text_config" in settings:
        settings["text_config"] = {**settings["text_config"], **tokens}
    else:
        settings.update(tokens)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
        # Larger than the usual initialisation, so that a change of one module shows in the logits.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.eval().requires_grad_(False)
    return LanguageModel(model, tokenizer, f"tiny-{model_type}", architecture_of(model), fingerprint(model))


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., LanguageModel]:
    """Factory: ``tiny_model(model_type, seed=0, **config)`` builds a fresh tiny random model."""
    return make_tiny


@pytest.fixture(scope="session")
def smollm() -> LanguageModel:
    """SmolLM2-135M-Instruct as users get it (bfloat16 where the processor has it)."""
    return load_model("smollm2-135m", device="cpu")


@pytest.fixture(scope="session")
def smollm32() -> LanguageModel:
    """SmolLM2-135M-Instruct in float32."""
    return load_model("smollm2-135m", dtype="float32", device="cpu")


@pytest.fixture
def statistics_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's key statistics are kept; the user's cache folder holds none of tiny models."""
    monkeypatch.setattr("ibke.editors.key_statistics.cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "statistics"


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Where the benchmark data sets are; skips without them."""
    folder = Path(os.environ.get("IBKE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no benchmark data at {folder}; set IBKE_DATA")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a command line; the methods ``gradient`` (which works) and ``idle`` (which does nothing) are registered."""
    monkeypatch.setenv("IBKE_DATA", str(tmp_path_factory.mktemp("data")))
    monkeypatch.setitem(base.METHODS, "gradient", "gradient_editor:GradientEditor")
    monkeypatch.setitem(base.METHODS, "idle", "gradient_editor:IdleEditor")
    runner = CliRunner()

    def invoke(*arguments: Any) -> Result:
        result = runner.invoke(app, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke
