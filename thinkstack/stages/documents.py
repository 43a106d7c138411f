"""Pre-training documents by index, from the generated corpus and the user's texts, as examples of token ids."""

import random
from pathlib import Path

from thinkstack.data import DocumentSource, Example, text_source
from thinkstack.stages.pretrain_config import PretrainConfig
from thinkstack.tasks.puzzles.corpus import Document, document
from thinkstack.tasks.puzzles.puzzle import PuzzleTask, digest
from thinkstack.text.boundary import BoundarySplitter
from thinkstack.text.chat import ChatFormat
from thinkstack.text.fim import check_fim, fill_in_middle
from thinkstack.text.tokenizer import BOS
from thinkstack.types import Message


def make_source(cfg: PretrainConfig, tasks: list[PuzzleTask], chat: ChatFormat) -> DocumentSource:
    """A function from an index to a document of the generated corpus or of the user's texts.

    Raises ConfigError for text files that cannot be read, and for a tokenizer without the tokens that a setting
    requires."""
    bos = chat.tokenizer.control_id(BOS)
    transform = DocumentTransform(cfg, chat)
    margin = (
        8 + cfg.row_tokens // 16 if cfg.fim_rate or cfg.boundary_split_share else 0
    )  # for control tokens and splits
    paths = [Path(path) for path in cfg.text_files]
    user_texts = text_source(paths, chat.tokenizer.encode, bos, max(cfg.row_tokens - margin, 1))

    def source(index: int) -> Example:
        number = digest("text", cfg.seed, index)
        if user_texts and number % 10_000 < cfg.text_share * 10_000:
            return transform(user_texts[number // 10_000 % len(user_texts)], index, is_text=True)
        doc = document(tasks, cfg.corpus, cfg.seed, index)
        return transform(document_example(doc, chat, bos), index, is_text=not doc.question)

    return source


def document_example(doc: Document, chat: ChatFormat, bos: int) -> Example:
    """A document as an example; all tokens but BOS are trained, tokens of the question included."""
    prompt = chat.prompt([Message(role="user", content=doc.question)]) if doc.question else [bos]
    return make_example([*prompt, *chat.answer(doc.text)])


def make_example(ids: list[int]) -> Example:
    """An example whose tokens are all trained, except the first one."""
    return Example(tuple(ids), (0,) + (1,) * (len(ids) - 1))


class DocumentTransform:
    """V3's transforms of documents before packing: fill-in-the-middle of plain text, and split boundary tokens.

    Both are random functions of (seed, index). A document stays unchanged if its transformed version would not fit a
    row, or if it is a part of a text file that starts or ends within a character.
    """

    def __init__(self, cfg: PretrainConfig, chat: ChatFormat):
        self.cfg, self.tokenizer = cfg, chat.tokenizer
        self.end_ids = chat.stop_token_ids
        if cfg.fim_rate:
            check_fim(chat.tokenizer)
        self.splitter = BoundarySplitter(chat.tokenizer) if cfg.boundary_split_share else None

    def __call__(self, example: Example, index: int, is_text: bool) -> Example:
        """The transformed example. is_text: whether the document is plain text or code, not a question with an
        answer."""
        cfg = self.cfg
        if is_text and cfg.fim_rate:
            rng = random.Random(digest("fim", cfg.seed, index))
            if rng.random() < cfg.fim_rate:
                example = self._if_fitting(self._fill_in_middle(example, rng), example)
        if self.splitter is not None:
            rng = random.Random(digest("boundary", cfg.seed, index))
            example = self._if_fitting(self.splitter.split(example.ids, cfg.boundary_split_share, rng), example)
        return example

    def _fill_in_middle(self, example: Example, rng: random.Random) -> list[int]:
        body = example.ids[1:-1] if example.ids[-1] in self.end_ids else example.ids[1:]
        text = self.tokenizer.decode(body)
        if not text or "\ufffd" in text:
            return list(example.ids)
        return [example.ids[0], *fill_in_middle(text, self.tokenizer, rng)]

    def _if_fitting(self, ids: list[int], before: Example) -> Example:
        return before if len(ids) - 1 > self.cfg.row_tokens else make_example(ids)
